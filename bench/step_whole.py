"""A whole training step: sampling the rollouts, the loss step, the optimizer."""

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from step_measure import timed
from step_workload import Workload
from transformers import PreTrainedModel

from composer_replication.training.shared_prefill import shared_prefill

REPEATS = 3


def whole_step(
    model: PreTrainedModel, workload: Workload, step_s: Mapping[str, float]
) -> dict[str, Any]:
    """Seconds of sampling and of AdamW, and the share of the whole step that ours saves.

    Sampling is transformers' own, G rows of the same prompt as TRL samples them without vLLM, every
    action of the length of the longest. Ours computes that prompt once (`shared_prefill`).
    """
    prompts = torch.tensor([r.prompt_ids for r in workload.rollouts], device=model.device)
    num_tokens = workload.max_completion_length
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model.eval()

    def sample() -> None:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=True,
        )

    def sample_from_shared() -> None:
        with shared_prefill(model):
            sample()

    def optimize() -> None:
        optimizer.step()

    # The first makes the moments.
    optimize()
    seconds = {
        name: statistics.median(timed(run, model.device).wall for _ in range(REPEATS))
        for name, run in (
            ("rollout_s", sample),
            ("rollout_ours_s", sample_from_shared),
            ("optimizer_s", optimize),
        )
    }
    model.train()
    saved_s = seconds["rollout_s"] - seconds["rollout_ours_s"]
    beside = seconds["rollout_s"] + seconds["optimizer_s"]
    return seconds | {
        "saved_share": {
            name: (step_s[name] - step_s["ours"] + saved_s) / (step_s[name] + beside)
            for name in ("naive", "good")
            if name in step_s
        }
    }
