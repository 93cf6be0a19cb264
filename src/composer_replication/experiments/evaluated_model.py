"""The model that is evaluated: what `load_model` takes, a run directory, or a LoRA adapter."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from composer_replication.errors import MissingDependencyError, ModelError
from composer_replication.experiments.trainer_setup import device
from composer_replication.runs.checkpoint_folders import newest_checkpoint
from composer_replication.runs.followed_run import FollowedRun
from composer_replication.training.model_source import LoadedModel, check_model_spec, load_model

ADAPTER_FILE = "adapter_config.json"


def model_place(given: str, on_note: Callable[[str], None]) -> str:
    """What to load for a run directory: its `model/`, or its newest checkpoint; else as given.

    Args:
        given: a model as `load_model` takes it, a run directory, or a folder with an adapter.
        on_note: receives a sentence where a checkpoint stands in for the model.

    Raises:
        ModelError: a run directory that holds neither.
    """
    run = FollowedRun(Path(given).expanduser())
    if not run.config_path.is_file():
        return given
    if run.model_dir.is_dir():
        return str(run.model_dir)
    checkpoint = newest_checkpoint(run.checkpoints_dir, on_note)
    if checkpoint is None:
        raise ModelError(
            f"{given} is a run that saved no model and no checkpoint, so there is nothing to "
            "evaluate. A smoke saves none: evaluate a train run, or give a model."
        )
    on_note(f"{given} has no model/ (the run did not finish): {checkpoint.name} stands in.")
    return str(checkpoint)


def check_evaluated_model(place: str) -> None:
    """Raise what `load_evaluated_model` would raise, before weights are read."""
    check_model_spec(base_of_adapter(place) or place)


def load_evaluated_model(place: str, on_progress: Callable[[str], None]) -> LoadedModel:
    """The model in eval mode on the device, an adapter merged into its base.

    Weights are fp32, as in training, whose forward casts them under autocast; on CUDA they are
    bf16, which is what that cast gives.

    Raises:
        ModelError: as `load_model`; a base model that an adapter names and is not there.
        MissingDependencyError: an adapter, and PEFT is not installed.
    """
    base = base_of_adapter(place)
    is_bf16 = device().type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    loaded = load_model(base or place, dtype=dtype, on_progress=on_progress)
    if base is not None:
        loaded = replace(
            loaded, model=_with_adapter(loaded, place), label=f"{loaded.label} + {place}"
        )
    loaded.model.to(device()).eval()  # pyright: ignore[reportArgumentType]
    return loaded


def base_of_adapter(place: str) -> str | None:
    """The base model that the adapter in a folder was trained on; None: there is no adapter."""
    path = Path(place).expanduser() / ADAPTER_FILE
    if not path.is_file() or (path.parent / "config.json").is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} does not name its base model ({type(error).__name__}: {error}). Write it "
            "with `save_pretrained` again, or merge the adapter and give the merged model."
        ) from error
    return str(base)


def _with_adapter(loaded: LoadedModel, place: str):  # noqa: ANN202, PEFT is optional
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError(
            f"{place} is a LoRA adapter, and PEFT, which loads it, is not installed. "
            "Install it: pip install 'composer-replication[lora]'."
        ) from error
    return PeftModel.from_pretrained(loaded.model, place).merge_and_unload()
