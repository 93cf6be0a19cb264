"""What README.md says was measured, from the stored results of `bench/`."""

import json
from pathlib import Path
from typing import Any

from plan_memory_page import enough_gib, formula_error, planned_gib, stored

from composer_replication.experiments.evidence_claims import untried_drifts
from composer_replication.experiments.evidence_report import Cell, load_cells

RESULTS = Path(__file__).resolve().parent / "results"


def headline_lines() -> list[str]:
    """One point each for cost, memory and learning; what failed is told with what held."""
    return ["", *_step_lines(), *_memory_lines(), *_evidence_lines(), ""]


def _step_lines() -> list[str]:
    names = ("one_state_trl", "cuda_05b", "cuda_05b_32k", "cuda_7b")
    on_cpu, on_gpu, of_long, of_large = (_report(f"step_{name}") for name in names)
    rate = of_large["flops_per_s"]["ours"] / of_large["matmul_flops_per_s"]
    return [
        f"- **A step**: all three channels take {_share(on_cpu)} of TRL's GRPO step alone on a "
        f"{on_cpu['machine']}",
        f"  ({_sizes(on_cpu)}) and {_share(on_gpu)} on an",
        f"  {on_gpu['machine']} ({_sizes(on_gpu)}),",
        f"  {_share(of_long)} there with {of_long['workload']['prefix']:,} tokens and "
        f"{of_long['workload']['rollouts']} rollouts, {_share(of_large)} on an",
        f"  {of_large['machine']} ({_sizes(of_large)}),",
        f"  where it computes at {rate:.0%} of a bf16 matrix product's rate;",
        "  loss and gradients are compared first "
        "([docs/performance.md](docs/performance.md)).",
    ]  # fmt: skip


def _report(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _share(report: dict[str, Any]) -> str:
    return f"{1 / report['ratios']['grpo_trl']:.2f}"


def _sizes(report: dict[str, Any]) -> str:
    load = report["workload"]
    model = report["model"].removesuffix(" (embedded)").replace(" shape (random weights)", " shape")
    return f"{model}, {load['prefix']} tokens of state, {load['rollouts']} rollouts"


def _memory_lines() -> list[str]:
    rows = [row for row in stored("cuda") if row["reserved_gib"] is not None]
    errors = [formula_error(row) for row in rows]
    devices = sorted({row["device"] for row in rows})
    num_within = sum(enough_gib(row) <= planned_gib(row) for row in rows)
    return [
        f"- **A plan**: its formulas are {min(errors):+.1%} to {max(errors):+.1%} off the tensors "
        f"of {len(rows)} steps on an",
        f"  {' and '.join(devices)}; {num_within} ran in what is planned for them, margins "
        "included",
        "  ([docs/planner.md](docs/planner.md)).",
    ]


def _evidence_lines() -> list[str]:
    cells, _ = load_cells(RESULTS / "evidence")
    found = {cell.arm: cell for cell in cells if cell.task == "api_drift" and cell.drift == 0}
    arms = {"grpo": "GRPO alone", "sdpo": "GRPO + SDPO", "all": "all three channels"}
    rates = ", ".join(f"{title} {_rate(found[arm])}" for arm, title in arms.items())
    controls = {
        "shuffled_hint": "with the hints of other tools",
        "wrong_hint": "with hints that name a wrong key",
        "live_teacher": "with a live teacher",
    }
    others = untried_drifts(cells)
    untuned = ", ".join(f"{cell.rate()[0]:.0%}" for cell in others)
    refuted = [f"{title} {_rate(found[arm])}" for arm, title in controls.items() if arm in found]
    lines = [
        "- **Learning**: held-out calls that are right, on a task where the model starts at "
        f"{_rate(found['base'])}:",
        f"  {rates}",
    ]  # fmt: skip
    if refuted:
        lines[-1] += ";"
        lines.append(f"  {', '.join(refuted)}")
    lines[-1] += "."
    if others:
        lines.append(
            f"  All three on {len(others)} drifts that no setting was chosen on: {untuned}."
        )
    return [*lines, "  Not every target is met: [docs/evidence.md](docs/evidence.md)."]


def _rate(cell: Cell) -> str:
    number = len(cell.results)
    return f"{cell.rate()[0]:.0%} ({number} seed{'s' if number > 1 else ''})"
