"""How the FLOPs of the step grow with prefix, rollouts and action length: counted, nothing runs.

    python bench/step_growth.py --json

The counts are those of `bench/step.py`, for the embedded model and for two shapes.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from step_baselines import GoodStep, NaiveStep, Setting, trl_forwards
from step_flops import Forward, model_size
from step_ours import OurStep
from step_workload import Draw, Sizes, Workload, one_state, trajectories
from transformers import AutoModelForCausalLM, PreTrainedModel

from composer_replication.step.packed import score_packed
from composer_replication.training.model_source import model_facts

MODELS = ("smollm2-135m", "shape:qwen2.5-0.5b", "shape:qwen2.5-7b")
BASE = Sizes(prefix=1024, rollouts=4, action=64, hint=48, pairs=1)
GROWTH = {
    "prefix": (256, 1024, 4096, 16384),
    "rollouts": (2, 4, 8, 16),
    "action": (16, 64, 256, 512),
}


def empty_model(spec: str) -> PreTrainedModel:
    """The architecture without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_facts(spec).config)


def work_of(workload: Workload, model: PreTrainedModel, *, is_live: bool) -> dict[str, list]:
    """The forwards of every step; TRL's as on CUDA, where its head scores completions alone."""
    own_teacher = None if is_live else lambda: nullcontext(model)
    setting = Setting(model, own_teacher, workload.max_completion_length, workload.counts())
    ours = OurStep("ours", setting, score_packed)
    grpo = OurStep("grpo_ours", setting, score_packed, ("grpo",))
    return {
        "naive": NaiveStep(setting).work(workload),
        "good": GoodStep(setting).work(workload),
        "grpo_trl": trl_forwards(workload, is_cpu=False),
        "grpo_ours": grpo.work(workload),
        "ours": ours.work(workload),
    }


def cases() -> Iterator[tuple[str, Sizes]]:
    """What grows, and the sizes."""
    for what, values in GROWTH.items():
        for value in values:
            yield what, replace(BASE, **{what: value})
    yield "trajectories", replace(BASE, prefix=512, hint=48)


def counted(spec: str) -> list[dict[str, Any]]:
    """A row for each case and kind of teacher."""
    model = empty_model(spec)
    size = model_size(model)
    rows = []
    for what, sizes in cases():
        make = trajectories if what == "trajectories" else one_state
        workload = make(sizes, Draw(model.config.vocab_size, seed=0))
        for teacher in ("live", "ema"):
            work: dict[str, list[Forward]] = work_of(workload, model, is_live=teacher == "live")
            flops = {name: size.flops(forwards) for name, forwards in work.items()}
            tokens = {name: sum(f.tokens for f in forwards) for name, forwards in work.items()}
            ratios = {name: flops[name] / flops["ours"] for name in flops if name != "ours"}
            load = {name: getattr(sizes, name) for name in ("prefix", "rollouts", "action")}
            rows.append(
                {"what": what, **load, "teacher": teacher, "tokens": tokens}
                | {"tflops_ours": flops["ours"] / 1e12, "ratios": ratios}
            )
    return rows


def main() -> int:
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    report = {spec: counted(spec) for spec in MODELS}
    if as_json:
        print(json.dumps(report, indent=1))
        return 0
    for spec, rows in report.items():
        print(spec)
        for row in rows:
            ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
            sizes = f"P {row['prefix']:6} G {row['rollouts']:3} b {row['action']:4}"
            print(f"  {row['what']:12} {sizes} {row['teacher']:5} {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
