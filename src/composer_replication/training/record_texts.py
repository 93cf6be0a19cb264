"""The texts of a batch's records as one tensor beside its rows, for files that people read.

TRL hands a step nothing but tensors, and the plan inside a checkpoint is tensors too, so the texts
travel as UTF-8 bytes.
"""

import json
from typing import TypedDict, cast

import torch

from composer_replication.batch.batches import StepBatch
from composer_replication.batch.collate import ComposerDataCollator, StepTensors

RECORD_TEXTS = "record_texts"


class SiteTexts(TypedDict):
    """What a hint site's row does not say itself."""

    source: str
    hint: str


class RecordTexts(TypedDict):
    """One entry for each hint site and each pair, in the order of the rows."""

    sites: list[SiteTexts]
    pair_sources: list[str]


class RecordTextCollator(ComposerDataCollator):
    """`ComposerDataCollator` with one more tensor, `record_texts`."""

    def __call__(self, batch: StepBatch) -> StepTensors:
        """The tensors of one step batch, texts included; raises what its parent raises."""
        texts: RecordTexts = {
            "sites": [{"source": site.source, "hint": site.hint} for site in batch.hint_sites],
            "pair_sources": [pair.source for pair in batch.pairs],
        }
        encoded = bytearray(json.dumps(texts), "utf-8")
        return {
            **super().__call__(batch),
            RECORD_TEXTS: torch.frombuffer(encoded, dtype=torch.uint8),
        }


def record_texts(tensors: StepTensors) -> RecordTexts:
    """The texts that `RecordTextCollator` put in; empty ones where another collator planned."""
    if RECORD_TEXTS not in tensors:
        # A run resumed inside a generation, whose first start wrote no credit.
        num_sites = len(tensors["input_ids"]) if "input_ids" in tensors else 0
        num_pairs = len(tensors.get("dpo_pair_weights", ()))
        return {
            "sites": [{"source": "", "hint": ""} for _ in range(num_sites)],
            "pair_sources": [""] * num_pairs,
        }
    encoded = bytes(tensors[RECORD_TEXTS].cpu().tolist())
    return cast(RecordTexts, json.loads(encoded.decode("utf-8")))
