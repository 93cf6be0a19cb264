"""How far fp32 gradients are from fp64, packed against separate forwards.

    python bench/step_precision.py --prefix 192 --json > bench/results/step_precision.json

One step of all three channels on one state, first in fp64 with separate forwards, then in fp32
under both executors: what the rounding of one big forward costs beside that of many small ones.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from step_baselines import Setting
from step_ours import OurStep, difference_norms, gradient_errors, gradients, reference_step
from step_workload import Draw, Sizes, Workload, one_state
from torch import Tensor

from composer_replication.step.packed import score_packed
from composer_replication.step.separate import score_separately
from composer_replication.training.model_source import load_model

EXECUTORS = {"separate": score_separately, "packed": score_packed}


def measured(setting: Setting, workload: Workload, name: str) -> tuple[float, list[Tensor]]:
    """Loss and gradients of the whole step under one executor."""
    setting.model.zero_grad(set_to_none=True)
    loss = OurStep(name, setting, EXECUTORS[name]).loss(workload)
    loss.backward()
    grads = [grad.double() for grad in gradients(setting, copy=True)]
    setting.model.zero_grad(set_to_none=True)
    return float(loss.detach()), grads


def report(spec: str, sizes: Sizes) -> dict[str, Any]:
    """Errors of both executors against fp64."""
    loaded = load_model(spec)
    model = loaded.model.train()
    drawn = one_state(sizes, Draw(model.config.get_text_config().vocab_size, seed=0))
    setting = Setting(model, None, drawn.max_completion_length, drawn.counts())
    # Old and reference log-probs are those of fp64: neither executor's own rounding cancels.
    model.double()
    reference = reference_step(setting, drawn, seed=0)
    exact_loss, exact_grads = measured(setting, reference.workload, "separate")
    model.float()
    found = {name: measured(setting, reference.workload, name) for name in EXECUTORS}
    errors = {
        name: gradient_errors(difference_norms(grads, exact_grads))
        for name, (_, grads) in found.items()
    }
    ratios = [p / s for p, s in zip(errors["packed"], errors["separate"], strict=True) if s > 0]
    return {
        "model": loaded.label,
        "torch": torch.__version__,
        "workload": {key: getattr(sizes, key) for key in ("prefix", "rollouts", "action", "hint")},
        "loss_error": {
            name: abs(loss - exact_loss) / reference.loss_scale for name, (loss, _) in found.items()
        },
        "grad_error_max": {name: max(values) for name, values in errors.items()},
        "grad_error_median": {name: statistics.median(values) for name, values in errors.items()},
        "ratio_of_max": max(errors["packed"]) / max(errors["separate"]),
        "ratio_median": statistics.median(ratios),
    }


def main() -> int:
    """Print the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="embedded, hub id, folder or shape:NAME")
    add("--prefix", type=int, default=192, help="tokens of the state")
    add("--rollouts", type=int, default=4)
    add("--action", type=int, default=64)
    add("--hint", type=int, default=48)
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    sizes = Sizes(args.prefix, args.rollouts, args.action, args.hint, pairs=1)
    found = report(args.model, sizes)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for name in EXECUTORS:
        print(
            f"{name}: loss {found['loss_error'][name]:.1e}, gradient largest "
            f"{found['grad_error_max'][name]:.1e}, median {found['grad_error_median'][name]:.1e}"
        )
    print(f"packed over separate: {found['ratio_of_max']:.2f} of the largest errors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
