"""The memory that a plan states, three ways: by formula, simulated, and measured.

    python bench/plan_memory.py measured     # real steps on this CPU against their simulation
    python bench/plan_memory.py grid         # formulas against the simulation, no real step
    python bench/plan_memory.py peer         # the steps that a peer's planner gave figures for
    python bench/plan_memory.py speed        # seconds of whole plans, imports included
    python bench/plan_memory.py cuda         # real steps on this GPU, and whether they fit the plan
    python bench/plan_memory.py cuda --simulate   # their simulation, later and without a GPU

Each part is written to `bench/results/plan_memory_PART.json` and goes on where it was cut off:
`--cpu-s 50` stops after 50 seconds of the CPU; of `cuda`, `--seconds 50` after 50 on the clock.
Formulas of the grid are always computed anew.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from plan_memory_cuda import simulate_part, write_part
from plan_memory_page import (
    EMBEDDED,
    RANDOM_SHAPES,
    peer_settings,
    row_key,
    settings_of,
    stored_case,
)
from step_measure import machine_name
from torch.profiler import ProfilerActivity, profile

from composer_replication.experiments.case_step import (
    CaseStep,
    case_policy,
    case_tensors,
    wrapped_policy,
)
from composer_replication.experiments.simulate import measure, simulate
from composer_replication.planner.memory import predict
from composer_replication.planner.model_files import EMBEDDED_SPEC
from composer_replication.planner.step_case import StepCase
from composer_replication.training.model_source import load_model
from composer_replication.units import gib

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NUM_GRID = 56
NUM_CUT = 12
NUM_WHOLE = 22
"""Of them with any mixture of channels; the others have one alone, which simulates in seconds."""
SHAPES = ("shape:qwen2.5-0.5b", "shape:qwen2.5-1.5b", "shape:qwen2.5-7b")

ROWS = {
    "num_rollouts": 4, "prompt_tokens": 96, "completion_tokens": 32,
    "num_sites": 2, "state_tokens": 120, "hint_tokens": 24, "action_tokens": 20,
    "num_pairs": 2, "pair_state_tokens": 110, "pair_action_tokens": 18,
}  # fmt: skip
TURNS = {"num_prompts": 2, "num_sites": 4, "num_rollout_sites": 4, "state_tokens": 100}
LONG = ROWS | {"num_rollouts": 2, "prompt_tokens": 120, "completion_tokens": 40}

QWEN2, LLAMA, QWEN3 = RANDOM_SHAPES
PACKED = {"executor": "packed"}
MEASURED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (EMBEDDED, ROWS, {"teacher": "ema"}),
    (EMBEDDED, ROWS, {"teacher": "live"} | PACKED),
    (EMBEDDED, ROWS, {"teacher": "frozen", "lora_r": 8}),
    (EMBEDDED, ROWS, {"teacher": "ema", "checkpoints": True} | PACKED),
    (QWEN2, LONG, {"teacher": "ema", "checkpoints": True}),
    (QWEN2, LONG, {"teacher": "live", "autocasts": True} | PACKED),
    (QWEN2, ROWS, {"teacher": "frozen", "autocasts": True, "optimizer": "adamw_torch"}),
    (LLAMA, LONG, {"teacher": "live", "accumulates": True}),
    (LLAMA, ROWS, {"teacher": "frozen"} | PACKED),
    (LLAMA, ROWS, {"lora_r": 16, "weights_dtype": "bfloat16", "autocasts": True}),
    (QWEN3, LONG, {"teacher": "ema", "optimizer": "sgd"} | PACKED),
    (QWEN3, LONG, {"weights_dtype": "bfloat16", "optimizer": "adafactor"}),
    (QWEN3, ROWS, {"num_pairs": 0, "teacher": "live", "checkpoints": True, "autocasts": True}),
    (QWEN2, LONG, {"num_sites": 0, "lora_r": 8, "checkpoints": True} | PACKED),
    (EMBEDDED, ROWS | TURNS, {"teacher": "frozen"} | PACKED),
    (EMBEDDED, ROWS, {"teacher": "ema", "tree_max_tokens": 400} | PACKED),
    (QWEN2, LONG, {"teacher": "live", "autocasts": True, "tree_max_tokens": 250} | PACKED),
    (QWEN3, LONG, {"lora_r": 8, "checkpoints": True, "tree_max_tokens": 300} | PACKED),
]


def measured_row(name: str, case: StepCase, _known: dict[str, Any]) -> dict[str, Any]:
    """A real step beside its simulation; random shapes beside the allocator's events too."""
    is_embedded = name == EMBEDDED
    real = measure(case, _policy(case, is_embedded))
    simulated, formula = simulate(case), predict(case)
    return {
        "measured_gib": real.peak_gib,
        "simulated_gib": simulated.peak_gib,
        "formula_gib": formula.peak_gib,
        "allocator_gib": None if is_embedded else _allocator_peak_gib(case),
        "peak_phase": real.peak_phase,
    }


def grid_row(_name: str, case: StepCase, known: dict[str, Any]) -> dict[str, Any]:
    """The formulas beside the simulation, which is not run again where it is known."""
    row = {key: known[key] for key in ("simulated_gib", "simulated_phase") if key in known}
    if not row:
        simulated = simulate(case)
        row = {"simulated_gib": simulated.peak_gib, "simulated_phase": simulated.peak_phase}
    formula = predict(case)
    return row | {"formula_gib": formula.peak_gib, "formula_phase": formula.peak_phase}


def measured_cases() -> list[tuple[str, StepCase]]:
    """Steps small enough to run here: the embedded model and random shapes."""
    return [(name, StepCase(settings_of(name), **(rows | more))) for name, rows, more in MEASURED]


def grid_cases() -> list[tuple[str, StepCase]]:
    """Configurations drawn at random, the same ones each time; and trees over their budget."""
    draw = random.Random(0)
    cases: list[tuple[str, StepCase]] = []
    while len(cases) < NUM_GRID:
        name = draw.choice([*SHAPES, EMBEDDED])
        rows = {
            "num_rollouts": draw.choice([1, 2, 4]),
            "prompt_tokens": draw.choice([64, 256, 768, 2048]),
            "completion_tokens": draw.choice([32, 64, 128]),
            "num_sites": draw.choice([0, 1, 2]),
            "state_tokens": draw.choice([64, 256, 1024]),
            "hint_tokens": draw.choice([16, 64]),
            "action_tokens": draw.choice([16, 64]),
            "num_pairs": draw.choice([0, 1, 2]),
            "pair_state_tokens": draw.choice([64, 256, 1024]),
            "pair_action_tokens": draw.choice([16, 64]),
        }
        if len(cases) >= NUM_WHOLE:
            rows |= dict.fromkeys(("num_rollouts", "num_sites", "num_pairs"), 0)
            rows[draw.choice(["num_rollouts", "num_rollouts", "num_sites", "num_pairs"])] = 2
        precision = draw.choice(["fp32", "autocast", "bf16"])
        options: dict[str, Any] = {
            "teacher": draw.choice(["live", "ema", "frozen"]),
            "executor": draw.choice(["separate", "packed"]),
            "weights_dtype": "bfloat16" if precision == "bf16" else "float32",
            "autocasts": precision == "autocast",
            "checkpoints": draw.random() < 0.5,
            "accumulates": draw.random() < 0.25,
            "lora_r": draw.choice([None, None, 8, 32]),
            "optimizer": draw.choice(
                ["adamw_torch_fused", "adamw_torch_fused", "adamw_torch", "sgd"]
            ),
        }
        if options["lora_r"] is not None and precision == "bf16":
            options["autocasts"] = True
        cases.append((name, StepCase(settings_of(name), **rows, **options)))
    return cases + cut_cases()


def cut_cases() -> list[tuple[str, StepCase]]:
    """Trees that are cut into two to eight parts, by every teacher and precision."""
    draw = random.Random(1)
    cases: list[tuple[str, StepCase]] = []
    for number in range(NUM_CUT):
        name = draw.choice(SHAPES)
        precision = draw.choice(["fp32", "autocast", "bf16"])
        lora_r = draw.choice([None, 16])
        state_tokens = draw.choice([192, 208])
        case = StepCase(
            settings_of(name),
            num_rollouts=draw.choice([24, 32]),
            num_prompts=draw.choice([1, 2, 4]),
            prompt_tokens=192,
            completion_tokens=draw.choice([64, 128]),
            num_sites=2,
            num_rollout_sites=draw.choice([0, 2]),
            state_tokens=state_tokens,
            hint_tokens=48,
            action_tokens=48,
            num_pairs=draw.choice([0, 2]),
            pair_state_tokens=draw.choice([192, 256]),
            pair_action_tokens=48,
            teacher=("live", "ema", "frozen")[number % 3],
            executor="packed",
            tree_max_tokens=draw.choice([1536, 2560]),
            weights_dtype="bfloat16" if precision == "bf16" else "float32",
            autocasts=precision == "autocast" or (precision == "bf16" and lora_r is not None),
            checkpoints=number % 4 == 0,
            accumulates=draw.random() < 0.25,
            lora_r=lora_r,
        )
        cases.append((name, case))
    return cases


def simulate_peer(path: Path) -> None:
    """Our figures beside a peer's, which its own package printed for the same steps."""
    found = json.loads(path.read_text(encoding="utf-8"))
    for row in found["rows"]:
        case = StepCase(settings_of(row["model"]), **peer_settings(row))
        row["simulated_gib"] = simulate(case).peak_gib
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


PLANS = {
    "a plan by formula": ["configs/train_qwen2.5_7b.toml"],
    "--simulate, 0.5B, one place": ["docs/note_smoke.toml", "--on=modal", "--gpu=L4", "--simulate"],
    "--simulate, 7B, this machine and every card of Modal": [
        "configs/train_qwen2.5_7b.toml",
        "--simulate",
    ],
}
"""What `plan` is given."""
_PLAN_REPEATS = 3


def plan_seconds() -> dict[str, Any]:
    """Processes that plan and end, start and imports included.

    On a machine with other work the clock says more of that than of this: their own CPU is beside.
    """
    rows: dict[str, dict[str, list[float]]] = {
        name: {"walls_s": [], "cpus_s": []} for name in PLANS
    }
    for _ in range(_PLAN_REPEATS):
        for name, arguments in PLANS.items():
            command = [sys.executable, "-m", "composer_replication", "plan", *arguments]
            started_s, before = time.perf_counter(), os.times()
            done = subprocess.run(command, check=False, capture_output=True, cwd=ROOT)
            rows[name]["walls_s"].append(time.perf_counter() - started_s)
            after = os.times()
            user_s = after.children_user - before.children_user
            system_s = after.children_system - before.children_system
            rows[name]["cpus_s"].append(user_s + system_s)
            # 1: nothing fits.
            assert done.returncode in (0, 1), done.stderr.decode()
    return {"machine": machine_name(torch.device("cpu")), "plans": rows}


def _policy(case: StepCase, is_embedded: bool) -> torch.nn.Module:
    if not is_embedded:
        return case_policy(case, device="cpu")
    dtype = getattr(torch, case.weights_dtype)
    return wrapped_policy(case, load_model(EMBEDDED_SPEC, dtype=dtype).model)


def _allocator_peak_gib(case: StepCase) -> float:
    """The peak of a step by the CPU allocator's events, kernels' own scratch memory included."""
    built = CaseStep(case, case_tensors(case), case_policy(case, device="cpu"))
    parts = [*built.policy.parameters(), *built.policy.buffers(), *built.tensors.values()]
    seen = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    stays = built.persistent_bytes()
    held = sum(seen.values()) + sum(stays.values()) - stays["weights"]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        built.loss().backward()
        built.update()
    assert recorded.profiler is not None
    kineto = recorded.profiler.kineto_results
    assert kineto is not None
    peak = held
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return gib(peak)


def main() -> None:
    """Write one part's results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["measured", "grid", "peer", "speed", "cuda"])
    parser.add_argument("--cpu-s", type=float, default=float("inf"), help="stop after this")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="the same of cuda")
    parser.add_argument("--simulate", action="store_true", help="of cuda: no step, only this")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    path = RESULTS / f"plan_memory_{options.part}.json"
    if options.part == "cuda":
        work = simulate_part if options.simulate else write_part
        work(path, seconds=options.seconds)
        return
    if options.part == "speed":
        path.write_text(json.dumps(plan_seconds(), indent=1) + "\n", encoding="utf-8")
        return
    if options.part == "peer":
        simulate_peer(path)
        return
    known: dict[str, dict[str, Any]] = {}
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        known = {row_key(row): row for row in rows}
    is_grid = options.part == "grid"
    make = grid_row if is_grid else measured_row
    for name, case in grid_cases() if is_grid else measured_cases():
        row: dict[str, Any] = {"model": name, "case": stored_case(case)}
        key = row_key(row)
        if key not in known and time.process_time() > options.cpu_s:
            continue
        if is_grid or key not in known:
            known[key] = row | make(name, case, known.get(key, {}))
            print(json.dumps(known[key]), flush=True)
        path.write_text(json.dumps({"rows": [*known.values()]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
