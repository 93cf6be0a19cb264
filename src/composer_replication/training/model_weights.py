"""The weights of a model whose configuration passed: complete, matching and finite."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from composer_replication.errors import ModelError
from composer_replication.training.embedded_model import quiet_progress_bars
from composer_replication.training.finite_checks import refuse_non_finite_weights
from composer_replication.training.out_of_memory import is_out_of_memory

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def missing_weights(folder: Path) -> str | None:
    """The first weight file that a model folder lacks; None when all are there."""
    if any((folder / name).is_file() for name in _WEIGHT_FILES):
        return None
    for index in _WEIGHT_INDEXES:
        if (folder / index).is_file():
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            return next((name for name in sorted(shards) if not (folder / name).is_file()), None)
    return _WEIGHT_FILES[0]


def read_weights(
    spec: str,
    location: str | Path,
    *,
    is_local: bool,
    dtype: torch.dtype,
    attn_implementation: str,
) -> PreTrainedModel:
    """The model with every weight read from its files, in eval mode.

    Args:
        spec: what the user gave, for the error text.
        location: what `from_pretrained` reads.
        is_local: True when nothing is to be asked of the hub.
        dtype: of the weights.
        attn_implementation: passed on to transformers.

    Raises:
        ModelError: files that are damaged, incomplete, of another architecture, or hold nan.
    """
    try:
        with quiet_progress_bars():
            loaded = AutoModelForCausalLM.from_pretrained(
                location,
                local_files_only=is_local,
                dtype=dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                # transformers would print a table and raise without a name; refused by name below.
                ignore_mismatched_sizes=True,
            )
    except (SafetensorError, UnpicklingError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{spec}: its weights cannot be read ({str(error).split('. ')[0]}). The file is "
            "damaged or half downloaded: copy or download the model again."
        ) from error
    model, report = cast(tuple[PreTrainedModel, Mapping[str, Iterable[object]]], loaded)
    _refuse_other_weights(spec, report)
    refuse_non_finite_weights(model, spec)
    return model


def _refuse_other_weights(spec: str, report: Mapping[str, Iterable[object]]) -> None:
    """Weights of another architecture than config.json's would be random ones in its place."""
    mismatched = cast(Iterable[tuple[str, torch.Size, torch.Size]], report["mismatched_keys"])
    for name, found, wanted in mismatched:
        raise ModelError(
            f"{spec}: the weight {name} has the shape {tuple(found)} and config.json asks for "
            f"{tuple(wanted)}, so it would be left random. Give the config.json that belongs to "
            "these weights."
        )
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ModelError(
            f"{spec} lacks {len(missing)} of the weights that its config.json asks for, such as "
            f"{missing[0]}; they would be left random. Give the complete model, or the config.json "
            "that belongs to these weights."
        )
