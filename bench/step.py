"""The three-channel step against what a step costs otherwise: time, memory, FLOPs, equality.

    python bench/step.py --prefix 1024 --rollouts 4 --action 64 --hint 48 --pairs 1 --json

`naive` is a padded forward with full logits for each role, `good` shares the student's forward and
uses TRL's chunked heads, `grpo_trl` is TRL's own GRPO loss alone on the same rollouts, `grpo_ours`
is ours without the other two channels, and `ours` is the whole step. A step is forward and backward
from cleared gradients, on a batch that is laid out. Loss and gradients are compared with the
`separate` executor first (exit 1 if they differ); then the steps take turns, and medians are
reported. Token ids are random.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from step_baselines import GoodStep, NaiveStep, Setting, Step, TRLStep
from step_flops import model_size
from step_measure import (
    PROCESS_ENV,
    Peaks,
    Seconds,
    free_gib,
    machine_name,
    matmul_flops_per_s,
    memory_limit,
    peaks_of,
    timed,
)
from step_ours import (
    OurStep,
    Reference,
    difference_norms,
    gradient_errors,
    gradients,
    reference_step,
    rounding_error,
    whole_gradient_error,
)
from step_whole import whole_step
from step_workload import Draw, Sizes, Workload, disjoint, one_state, trajectories

from composer_replication.errors import ComposerError, ConfigError
from composer_replication.step.packed import score_packed
from composer_replication.training.model_source import LoadedModel, load_model
from composer_replication.training.out_of_memory import is_out_of_memory
from composer_replication.training.teacher import make_teacher
from composer_replication.training.tensor_memory import tensors_in_memory

NAMES = ("naive", "good", "grpo_trl", "grpo_ours", "ours")
RATIOS = NAMES[:-1]
FLOP_RATIOS = ("naive", "good")

MAX_LOSS_ERROR = {"fp32": 1e-5, "bf16": 1e-2}
"""Of the sum of absolute row losses."""
MAX_GRAD_ERROR = {"fp32": 1e-3, "bf16": 0.12}
"""In fp32 the largest over the parameters; the smallest ones are sums of terms that cancel, so that
rounding alone moves them by 5e-5. In bf16 that of all gradients as one vector, against separate
forwards that round as much: GRPO's, where advantages cancel, is a tenth off."""

OF_ROUNDING = 2.0
"""A bf16 gradient may be further off where separate forwards are that far from fp32: two that
round independently differ by sqrt(2) of it. Measured where a gradient is, for fp32 is slow."""

OUR_EXECUTOR = score_packed
"""The one that training uses."""

POLICY_MOVE = 1e-2
"""Of each matrix's spread: how far the policy is from a teacher with weights of its own."""


@dataclass
class Result:
    """What was measured of one step."""

    max_rows: int | None
    """Rows in a forward; None: all at once."""
    peaks: Peaks
    loss_error: float
    grad_error: float
    """Largest over the parameters."""
    whole_grad_error: float
    """Of all gradients as one vector."""
    seconds: list[Seconds] = field(default_factory=list)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="embedded, hub id, folder or shape:NAME")
    add("--prefix", type=int, default=1024, help="tokens of the state, or of the task prompt")
    add("--rollouts", type=int, default=4, help="of the group")
    add("--action", type=int, default=64, help="tokens of an action (the shortest one)")
    add("--hint", type=int, default=48, help="tokens of the hint")
    add("--pairs", type=int, default=1, help="preference pairs, of each trajectory if so asked")
    add("--teacher", choices=["live", "ema", "frozen"], default="live")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--trajectories", action="store_true", help="episodes that diverge early")
    kind.add_argument("--disjoint", action="store_true", help="no rows share a first token")
    add("--turns", type=int, default=8, help="of each trajectory")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    add("--weights", choices=["fp32", "bf16"], default="fp32", help="what the weights are kept in")
    add("--checkpoint", action="store_true", help="each layer runs again in the backward")
    add("--variants", nargs="+", choices=NAMES, default=NAMES)
    add("--repeats", type=int, default=3, help="timed rounds, after one untimed")
    add("--max-rows", type=int, help="of a baseline's forward; default: the most that fit")
    add("--memory-gib", type=float, help="the most to use; default: what is free, less a tenth")
    add("--whole-step", action="store_true", help="also time sampling and the optimizer")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse sizes that make no step.

    Raises:
        ConfigError: naming the flag.
    """
    lowest = {"prefix": 2, "rollouts": 2, "action": 1, "hint": 1, "pairs": 0, "turns": 2}
    for name, bound in (lowest | {"repeats": 1}).items():
        value = getattr(args, name)
        if value < bound:
            raise ConfigError(
                f"--{name} is {value}; a step to measure needs at least {bound}. Raise --{name}."
            )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, and torch finds no such device. Leave it out.")
    for name in ("max_rows", "memory_gib"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}; nothing runs in that. Give more than 0, "
                "or leave it out."
            )
    if "ours" not in args.variants:
        raise ConfigError(
            "--variants leaves out ours, and every ratio is to it. Add ours to --variants."
        )
    if args.weights == "bf16" and args.precision == "fp32":
        raise ConfigError(
            "--weights bf16 rounds every product, so there is no fp32 step to measure. Add "
            "--precision bf16."
        )
    if args.whole_step and (args.trajectories or args.disjoint):
        raise ConfigError(
            "--whole-step samples actions at one state, which trajectories and disjoint rows do "
            "not have. Drop one of the flags."
        )


def make_workload(args: argparse.Namespace, vocab_size: int) -> Workload:
    """The step batch that the flags describe."""
    sizes = Sizes(args.prefix, args.rollouts, args.action, args.hint, args.pairs, args.turns)
    make = trajectories if args.trajectories else disjoint if args.disjoint else one_state
    return make(sizes, Draw(vocab_size, args.seed))


def make_setting(
    args: argparse.Namespace,
    loaded: LoadedModel,
    workload: Workload,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Setting:
    """The model in training, its teacher, and the counts of the whole step."""
    model = loaded.model.to(args.device).train()
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own_teacher = None
    if args.teacher != "live":
        teacher = make_teacher(args.teacher, model, autocast, ema_rate=0.05, has_adapters=False)
        move(model, args.seed)
        teacher.update()
        own_teacher = teacher.open
    return Setting(model, own_teacher, workload.max_completion_length, workload.counts())


@torch.no_grad()
def move(model: torch.nn.Module, seed: int) -> None:
    """Move every matrix a little at random, as some optimizer steps would have."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(noise * (POLICY_MOVE * weight.std()))


def make_steps(args: argparse.Namespace, loaded: LoadedModel, setting: Setting) -> list[Step]:
    """The variants that were asked for, in the order they take turns."""
    makers: dict[str, Callable[[], Step]] = {
        "naive": lambda: NaiveStep(setting),
        "good": lambda: GoodStep(setting),
        "grpo_trl": lambda: TRLStep(
            setting, loaded.tokenizer, args.rollouts, bf16=args.precision == "bf16"
        ),
        "grpo_ours": lambda: OurStep("grpo_ours", setting, OUR_EXECUTOR, ("grpo",)),
        "ours": lambda: OurStep("ours", setting, OUR_EXECUTOR),
    }
    return [makers[name]() for name in NAMES if name in args.variants]


class Bench:
    """Runs steps on one workload."""

    def __init__(self, args: argparse.Namespace, loaded: LoadedModel) -> None:
        self.args = args
        self.device = torch.device(args.device)
        given = args.memory_gib
        self.limit_gib = 0.9 * free_gib(self.device) if given is None else given
        config = loaded.model.config.get_text_config()
        workload = make_workload(args, config.vocab_size)
        self.setting = make_setting(args, loaded, workload, self._autocast)
        self.size = model_size(self.setting.model)
        progress("scoring each row alone with the separate executor")
        with self._autocast():
            self.reference: Reference = reference_step(self.setting, workload, args.seed)
        self.rounding: dict[str, float | None] = {}
        self.workload = self.reference.workload
        self.steps = make_steps(args, loaded, self.setting)
        self.results: dict[str, Result] = {}
        self.left_out: dict[str, str] = {}
        """Why each baseline that is not timed is not."""
        # Weights, those of the teacher, and the reference's gradients.
        self.held = tensors_in_memory()

    def _autocast(self) -> AbstractContextManager[object]:
        is_bf16 = self.args.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)

    def run(self, step: Step, max_rows: int | None) -> float:
        """Forward and backward of the whole step; returns its loss."""
        total = torch.zeros((), device=self.device)
        for part in self._parts(step, max_rows):
            with self._autocast():
                loss = step.loss(part)
            loss.backward()
            total += loss.detach()
        return float(total)

    def _parts(self, step: Step, max_rows: int | None) -> list[Workload]:
        whole = self.workload
        if step.channels == ("grpo",):
            whole = Workload(whole.rollouts, (), ())
        return list(whole.parts(max_rows))

    def try_out(self, step: Step) -> None:
        """The untimed round: how many rows fit, the peak, and the errors.

        Raises:
            SystemExit: our own step does not fit.
        """
        if isinstance(step, OurStep):
            if not self._fits(step, None):
                raise SystemExit(
                    f"{step.name} does not fit in {self.limit_gib:.1f} GiB. Nothing was timed. "
                    "Raise --memory-gib, or lower --prefix or --rollouts."
                )
            return
        fits = self.args.max_rows
        fails = None
        while not self._fits(step, fits):
            if fits == 1:
                self.leave_out(step, "not even one row in a forward fits")
                return
            # The whole step at once did not fit: each role by itself, then fewer rows.
            fits, fails = 2 * self.args.rollouts if fits is None else fits // 2, fits
            progress(f"{step.name} does not fit; at most {fits} rows in a forward")
        # The most rows between what fits and what does not; the last that fits is kept.
        while fits is not None and fails is not None and fails - fits > 1:
            rows = (fits + fails) // 2
            fits, fails = (rows, fails) if self._fits(step, rows) else (fits, rows)

    def _fits(self, step: Step, max_rows: int | None) -> bool:
        """Run the step with so many rows a forward; where that fits, it is the step's result."""
        self.setting.model.zero_grad(set_to_none=True)
        losses: list[float] = []
        try:
            with memory_limit(self.limit_gib, self.device):
                peaks = peaks_of(
                    lambda: losses.append(self.run(step, max_rows)), self.device, self.held
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        channels = "+".join(step.channels)
        norms = difference_norms(
            gradients(self.setting, copy=False), self.reference.grads[channels]
        )
        loss_error = abs(losses[0] - self.reference.loss[channels]) / self.reference.loss_scale
        self.results[step.name] = Result(
            max_rows,
            peaks,
            loss_error,
            max(gradient_errors(norms)),
            whole_gradient_error(norms),
        )
        return True

    def rounding_of(self, step: Step) -> float | None:
        """How far separate forwards of its channels are from fp32; None: that did not fit."""
        channels = "+".join(step.channels)
        if channels not in self.rounding:
            progress(f"{channels}: separate forwards in fp32, to see what rounding does")
            self.rounding[channels] = rounding_error(self.setting, self.reference, channels)
        return self.rounding[channels]

    def leave_out(self, step: Step, why: str) -> None:
        """Take a baseline out of what is timed."""
        progress(f"{step.name} is left out: {why}")
        self.steps.remove(step)
        self.results.pop(step.name, None)
        self.left_out[step.name] = why

    def time(self, step: Step) -> None:
        """One timed run."""
        result = self.results[step.name]
        self.setting.model.zero_grad(set_to_none=True)
        result.seconds.append(timed(lambda: self.run(step, result.max_rows), self.device))

    def flops(self, step: Step) -> float:
        """What one run of the step computes."""
        parts = self._parts(step, self.results[step.name].max_rows)
        return self.size.flops([forward for part in parts for forward in step.work(part)])

    def tokens(self, step: Step) -> int:
        """Tokens that one run puts through the model, padding included."""
        parts = self._parts(step, self.results[step.name].max_rows)
        return sum(forward.tokens for part in parts for forward in step.work(part))


def measure(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """The whole report.

    Raises:
        SystemExit: losses or gradients differ, so nothing was timed.
    """
    # As runs in bf16 have it: a head's fp32 products then use tensor cores too.
    torch.set_float32_matmul_precision("high" if args.precision == "bf16" else "highest")
    bench = Bench(args, loaded)
    for step in list(bench.steps):
        progress(f"{step.name}: untimed round")
        bench.try_out(step)
    refuse_unequal(bench)
    for repeat in range(args.repeats):
        for step in bench.steps:
            bench.time(step)
            progress(f"round {repeat}: {step.name} {bench.results[step.name].seconds[-1].wall:.2f}")
    report = summary(bench, loaded.label)
    if args.whole_step:
        report["whole_step"] = whole_step(bench.setting.model, bench.workload, report["step_s"])
    return report


def refuse_unequal(bench: Bench) -> None:
    """Stop before a wrong step is timed.

    A baseline of which only memory keeps from telling whether it is wrong or rounded is left out.

    Raises:
        SystemExit: a step is further off than rounding explains.
    """
    precision = bench.args.precision
    for step in list(bench.steps):
        result = bench.results[step.name]
        error = result.grad_error if precision == "fp32" else result.whole_grad_error
        most = MAX_GRAD_ERROR[precision]
        if precision == "bf16" and error > most:
            rounding = bench.rounding_of(step)
            if rounding is None and not isinstance(step, OurStep):
                bench.leave_out(step, f"{error:.1e} off, and fp32 does not fit")
                continue
            most = max(most, OF_ROUNDING * (rounding or 0.0))
        progress(
            f"{step.name}: loss error {result.loss_error:.1e}, gradient {error:.1e} of {most:.1e}"
        )
        if not (result.loss_error <= MAX_LOSS_ERROR[precision] and error <= most):
            raise SystemExit(
                f"{step.name} differs from the separate executor: loss {result.loss_error:.1e}, "
                f"gradient {error:.1e}. Nothing was timed."
            )


def summary(bench: Bench, label: str) -> dict[str, Any]:
    """Medians, ratios and what they were measured on."""
    args, results, device = bench.args, bench.results, bench.device
    step_s = {name: statistics.median(s.wall for s in r.seconds) for name, r in results.items()}
    cpu_s = {name: statistics.median(s.processor for s in r.seconds) for name, r in results.items()}
    flops = {step.name: bench.flops(step) for step in bench.steps}
    compared = [name for name in RATIOS if name in results]
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    kind = "trajectories" if args.trajectories else "disjoint" if args.disjoint else "one state"
    sizes = ("prefix", "rollouts", "action", "hint", "pairs", "turns")
    flags = (*sizes, "teacher", "precision", "weights", "checkpoint")
    return {
        "machine": machine_name(device),
        "torch": torch.__version__,
        "model": label,
        "workload": {"kind": kind} | {flag: getattr(args, flag) for flag in flags},
        "repeats": args.repeats,
        "step_s": step_s,
        "step_s_all": {name: [s.wall for s in r.seconds] for name, r in results.items()},
        "processor_s": cpu_s,
        "peak_gib": {name: r.peaks.process for name, r in results.items()},
        "peak_above_model_gib": {name: r.peaks.above_model for name, r in results.items()},
        "peak_tensor_gib": {name: r.peaks.tensors for name, r in results.items()},
        "left_out": bench.left_out,
        "rows_per_forward": {name: r.max_rows for name, r in results.items()},
        "ratios": {name: step_s[name] / step_s["ours"] for name in compared},
        "processor_ratios": {name: cpu_s[name] / cpu_s["ours"] for name in compared},
        "flops": flops,
        "flops_per_s": {name: flops[name] / step_s[name] for name in results},
        "matmul_flops_per_s": matmul_flops_per_s(
            device, dtype, bench.setting.model.config.get_text_config().hidden_size
        ),
        "flops_limit_ratio": {
            name: flops[name] / flops["ours"] for name in FLOP_RATIOS if name in results
        },
        "loss_error": results["ours"].loss_error,
        "grad_error_vs_separate": results["ours"].grad_error,
        "loss_errors": {name: r.loss_error for name, r in results.items()},
        "grad_errors": {name: r.grad_error for name, r in results.items()},
        "whole_grad_errors": {name: r.whole_grad_error for name, r in results.items()},
        "rounding_errors": bench.rounding,
        "tokens": {step.name: bench.tokens(step) for step in bench.steps},
    }


def print_report(report: dict[str, Any]) -> None:
    """Answer first, then the table."""
    ratios = report["ratios"]
    line = ", ".join(f"{value:.2f}x {name}" for name, value in ratios.items())
    print(f"ours takes {report['step_s']['ours']:.2f} s; the others take {line}")
    limits = report["flops_limit_ratio"].items()
    print("FLOPs allow " + ", ".join(f"{value:.2f}x {name}" for name, value in limits))
    sizes = ", ".join(f"{name} {value}" for name, value in report["workload"].items())
    print(f"{report['model']} on {report['machine']}: {sizes}")
    print(f"{'step':10} {'s':>7} {'GiB above model':>16} {'tokens':>8} {'GFLOP/s':>8} {'rows':>5}")
    for name, seconds in report["step_s"].items():
        rows = report["rows_per_forward"][name]
        print(
            f"{name:10} {seconds:7.2f} {report['peak_above_model_gib'][name]:16.2f} "
            f"{report['tokens'][name]:8} {report['flops_per_s'][name] / 1e9:8.1f} "
            f"{'all' if rows is None else rows:>5}"
        )
    print(f"loss error {report['loss_error']:.1e}, ", end="")
    print(f"gradient error {report['grad_error_vs_separate']:.1e} against the separate executor")
    for name, rows in report["rows_per_forward"].items():
        if rows is not None:
            print(f"{name} ran in micro-batches of at most {rows} rows in a forward")
    for name, why in report["left_out"].items():
        print(f"{name} is left out: {why}")


def progress(text: str) -> None:
    """A line for who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Exit 0, 1 if the steps disagree, or 2 for flags and models that cannot be used."""
    if any(os.environ.get(name) != value for name, value in PROCESS_ENV.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PROCESS_ENV)
    try:
        args = parse_args()
        dtype = torch.bfloat16 if args.weights == "bf16" else torch.float32
        loaded = load_model(args.model, dtype=dtype, on_progress=progress)
    except ComposerError as error:
        print(error, file=sys.stderr)
        return 2
    given = [word for word in sys.argv[1:] if word != "--json"]
    report = {"command": shlex.join(["python", "bench/step.py", *given])} | measure(args, loaded)
    if args.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
