"""The tables of docs/planner.md on memory: measured, simulated and by formula."""

import json
from pathlib import Path
from typing import Any

from composer_replication.planner.memory import predict
from composer_replication.planner.model_files import EMBEDDED_SPEC, model_settings
from composer_replication.planner.step_case import StepCase

RESULTS = Path(__file__).parent / "results"
EMBEDDED = "SmolLM2-135M (embedded)"

RANDOM_SHAPES: dict[str, dict[str, Any]] = {
    "qwen2 8 x 256": {
        "model_type": "qwen2", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "initializer_range": 0.02,
    },
    "llama 6 x 384": {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024,
        "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
        "tie_word_embeddings": False, "initializer_range": 0.02,
    },
    "qwen3 5 x 320": {
        "model_type": "qwen3", "vocab_size": 12000, "hidden_size": 320, "intermediate_size": 960,
        "num_hidden_layers": 5, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64,
        "tie_word_embeddings": True, "initializer_range": 0.02,
    },
}  # fmt: skip


def settings_of(model: str) -> dict[str, Any]:
    """The architecture behind a name of the results."""
    if model in RANDOM_SHAPES:
        return RANDOM_SHAPES[model]
    return dict(model_settings(EMBEDDED_SPEC if model == EMBEDDED else model))


def case_of(row: dict[str, Any]) -> StepCase:
    """The case of a stored row."""
    return StepCase(settings_of(row["model"]), **row["case"])


def stored(part: str) -> list[dict[str, Any]]:
    """The rows of one part of bench/plan_memory.py."""
    path = RESULTS / f"plan_memory_{part}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def formula_errors() -> list[float]:
    """Formula over simulation, less 1, for each case of the grid."""
    return [predict(case_of(row)).peak_gib / row["simulated_gib"] - 1 for row in stored("grid")]


def memory_lines() -> list[str]:
    """Measured steps, then the grid in a sentence."""
    rows = [
        "| model | what differs | measured, GiB | simulated | by formula |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in stored("measured"):
        measured = row["measured_gib"]
        simulated = row["simulated_gib"] / measured - 1
        formula = predict(case_of(row)).peak_gib / measured - 1
        rows.append(
            f"| {row['model']} | {_options(row['case'])} | {measured:.3f} | {simulated:+.2%} "
            f"| {formula:+.1%} |"
        )
    errors = formula_errors()
    return [
        "",
        *rows,
        "",
        f"Over a grid of {len(errors)} other configurations (0.1B to 7B, both executors, every",
        f"teacher, full and LoRA) the formulas are {min(errors):+.1%} to {max(errors):+.1%} off",
        "the simulation.",
        "",
        *_peer_lines(),
        "",
    ]


def _peer_lines() -> list[str]:
    """A closed-form planner of another project on the same steps."""
    rows = [
        "AgileRL's closed-form estimate (`agilerl-arena` 1.29.0, its tensors without overhead and",
        "allocator reserve) for GRPO alone, LoRA r 16 on a bf16 base, beside ours for a card:",
        "",
        "| model | rows x tokens | checkpointing | AgileRL, GiB | simulated | by formula |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in stored("peer"):
        case = StepCase(settings_of(row["model"]), **peer_settings(row))
        rows.append(
            f"| {row['model']} | {row['rows']} x {row['tokens']} "
            f"| {'yes' if row['checkpoints'] else 'no'} | {row['peer_tensor_gib']:.2f} "
            f"| {row['simulated_gib']:.2f} | {predict(case).peak_gib:.2f} |"
        )
    note = (
        "",
        "It keeps a copy of the adapter, holds an fp32 copy of the head while it computes losses,",
        "and scores other tiles: each figure is for its own trainer, and none was measured.",
    )
    return [*rows, *note]


def peer_settings(row: dict[str, Any]) -> dict[str, Any]:
    """The step that the peer's figure is for: completions of 256 tokens."""
    return {
        "num_rollouts": row["rows"],
        "prompt_tokens": row["tokens"] - 256,
        "completion_tokens": 256,
        "lora_r": 16,
        "weights_dtype": "bfloat16",
        "autocasts": True,
        "checkpoints": row["checkpoints"],
        "device_type": "cuda",
    }


def _options(case: dict[str, Any]) -> str:
    sizes = ("num_", "_tokens")
    found = [
        name if value is True else f"{name} {value}"
        for name, value in case.items()
        if not (name.startswith(sizes[0]) or name.endswith(sizes[1]))
    ]
    return ", ".join(found) or "defaults"
