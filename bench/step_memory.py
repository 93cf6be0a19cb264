"""Peak memory of the tensors of each step, counted on tensors without memory: nothing is computed.

    python bench/step_memory.py --json

The steps of `bench/step.py` at full depth, whatever this machine could hold. TRL's own loss reads
numbers off its tensors, so it has no such count.
"""

import argparse
import gc
import json
import sys
import warnings
from dataclasses import replace
from typing import Any

from step_baselines import GoodStep, NaiveStep, Setting, Step
from step_growth import empty_model
from step_ours import OurStep
from step_workload import Draw, Sizes, Workload, forget_layouts, one_state
from transformers import PreTrainedModel

from composer_replication.experiments.case_step import materialize
from composer_replication.experiments.fake_floats import FakeFloatsMemory
from composer_replication.step.packed import score_packed
from composer_replication.units import gib

MODEL = "smollm2-135m"
CASES = {
    "one state": Sizes(prefix=1024, rollouts=4, action=64, hint=48, pairs=1),
}


def with_sampler(workload: Workload) -> Workload:
    """Rollouts with log-probs of their sampler, as a step has them."""
    rollouts = (replace(r, old_logp=(0.0,) * len(r.completion_ids)) for r in workload.rollouts)
    return replace(workload, rollouts=tuple(rollouts))


def steps_of(setting: Setting) -> list[Step]:
    """All but TRL's own."""
    return [
        NaiveStep(setting),
        GoodStep(setting),
        OurStep("grpo_ours", setting, score_packed, ("grpo",)),
        OurStep("ours", setting, score_packed),
    ]


def peak_gib(model: PreTrainedModel, workload: Workload) -> dict[str, float]:
    """GiB above the weights at each step's peak, gradients included.

    Args:
        model: on the meta device; its weights are made here.
        workload: at once, without micro-batches.
    """
    peaks: dict[str, float] = {}
    with warnings.catch_warnings(), FakeFloatsMemory() as memory:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        materialize(model)
        model.train()
        setting = Setting(model, None, workload.max_completion_length, workload.counts())
        for step in steps_of(setting):
            model.zero_grad(set_to_none=True)
            forget_layouts()
            gc.collect()
            before = memory.live_bytes
            memory.restart_peak()
            step.loss(with_sampler(workload)).backward()
            peaks[step.name] = gib(memory.restart_peak() - before)
    forget_layouts()
    return peaks


def counted() -> list[dict[str, Any]]:
    """A row for each case."""
    rows = []
    for name, sizes in CASES.items():
        model = empty_model(MODEL)
        workload = one_state(sizes, Draw(model.config.vocab_size, seed=0))
        load = {key: getattr(sizes, key) for key in ("prefix", "rollouts", "action")}
        rows.append({"case": name, **load, "peak_tensor_gib": peak_gib(model, workload)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Print one JSON object, or a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    rows = counted()
    if as_json:
        print(json.dumps({"model": MODEL, "cases": rows}, indent=1))
        return 0
    for row in rows:
        peaks = ", ".join(f"{name} {peak:.2f}" for name, peak in row["peak_tensor_gib"].items())
        print(f"{row['case']}: P {row['prefix']}, G {row['rollouts']}: {peaks} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
