"""Attention of one layer over a step's prefix tree on CUDA: ours against what else there is.

    python bench/tree_attention.py --prefix 4096 --heads 28 --kv-heads 4 --head-size 128 --json

- `rows`: torch's flash attention on each sequence by itself, without padding.
- `flex`: compiled FlexAttention with the tree's block mask. Making the mask, once a step, and
  compiling, once a run, are timed apart.
- `ours`: the tree's rectangles in a few launches of the flash kernel.

Forward and backward in bf16 on random queries, keys and values. Outputs and gradients are compared
with the plain kernel in fp32 first (exit 1 if one is off by more than 2 %), then they take turns.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from step_baselines import SIDES, pair_rows, rollout_rows
from step_measure import machine_name, timed
from step_workload import Draw, Sizes, Workload, one_state
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from composer_replication.step.rectangle_kernels import Scoring
from composer_replication.step.rectangles import RectangleAttention, rectangles_of
from composer_replication.step.tree_attention import RectangleKernel
from composer_replication.step.trie import PrefixTree

DEVICE = torch.device("cuda")
MAX_ERROR = 2e-2
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of queries `[1, H, T, D]`, keys and values `[1, K, T, D]`; returns `[1, T, H, D]`."""


def parse_args() -> argparse.Namespace:
    """Flags of this benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefix", type=int, default=4096, help="tokens of the state")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--action", type=int, default=256, help="tokens of the shortest action")
    parser.add_argument("--hint", type=int, default=48)
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--variants", nargs="+", default=["rows", "flex", "ours"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def sequences_of(workload: Workload) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Every row of the step, the teacher's too."""
    rows = rollout_rows(workload) + [row for side in SIDES for row in pair_rows(workload, side)]
    rows += [(site.hinted, site.action) for site in workload.sites]
    return [np.array([*context, *action], np.int64) for context, action in rows]


class Variants:
    """The ways to compute the attention of one tree."""

    def __init__(self, tree: PrefixTree, scoring: Scoring) -> None:
        self._tree = tree
        self._scoring = scoring
        self._kernel = RectangleKernel(tree, DEVICE)
        self._rows = [torch.from_numpy(rows).to(DEVICE) for rows in tree.rows]
        self._mask: Any = None
        self._compiled: Any = None

    def ours(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As in training."""
        return self._kernel(query, key, value, self._scoring)

    def rows(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each sequence alone; a shared token's output is that of the last one through it."""
        output = torch.empty_like(query.transpose(1, 2))
        for rows in self._rows:
            alone = functional.scaled_dot_product_attention(
                query[:, :, rows],
                key[:, :, rows],
                value[:, :, rows],
                is_causal=True,
                scale=self._scoring.scale,
                enable_gqa=True,
            )
            output = output.index_copy(1, rows, alone.transpose(1, 2))
        return output

    def flex(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compiled FlexAttention; `make_mask` comes first."""
        output = self._compiled(
            query, key, value, block_mask=self._mask, scale=self._scoring.scale, enable_gqa=True
        )
        return output.transpose(1, 2)

    def make_mask(self) -> None:
        """The block mask of the tree."""
        reach = self._tree.reach.to(DEVICE)

        def is_visible(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return (column <= row) & (row < reach[column])

        num_rows = self._tree.num_rows
        self._mask = create_block_mask(is_visible, None, None, num_rows, num_rows, device="cuda")
        self._compiled = self._compiled or torch.compile(flex_attention, dynamic=False)

    def exact(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The plain kernel, in the inputs' precision."""
        by_group = query[0].unflatten(0, (key.shape[1], -1))
        positions = self._tree.positions.to(DEVICE)
        plan = rectangles_of(self._tree)
        output: Tensor = RectangleAttention.apply(  # pyright: ignore
            by_group, key[0], value[0], positions, plan, self._scoring
        )
        return output.flatten(1, 2).unsqueeze(0)


def results(attention: Attention, tensors: list[Tensor], output_grad: Tensor) -> list[Tensor]:
    """Output and gradients."""
    output = attention(*tensors)
    return [output, *torch.autograd.grad(output, tensors, output_grad)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole report.

    Raises:
        SystemExit: a variant is wrong.
    """
    torch.manual_seed(0)
    workload = one_state(
        Sizes(args.prefix, args.rollouts, args.action, args.hint, pairs=1), Draw(50_000, 0)
    )
    sequences = sequences_of(workload)
    tree = PrefixTree(sequences)
    variants = Variants(tree, Scoring(args.head_size**-0.5))
    tensors = [
        torch.randn(1, tree.num_rows, heads, args.head_size, device=DEVICE, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    ]
    output_grad = torch.randn_like(tensors[0].transpose(1, 2))
    ways: dict[str, Attention] = {name: getattr(variants, name) for name in args.variants}
    in_fp32 = [tensor.detach().float().requires_grad_() for tensor in tensors]
    exact = results(variants.exact, in_fp32, output_grad.float())
    compile_s = 0.0
    errors: dict[str, float] = {}
    for name, way in ways.items():
        started_s = time.perf_counter()
        if name == "flex":
            variants.make_mask()
        found = results(way, tensors, output_grad)
        torch.cuda.synchronize()
        if name == "flex":
            compile_s = time.perf_counter() - started_s
        errors[name] = max(
            float((mine.detach().float() - want).norm() / want.norm())
            for mine, want in zip(found, exact, strict=True)
        )
        if errors[name] > MAX_ERROR:
            raise SystemExit(f"{name} is off by {errors[name]:.1e}. Nothing was timed.")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            seconds[name].append(
                timed(lambda: results(way, tensors, output_grad), DEVICE).wall  # noqa: B023
            )
    median_s = {name: statistics.median(times) for name, times in seconds.items()}
    pairs = sum(int(tree.positions[run.start : run.stop].sum()) for run in tree.runs)
    flops = 3 * 4 * args.heads * args.head_size * (pairs + tree.num_rows)
    report: dict[str, Any] = {
        "machine": machine_name(DEVICE),
        "torch": torch.__version__,
        "sizes": {
            name: getattr(args, name)
            for name in (
                "prefix", "rollouts", "action", "hint", "heads", "kv_heads", "head_size", "repeats"
            )
        },
        "tree_rows": tree.num_rows,
        "sequence_tokens": sum(map(len, sequences)),
        "layer_s": median_s,
        "ratios": {name: value / median_s["ours"] for name, value in median_s.items()},
        "tree_flops_per_s": flops / median_s["ours"],
        "errors": errors,
    }  # fmt: skip
    if "flex" in ways:
        mask_s = min(timed(variants.make_mask, DEVICE).wall for _ in range(3))
        report |= {"flex_mask_s": mask_s, "flex_compile_s": compile_s}
    return report


def main() -> int:
    """Print the report; 2 without CUDA."""
    args = parse_args()
    if not torch.cuda.is_available():
        print("bench/tree_attention.py compares CUDA kernels; there is no CUDA device.")
        return 2
    report = measure(args)
    if args.json:
        print(json.dumps(report))
        return 0
    for name, value in report["layer_s"].items():
        print(f"{name:5} {1e3 * value:8.2f} ms  {report['ratios'][name]:.2f}x ours")
    return 0


if __name__ == "__main__":
    sys.exit(main())
