"""The tables of docs/planner.md on memory: measured, simulated and by formula."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from composer_replication.planner.memory import predict
from composer_replication.planner.model_files import EMBEDDED_SPEC, model_settings
from composer_replication.planner.run_memory import device_gib
from composer_replication.planner.step_case import StepCase

RESULTS = Path(__file__).parent / "results"
NUM_CUDA_CASES = 22
SHARES = {"fits_planned": 1.0, "fits_93": 0.93, "fits_85": 0.85}
"""Of the total planned for a step, what the allocator was held to; the largest first."""
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


def stored_case(case: StepCase) -> dict[str, Any]:
    """What of a case is not the default, its model aside."""
    names = [name for name in StepCase.__dataclass_fields__ if name != "model"]
    defaults = StepCase({})
    found = {name: getattr(case, name) for name in names}
    return {name: value for name, value in found.items() if value != getattr(defaults, name)}


def row_key(row: dict[str, Any]) -> str:
    """The same for rows of the same step."""
    return json.dumps([row["model"], row["case"]], sort_keys=True)


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
        *_speed_lines(),
        *_run_lines(),
        *cuda_lines(RESULTS / "plan_memory_cuda.json"),
        *_peer_lines(),
        "",
    ]


def _speed_lines() -> list[str]:
    """How long a plan takes."""
    report = json.loads((RESULTS / "plan_memory_speed.json").read_text(encoding="utf-8"))
    found = [
        f"{name} {statistics.median(row['walls_s']):.1f} s" for name, row in report["plans"].items()
    ]
    return [
        f"Seconds of the whole command on a {report['machine']} without other work, imports",
        "included, medians of three (`bench/plan_memory.py speed`):",
        f"{'; '.join(found)}.",
        "",
    ]


def _run_lines() -> list[str]:
    """Whole runs whose settings add something to the step."""
    rows = [
        "Whole training runs of a random Llama (6 layers x 256, vocabulary 49,152, 4 rollouts of",
        "96 tokens a micro-batch) on a CPU, for what settings add to a step: all tensors of the",
        "second step, sampling included (`bench/plan_memory_runs.py`).",
        "",
        "| settings | largest while | measured, GiB | by formula |",
        "| --- | --- | --- | --- |",
    ]
    for row in stored("runs"):
        error = row["planned_gib"] / row["measured_gib"] - 1
        rows.append(
            f"| {', '.join(f'`{option}`' for option in row['options'])} | {row['phase']} "
            f"| {row['measured_gib']:.3f} | {error:+.1%} |"
        )
    return [*rows, ""]


def cuda_lines(path: Path) -> list[str]:
    """Steps on a GPU beside what a plan states for them; nothing before any was measured."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if row["allocated_gib"] is not None]
    table = [
        "| model | rows | what differs | planned, GiB | reserved | tensors | by formula "
        "| simulated | ran within |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_cuda_row(row) for row in rows),
    ]
    errors = [formula_error(row) for row in rows]
    greedy = max(rows, key=lambda row: used_gib(row) / enough_gib(row))
    held_out = [row for row in rows if math.isclose(row["planned_total_gib"], planned_gib(row))]
    over = [planned_gib(row) / enough_gib(row) - 1 for row in rows]
    devices = " and ".join(sorted({f"{row['device']} (torch {row['torch']})" for row in rows}))
    num_failed = sum(row["error"] is not None for row in found["rows"])
    return [
        f"{len(rows)} of {NUM_CUDA_CASES} steps on one {devices}. The",
        f"formulas are {min(errors):+.1%} to {max(errors):+.1%} off their tensors. The simulation "
        "refuses the step whose",
        "attention keeps scores. *Reserved* is what torch's allocator took without a limit, CUDA's",
        "own share included. Each step ran again with the allocator held to what a plan stated",
        "then, to 93 and to 85 % of it: the last column has the least that was enough. Today's",
        f"totals are {min(over):+.1%} to {max(over):+.1%} of what was enough by either: none says "
        "*fits* where the step",
        f"did not. {len(held_out)} steps were measured after the margins had been set: "
        f"{sum(bool(row['fits_planned']) for row in held_out)} ran within",
        f"their totals, {sum(bool(row['fits_93']) for row in held_out)} within 93 % of them. "
        "Where a card has room the allocator may take more than",
        f"it needs: {used_gib(greedy):.1f} GiB for a step that runs in {enough_gib(greedy):.1f}.",
        *([f"An error ended {num_failed}."] if num_failed else []),
        "",
        *table,
        "",
    ]


def _cuda_row(row: dict[str, Any]) -> str:
    allocated = row["allocated_gib"]
    simulated = row["simulated_gib"]
    beside = "" if simulated is None else f"{simulated / allocated - 1:+.1%}"
    differs = {name: value for name, value in row["case"].items() if name != "device_type"}
    return (
        f"| {row['model']} | {_rows(row['case'])} | {_options(differs)} "
        f"| {planned_gib(row):.1f} | {used_gib(row):.1f} | {allocated:.1f} "
        f"| {formula_error(row):+.1%} | {beside} | {_least_total(row)} |"
    )


def planned_total_gib(case: StepCase) -> float:
    """What a plan states for a run of this step: its tensors and the device's own share."""
    tensors_gib = predict(case).peak_gib
    return tensors_gib + sum(device_gib(case, tensors_gib).values())


def planned_gib(row: dict[str, Any]) -> float:
    """What a plan states for a measured step."""
    return planned_total_gib(case_of(row))


def used_gib(row: dict[str, Any]) -> float:
    """What it took of the card, blocks that nothing uses included."""
    return row["reserved_gib"] + row["context_gib"]


def enough_gib(row: dict[str, Any]) -> float:
    """The least total known to be enough for it: what it took, or was held to when that was less.

    Without a limit torch's allocator keeps whatever it once asked for.
    """
    return min([used_gib(row), *_totals_that_ran(row)])


def _totals_that_ran(row: dict[str, Any]) -> list[float]:
    """What the allocator was held to while the step ran."""
    return [share * row["planned_total_gib"] for name, share in SHARES.items() if row[name]]


def formula_error(row: dict[str, Any]) -> float:
    """The formulas over the tensors that were measured on a GPU, less 1."""
    return predict(case_of(row)).peak_gib / row["allocated_gib"] - 1


def _rows(case: dict[str, Any]) -> str:
    """Rollouts, hint sites and pairs by number and tokens."""
    parts = [
        ("num_rollouts", "prompt_tokens", "completion_tokens", "rollouts"),
        ("num_sites", "state_tokens", "action_tokens", "sites"),
        ("num_pairs", "pair_state_tokens", "pair_action_tokens", "pairs"),
    ]
    return ", ".join(
        f"{case[number]} {name} of {case[state]} + {case[action]}"
        for number, state, action, name in parts
        if case.get(number)
    )


def _least_total(row: dict[str, Any]) -> str:
    """The least total that was tried and was enough."""
    if row["fits_planned"] is None:
        return "not tried"
    enough = _totals_that_ran(row)
    return f"{min(enough):.1f}" if enough else f"more than {row['planned_total_gib']:.1f}"


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
    sizes = [name for name in case if name.startswith("num_") or name.endswith("_tokens")]
    found = [
        name if value is True else f"{name} {value}"
        for name, value in case.items()
        if name not in sizes or name == "tree_max_tokens"
    ]
    return ", ".join(found) or "defaults"
