"""What `--solve` says of each place: the value, what binds beyond it, and what sets it."""

import re

import pytest

from composer_replication.config.loading import load_config
from composer_replication.planner.hardware import parse_gpu
from composer_replication.planner.plan import Planner, PlanRequest
from composer_replication.planner.prices import shipped_prices
from composer_replication.planner.solving import solve

TRAIN = ["model=shape:qwen2.5-0.5b", "grpo.max_steps=10", "grpo.num_generations=4",
         "grpo.per_device_train_batch_size=4"]  # fmt: skip
FIXED = ["model=shape:qwen2.5-0.5b", "smoke.fixed_shapes=[2, 1024]"]


@pytest.mark.parametrize(
    ("gpu", "key", "overrides", "pattern"),
    [
        ("L4", "max_length", [*TRAIN, "grpo.gradient_checkpointing=true"],
            r"^L4: max_length = (\d+) is the largest that fits, all else as it is; the next needs "
            r"2[23]\.\d\d of 22\.03 GiB in the \w+( \w+)?\. "
            r"Set batch\.max_context_tokens = \1, and take prompts of at most \d+ tokens beside "
            r"completions of 512$"),
        ("L4", "max_length", [*TRAIN, "grpo.max_completion_length=20000"],
            r"max_context_tokens = \d+ and grpo\.max_completion_length = \d+, and take prompts"),
        ("L4", "max_length", FIXED, r"Set smoke\.fixed_shapes = \[2, \d+\]$"),
        ("L4", "grpo.per_device_train_batch_size", TRAIN, r"fits, all else as it is; the next "),
        ("L4", "evaluation.prompts", TRAIN, r"^L4: memory sets no limit to evaluation\.prompts$"),
        ("T4", "max_length", TRAIN, r"^T4: no bf16, whatever max_length is$"),
        ("L4", "lora.r", [*TRAIN, "model=shape:qwen2.5-7b", "lora.r=8",
                          "grpo.per_device_train_batch_size=64"],
            r"^L4: no lora\.r fits: the smallest takes \d+\.\d\d of 22\.03 GiB, most of it in "),
        ("H100", "modal.retries", TRAIN, r"modal\.retries = 10 .*; no run takes a larger one$"),
    ],
)  # fmt: skip
def test_a_solved_line_says_what_binds_and_what_to_set(gpu, key, overrides, pattern, machine):
    request = PlanRequest(load_config(None, overrides), on="modal", gpu=parse_gpu(gpu))
    planner = Planner(request, machine(), prices=shipped_prices())
    (solved,) = solve(planner, key, planner.candidates())
    assert re.search(pattern, solved.text), solved.text
