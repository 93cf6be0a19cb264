"""Whole training runs of a tiny model: the tensors of a step, sampling included, beside the plan.

    python bench/plan_memory_runs.py            # about 5 minutes on one core

Runs differ in what their settings add to a step. The plan is computed with the lengths that the
step had: what is compared is the formula, and not how long its rows were taken to be. Written to
`bench/results/plan_memory_runs.json`, and goes on where it was cut off.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from composer_replication.config.loading import load_config
from composer_replication.experiments import train
from composer_replication.planner.candidate import Candidate
from composer_replication.planner.run_memory import run_memory
from composer_replication.planner.run_shape import RunShape
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.training.embedded_model import embedded_model_dir
from composer_replication.training.trainer import ComposerReplicationTrainer

RESULT = Path(__file__).parent / "results" / "plan_memory_runs.json"
MODEL = "llama 6 x 256, vocabulary 49,152"
BASE = [
    "grpo.max_steps=2", "grpo.per_device_train_batch_size=4", "grpo.num_generations=4",
    "grpo.max_completion_length=96", "grpo.save_strategy=no", "rollout.max_turns=2",
    "rollout.max_action_tokens=48", "dpo.pairs_per_step=2", "alpha_sdpo=0", "guards.enabled=false",
]  # fmt: skip
_ALONE = ["tree=always", "beta_replay=0"]
_SMALL = [*_ALONE, "lora.r=8", "grpo.gradient_checkpointing=true"]
RUNS = [
    ["tree=off", "beta_replay=0"],
    _ALONE,
    [*_ALONE, "diagnostics.gradients_every=1"],
    [*_ALONE, "lora.r=8", "diagnostics.gradients_every=1"],
    ["tree=always", "diagnostics.gradients_every=1"],
    ["tree=always", "grpo.beta=0.1"],
    [*_SMALL, "grpo.gradient_accumulation_steps=16"],
    [*_SMALL, "grpo.gradient_accumulation_steps=16", "grpo.beta=0.1"],
]
"""Without hint sites, which share prefixes with rollouts by chance."""


def measured_run(options: list[str], model: str) -> dict[str, Any]:
    """The peak of the second step's tensors, and the plan's for rows of those lengths."""
    with tempfile.TemporaryDirectory() as folder, _lengths() as lengths, _plan() as planned:
        with RunDirectory.create(Path(folder) / "run", resume=False) as run:
            config = load_config(None, [f"model={model}", *BASE, *options])
            summary = train.run_train(config, run, Console(stderr=True, quiet=True))
        memory = run_memory(_with_lengths(planned[0].shape, lengths), 1)
    return {
        "options": options,
        "measured_gib": summary.peak_tensor_gib,
        "planned_gib": memory.peak_tensor_gib,
        "phase": memory.peak_phase,
    }


def _with_lengths(shape: RunShape, lengths: dict[str, int]) -> RunShape:
    pair = lengths.get("dpo_chosen_input_ids", 0)
    case = replace(
        shape.case,
        prompt_tokens=lengths["prompt_ids"],
        completion_tokens=lengths["completion_ids"],
        pair_state_tokens=pair - shape.case.pair_action_tokens,
    )
    rollouts = replace(
        shape.rollouts,
        prompt_tokens=lengths["prompt_ids"],
        sampled_tokens=lengths["completion_ids"],
    )
    return replace(shape, case=case, rollouts=rollouts)


@contextmanager
def _lengths() -> Iterator[dict[str, int]]:
    """The longest rows of the second step, by the name of their tensor."""
    found: dict[str, int] = {}
    whole = ComposerReplicationTrainer._compute_loss

    def noting(
        self: ComposerReplicationTrainer, model: nn.Module, inputs: dict[str, Tensor]
    ) -> Tensor:
        if self.state.global_step == 1:
            for name, tensor in inputs.items():
                if isinstance(tensor, Tensor) and tensor.dim() == 2:
                    found[name] = max(found.get(name, 0), tensor.shape[1])
        return whole(self, model, inputs)

    with mock.patch.object(ComposerReplicationTrainer, "_compute_loss", noting):
        yield found


@contextmanager
def _plan() -> Iterator[list[Candidate]]:
    """The plan that a run writes."""
    found: list[Candidate] = []
    write = train.write_planned

    def noting(*arguments: Any) -> Candidate | None:  # noqa: ANN401
        planned = write(*arguments)
        assert planned is not None, "a Llama is known"
        found.append(planned)
        return planned

    with mock.patch.object(train, "write_planned", noting):
        yield found


def tiny_model(folder: str) -> None:
    """Random weights and SmolLM2's tokenizer in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Measure what the results lack."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    with tempfile.TemporaryDirectory() as model:
        tiny_model(model)
        for options in RUNS:
            if any(row["options"] == options for row in rows):
                continue
            rows.append(measured_run(options, model))
            print(json.dumps(rows[-1]), flush=True)
            RESULT.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
