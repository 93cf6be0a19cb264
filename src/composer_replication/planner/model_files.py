"""A model's `config.json` without torch: shipped, in a folder, in the hub's cache or on the hub."""

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import cast

from composer_replication.errors import ModelError, nearest

SHAPE_PREFIX = "shape:"
EMBEDDED_SPEC = "smollm2-135m"
REFERENCE_SPEC = "Qwen/Qwen2.5-0.5B-Instruct"
"""What a run without a `model` trains where there is a GPU."""

Settings = Mapping[str, object]


def shipped_shapes() -> list[str]:
    """Names that may follow `shape:`, smallest model first."""
    folder = files("composer_replication.config").joinpath("shapes")
    names = [entry.name.removesuffix(".json") for entry in folder.iterdir()]
    return sorted(names, key=lambda name: float(name.rsplit("-", 1)[-1].removesuffix("b")))


def shipped_config(name: str) -> Settings:
    """The public configuration of a shipped shape, such as `qwen2.5-7b`.

    Raises:
        ModelError: no such shape.
    """
    if name not in shipped_shapes():
        raise ModelError(
            f"shape:{name} is not a shape that this package ships. "
            f"{nearest(name, shipped_shapes())} A model of your own can be given as a folder."
        )
    folder = files("composer_replication.config").joinpath("shapes")
    return cast("Settings", json.loads(folder.joinpath(f"{name}.json").read_text("utf-8")))


def model_settings(spec: str) -> Settings:
    """The architecture of a run's `model`, from its `config.json` alone.

    Raises:
        ModelError: a spec that names nothing, or a file that is no configuration.
    """
    if spec == EMBEDDED_SPEC:
        text = files("composer_replication.planner").joinpath(f"{spec}.json").read_text("utf-8")
        return cast("Settings", json.loads(text))
    if spec.startswith(SHAPE_PREFIX):
        return shipped_config(spec.removeprefix(SHAPE_PREFIX))
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return _read(folder / "config.json", spec)
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        known = [EMBEDDED_SPEC, *(SHAPE_PREFIX + name for name in shipped_shapes())]
        raise ModelError(
            f"{spec!r} is no model: no such folder, shape or hub id (owner/name). "
            f"{nearest(spec, known)}"
        )
    cached = _cached_config(spec)
    if cached is not None:
        return _read(cached, spec)
    twin = _shipped_twin(spec)
    return shipped_config(twin) if twin is not None else _from_hub(spec)


def _shipped_twin(spec: str) -> str | None:
    """The shipped shape of a public id, such as that of `Qwen/Qwen2.5-7B-Instruct`."""
    owner, _, name = spec.partition("/")
    shape = name.lower().removesuffix("-instruct")
    return shape if owner == "Qwen" and shape in shipped_shapes() else None


def _cached_config(spec: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    root = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    repository = root / f"models--{spec.replace('/', '--')}"
    revision = repository / "refs" / "main"
    if not revision.is_file():
        return None
    config = repository / "snapshots" / revision.read_text().strip() / "config.json"
    return config if config.is_file() else None


def _from_hub(spec: str) -> Settings:
    # Imported only here: it takes as long as all the rest of a plan.
    from huggingface_hub import hf_hub_download

    try:
        return _read(Path(hf_hub_download(spec, "config.json")), spec)
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{spec}: its config.json is not in the local hub cache and cannot be fetched "
            f"({type(error).__name__}). Download it where there is a network "
            f"(`hf download {spec} config.json`), or plan a shape such as shape:qwen2.5-7b."
        ) from None


def _read(path: Path, spec: str) -> Settings:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{spec} is a folder without a config.json, so it holds no model. "
            "Give the folder that `save_pretrained` wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as a model's configuration ({error}). Correct it, or download "
            "it again."
        ) from None
    if not isinstance(settings, dict):
        raise ModelError(
            f"{path} holds {type(settings).__name__} and no object, so it describes no model. "
            "Correct it, or download it again."
        )
    found = cast("dict[str, object]", settings)
    refuse_quantised(spec, found.get("quantization_config"))
    text_config = found.get("text_config")
    # Models of several kinds of input keep the decoder's sizes one level down.
    return cast("Settings", text_config) if isinstance(text_config, dict) else found


def refuse_quantised(spec: str, quantization_config: object) -> None:
    """Nothing, where the weights are whole.

    Args:
        spec: of the model, for the message.
        quantization_config: as its `config.json` has it; None: it has none.

    Raises:
        ModelError: there is one.
    """
    if quantization_config is None:
        return
    known = cast("Mapping[str, object]", quantization_config)
    method = known.get("quant_method") if isinstance(quantization_config, Mapping) else None
    raise ModelError(
        f"{spec} holds quantised weights ({method or 'an unknown method'}), which no optimizer "
        "step can change. Give the repository of the full weights; [lora] trains an adapter on "
        "them in bf16."
    )
