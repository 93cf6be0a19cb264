"""A float64 policy and one hand-built step batch with all three channels."""

import dataclasses

import pytest
import torch

from composer_replication import ComposerDataCollator, HintSite, Message, PreferencePair, StepBatch
from composer_replication.batch.batches import Rollout
from composer_replication.step.settings import GRPOSettings, StepSettings

STATE = (Message("system", "You call tools."), Message("user", "Read /src/app.py."))
OTHER = (Message("user", "List the files of /src, all of them please."),)


@pytest.fixture
def policy(tiny_llama):
    return tiny_llama(dtype=torch.float64, seed=1).train()


@pytest.fixture
def reference(tiny_llama):
    return tiny_llama(dtype=torch.float64, seed=2)


@pytest.fixture
def collator(smollm2_tokenizer):
    return ComposerDataCollator(smollm2_tokenizer)


@pytest.fixture
def settings():
    return StepSettings(grpo=GRPOSettings(max_completion_length=8, temperature=0.8))


@pytest.fixture
def batch():
    rollouts = (
        Rollout((5, 6, 7), (8, 9, 10, 11), (True, True, False, True), advantage=0.75),
        Rollout((5, 6), (12, 13), (True, True), advantage=-0.75),
    )
    sites = (
        HintSite(STATE, 'Use "file".', '{"path": 1}', source="a"),
        HintSite(OTHER, "Paths are absolute, and a flag is needed.", '{"dir": "src"}', source="b"),
    )
    pairs = (
        PreferencePair(STATE, '{"file": 1}', '{"path": 1}', 1.0, -40.0, -38.0, "a"),
        PreferencePair(OTHER, '{"dir": "/src"}', "no", 0.5, -55.0, -9.0, "b"),
    )
    return StepBatch(rollouts, sites, pairs)


@pytest.fixture
def halves(batch):
    """The same records in two micro-batches of one each."""
    return [
        dataclasses.replace(
            batch,
            rollouts=batch.rollouts[i : i + 1],
            hint_sites=batch.hint_sites[i : i + 1],
            pairs=batch.pairs[i : i + 1],
        )
        for i in range(2)
    ]
