"""Memory and time of the fused SDPO divergence against TRL's full-logits and chunked paths.

    python bench/fused_sdpo.py --json --repeats 5

The defaults are 512 rows, hidden 1024 and vocabulary 151,936 in fp32.
Checks first that losses and gradients are equal (exit 1 if not). Memory is the peak of one forward
and backward above what inputs and libraries hold, each path in a fresh process. Time is the median
over repeats that take turns in one process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_replication.losses.sdpo import fused_generalized_jsd

BETA = 0.5
MAX_RELATIVE_ERROR = 1e-3
"""fp32: TRL's full path sums first-order terms that cancel, so its own error sets this."""

TARGETS = {"memory_vs_full": 1 / 10, "memory_vs_chunked": 1 / 2, "time_vs_chunked": 0.7}
PATHS = ("fused", "full", "chunked")
NAMES = ("loss", "grad_hidden", "grad_weight")

# glibc keeps large tiles instead of returning them to the kernel after each use: otherwise page
# faults dominate the time of every path. Read at process start, hence the re-execution.
PROCESS_ENV = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def parse_args() -> argparse.Namespace:
    """Flags of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=["compare", *PATHS], help=argparse.SUPPRESS)
    parser.add_argument("--trainable-head", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_inputs(args: argparse.Namespace, *, is_head_trainable: bool) -> tuple[Tensor, ...]:
    """Policy hidden states, head, and teacher hidden states a hint away from the policy's."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.rows, args.hidden, generator=generator)
    weight = torch.randn(args.vocab, args.hidden, generator=generator).mul_(2 * args.hidden**-0.5)
    teacher = hidden + 0.3 * torch.randn(args.rows, args.hidden, generator=generator)
    hidden, weight, teacher = (tensor.to(args.device) for tensor in (hidden, weight, teacher))
    return hidden.requires_grad_(), weight.requires_grad_(is_head_trainable), teacher


def token_divergence(path: str, hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of each row by one of the three paths."""
    if path == "fused":
        return fused_generalized_jsd(hidden, weight, teacher, weight, beta=BETA)
    if path == "chunked":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        frozen = weight.detach()
        return ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, frozen, None, BETA)[0]
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    # As SDPOTrainer._forward_logits, which divides by the temperature even at 1.
    policy_logits = (hidden @ weight.t()) / 1.0
    with torch.no_grad():
        teacher_logits = (teacher @ weight.t()) / 1.0
    return compute_full_logit_self_distillation_loss(
        policy_logits, teacher_logits, distillation_alpha=BETA
    )


def run_path(
    path: str, hidden: Tensor, weight: Tensor, teacher: Tensor
) -> tuple[Tensor | None, ...]:
    """One forward and backward: loss and the gradients of hidden and weight."""
    hidden.grad = weight.grad = None
    loss = token_divergence(path, hidden, weight, teacher).mean()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def peak_mib(args: argparse.Namespace) -> float:
    """Peak MiB above the inputs of one run of one path, in this fresh process."""
    inputs = make_inputs(args, is_head_trainable=args.trainable_head)
    tiny = argparse.Namespace(rows=8, hidden=16, vocab=32, device=args.device)
    # Libraries allocate buffers at their first call, which belong to no path.
    run_path(args.worker, *make_inputs(tiny, is_head_trainable=True))
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run_path(args.worker, *inputs)
        return (torch.cuda.max_memory_allocated() - base) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    base = status_mib("VmRSS")
    run_path(args.worker, *inputs)
    return status_mib("VmHWM") - base


def status_mib(field: str) -> float:
    """A memory field of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux.")


def relative_errors(inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Largest difference of each path from the chunked one, over the largest value."""
    errors = {}
    expected = run_path("chunked", *inputs)
    for path in ("fused", "full"):
        results = zip(NAMES, run_path(path, *inputs), expected, strict=True)
        for name, value, reference in results:
            if value is not None and reference is not None:
                gap = (value - reference).abs().max() / reference.abs().max()
                errors[f"{path}_{name}"] = gap.item()
    return errors


def median_times(args: argparse.Namespace, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of each path, taking turns so that a slow phase of the machine hits all."""
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    for _ in range(args.repeats):
        for path in PATHS:
            start = time.perf_counter()
            run_path(path, *inputs)
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[path].append(time.perf_counter() - start)
    return {path: statistics.median(values) for path, values in times.items()}


def compare(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Errors and, if the paths agree, times; in this fresh process."""
    inputs = make_inputs(args, is_head_trainable=args.trainable_head)
    errors = relative_errors(inputs)
    if max(errors.values()) > MAX_RELATIVE_ERROR:
        raise SystemExit(f"The paths disagree, so nothing was measured: {errors}")
    return {"max_relative_errors": errors, "median_s": median_times(args, inputs)}


def run_worker(args: argparse.Namespace, worker: str, *, is_head_trainable: bool) -> Any:  # noqa: ANN401 - JSON
    """What a fresh process returns: one path's peak, or the comparison of all."""
    command = [sys.executable, __file__, "--worker", worker, "--device", args.device]
    for name in ("rows", "hidden", "vocab", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    if is_head_trainable:
        command.append("--trainable-head")
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(1)
    return json.loads(done.stdout)


def measure_case(args: argparse.Namespace, *, is_head_trainable: bool) -> dict[str, Any]:
    """Errors, time and memory of one case, and the ratios that the targets are about."""
    case = run_worker(args, "compare", is_head_trainable=is_head_trainable)
    seconds = case["median_s"]
    memory = {path: run_worker(args, path, is_head_trainable=is_head_trainable) for path in PATHS}
    ratios = {
        "memory_vs_full": memory["fused"] / memory["full"],
        "memory_vs_chunked": memory["fused"] / memory["chunked"],
        "time_vs_chunked": seconds["fused"] / seconds["chunked"],
        "time_vs_full": seconds["fused"] / seconds["full"],
    }
    return case | {"peak_mib": memory, "ratios": ratios}


def print_case(name: str, case: dict[str, Any], targets: dict[str, float]) -> None:
    """One case as a table."""
    print(f"\n{name}")
    largest = max(case["max_relative_errors"].items(), key=lambda item: item[1])
    print(f"  equal within {largest[1]:.1e} of the largest value ({largest[0]})")
    print(f"  {'path':8} {'peak MiB':>9} {'median s':>9}")
    for path in PATHS:
        print(f"  {path:8} {case['peak_mib'][path]:9.0f} {case['median_s'][path]:9.2f}")
    for ratio, value in case["ratios"].items():
        target = targets.get(ratio)
        aim = "" if target is None else f"   target <= {target:.2f}"
        print(f"  {ratio:18} {value:5.3f}{aim}")


def machine_name(device: str) -> str:
    """What the numbers were measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()}-core CPU"


def main() -> int:
    """Exit 0, or 1 if the paths disagree; targets are reported, not enforced."""
    args = parse_args()
    if any(os.environ.get(name) != value for name, value in PROCESS_ENV.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PROCESS_ENV)
    if args.worker:
        print(json.dumps(compare(args) if args.worker == "compare" else peak_mib(args)))
        return 0
    report = {
        "machine": machine_name(args.device),
        "rows": args.rows,
        "hidden": args.hidden,
        "vocab": args.vocab,
        "beta": BETA,
        "targets": TARGETS,
        "frozen_head": measure_case(args, is_head_trainable=False),
        "trainable_head": measure_case(args, is_head_trainable=True),
    }
    if args.json:
        print(json.dumps(report))
    else:
        shape = f"{args.rows} rows, hidden {args.hidden}, vocabulary {args.vocab:,}, fp32"
        print(f"{report['machine']}: {shape}, beta {BETA}, forward and backward")
        print_case("frozen head", report["frozen_head"], TARGETS)
        print_case("trainable head, for information", report["trainable_head"], {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
