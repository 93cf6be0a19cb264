"""Language-model heads applied tile by tile, so [tokens, vocabulary] never exists in full.

Letters: N rows (tokens), n rows of one tile, H hidden size, V vocabulary. Log-probabilities and
entropies are in nats. Projections and sums run in fp32 whatever the inputs' precision (fp64 stays
fp64): rounding logits to bf16 moves a divergence of nearly equal distributions by 10 % and more.
"""

from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from composer_replication.errors import ConfigError, DataError

CPU_TILE_ROWS = 64
"""Rows projected at once on a CPU: 37 MiB of fp32 logits at a vocabulary of 151,936. Twice as many
took 1.5 times the memory and were 8 % faster; half as many were 1.5 times slower."""

GPU_TILE_ROWS = 512
"""297 MiB at that vocabulary. Each tile reads the whole head, so a GPU needs many rows to compute
rather than load; not measured yet."""

_CAST_ROWS = 16_384
"""Vocabulary rows of a half-precision head upcast at once: 64 MiB at hidden size 1024."""

_MOST_ALIKE: ContextVar[int | None] = ContextVar("most_alike", default=None)
"""Tiles of a kind that are walked; None: all. See `alike_tiles_skipped`."""


@dataclass(frozen=True, eq=False, slots=True)
class OutputHead:
    """An LM head: `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`.

    Example: Gemma 2 is `OutputHead(weight, softcap=30.0)`.

    Source: soft-capping, Gemma 2, arXiv:2408.00118 section 2.
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    logit_scale: float = 1.0
    """Multiplies the logits before the soft cap (Cohere, Granite)."""
    softcap: float | None = None
    """Logits stay within +-softcap; None: no cap."""

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigError(
                f"softcap is {self.softcap}; a cap of 0 or less leaves no logits. "
                "Pass the model's final_logit_softcapping, or None."
            )

    def logits(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """Differentiable fp32 logits (fp64 for fp64 input) of a few rows: this builds [n, V]."""
        dtype = compute_dtype(hidden, self.weight)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            raw = torch.nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)
            scaled = raw * self.logit_scale
            if self.softcap is None:
                return scaled
            return self.softcap * torch.tanh(scaled / self.softcap)


@overload
def selected_logp(
    hidden: Float[Tensor, "N H"],
    head: OutputHead | Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    tile_rows: int | None = None,
) -> Float[Tensor, " N"]: ...
@overload
def selected_logp(
    hidden: Float[Tensor, "N H"],
    head: OutputHead | Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    tile_rows: int | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]: ...
def selected_logp(
    hidden: Float[Tensor, "N H"],
    head: OutputHead | Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    tile_rows: int | None = None,
) -> Float[Tensor, " N"] | tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probability of each row's target token in nats, and the entropy of each row if asked.

    Both are fp32 and differentiable in hidden, weight and bias; the backward recomputes each tile.
    A row whose logits are not finite (nan hidden states of padding) gets no gradient.

    Args:
        hidden: final hidden states, after the last norm.
        head: the LM head, or its weight alone.
        targets: token ids in [0, V); drop ignored rows before the call.
        temperature: logits are divided by it, as the sampler did.
        return_entropy: also return the entropy of softmax(logits / temperature).
        tile_rows: rows projected at once; memory grows with it. None: by device.

    Raises:
        ConfigError: temperature or tile_rows is not positive.
        DataError: hidden size and head do not match.

    Source: log softmax; entropy gradient dH/dz_v = -p_v (log p_v + H).
    """
    head = as_head(head)
    check_temperature(temperature)
    num_tile_rows = tile_rows_for(hidden, tile_rows)
    check_projection("hidden", hidden, head)
    outputs = _SelectedLogp.apply(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        hidden, head.weight, head.bias, targets, head, temperature, num_tile_rows, return_entropy
    )
    logp, entropy = cast("tuple[Tensor, Tensor]", outputs)
    return (logp, entropy) if return_entropy else logp


def as_head(head: OutputHead | Tensor) -> OutputHead:
    """A bare weight is a head without bias, scale or cap."""
    return OutputHead(head) if isinstance(head, Tensor) else head


def check_temperature(temperature: float) -> None:
    """Raise when logits cannot be divided by this temperature."""
    if not temperature > 0:
        raise ConfigError(
            f"temperature is {temperature}; logits are divided by it, so it must be above 0. "
            "Pass the temperature that the rollouts were sampled with."
        )


def tile_rows_for(hidden: Tensor, tile_rows: int | None) -> int:
    """The given number of rows, or what suits the device."""
    if tile_rows is None:
        return CPU_TILE_ROWS if hidden.device.type == "cpu" else GPU_TILE_ROWS
    if tile_rows < 1:
        raise ConfigError(
            f"tile_rows is {tile_rows}; a tile needs at least one row. Pass 1 or more."
        )
    return tile_rows


def check_projection(name: str, hidden: Tensor, head: OutputHead) -> None:
    """Raise when these rows cannot go through this head."""
    if hidden.shape[-1] != head.weight.shape[1]:
        raise DataError(
            f"{name} has hidden size {hidden.shape[-1]} but its head takes "
            f"{head.weight.shape[1]}; they cannot be multiplied. Pass the model's own head."
        )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 when an input is fp64 (gradcheck), fp32 otherwise."""
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def tiles(
    num_rows: int, tile_rows: int, kind_of: Callable[[int], Hashable] = lambda _: None
) -> Iterator[slice]:
    """Slices that cover `num_rows` rows, `tile_rows` at a time.

    Args:
        num_rows: of all tiles.
        tile_rows: of each but the last.
        kind_of: of a tile by its number; tiles of equal length and kind allocate alike.
    """
    most_alike, walked = _MOST_ALIKE.get(), Counter[Hashable]()
    for tile, start in enumerate(range(0, num_rows, tile_rows)):
        stop = min(start + tile_rows, num_rows)
        if most_alike is not None:
            kind = (stop - start, kind_of(tile))
            walked[kind] += 1
            if walked[kind] > most_alike:
                continue
        yield slice(start, stop)


@contextmanager
def alike_tiles_skipped() -> Generator[None]:
    """Walk two tiles of each kind and leave out the others, whose values stay unset.

    For tensors that have sizes and no values: what a step allocates, its first two alike tiles say.
    The second of them meets what the first left behind, as every later one would.
    """
    token = _MOST_ALIKE.set(2)
    try:
        yield
    finally:
        _MOST_ALIKE.reset(token)


def tempered_logits(
    hidden: Float[Tensor, "n H"], head: OutputHead, temperature: float
) -> Float[Tensor, "n V"]:
    """Logits over temperature of one tile, for use inside an autograd function (no graph)."""
    logits = _project(hidden, head.weight)
    if head.bias is not None:
        logits += head.bias
    if head.logit_scale != 1:
        logits *= head.logit_scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    if temperature != 1:
        logits /= temperature
    return logits


def projection_slope(
    logits: Float[Tensor, "n V"], head: OutputHead, temperature: float
) -> Float[Tensor, "n V"] | float:
    """d(tempered logits) / d(hidden @ weight.T): a number unless the head has a soft cap."""
    scale = head.logit_scale / temperature
    if head.softcap is None:
        return scale
    # d/dx cap*tanh(x/cap) = 1 - tanh^2, and the tempered logits are cap*tanh/temperature.
    # Rows of nan logits have gradient 0, which a slope of nan would undo.
    slope = logits.mul(temperature / head.softcap).square_().neg_().add_(1).mul_(scale)
    return slope.nan_to_num_(nan=0.0)


def hidden_grad(
    logit_grad: Float[Tensor, "n V"], weight: Float[Tensor, "V H"]
) -> Float[Tensor, "n H"]:
    """`logit_grad @ weight` with fp32 sums; on CUDA a bf16 head multiplies bf16 factors."""
    if weight.dtype == logit_grad.dtype:
        return logit_grad @ weight
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        return torch.mm(logit_grad.bfloat16(), weight, out_dtype=logit_grad.dtype)
    grad = logit_grad.new_zeros(logit_grad.shape[0], weight.shape[1])
    for part in tiles(weight.shape[0], _CAST_ROWS):
        grad.addmm_(logit_grad[:, part], weight[part].to(logit_grad.dtype))
    return grad


def _project(hidden: Float[Tensor, "n H"], weight: Float[Tensor, "V H"]) -> Float[Tensor, "n V"]:
    dtype = compute_dtype(hidden, weight)
    if weight.dtype == dtype:
        return torch.mm(hidden.to(dtype), weight.t())
    if weight.is_cuda and weight.dtype == hidden.dtype == torch.bfloat16:
        # Tensor cores multiply bf16 exactly into fp32 sums: the same logits as upcasting first.
        return torch.mm(hidden, weight.t(), out_dtype=dtype)
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=dtype, device=hidden.device)
    rows = hidden.to(dtype)
    for part in tiles(weight.shape[0], _CAST_ROWS):
        torch.mm(rows, weight[part].to(dtype).t(), out=logits[:, part])
    return logits


class HeadGrads:
    """Gradients of hidden, weight and bias, summed over tiles in fp32, each only if needed."""

    def __init__(
        self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        dtype = compute_dtype(hidden, weight)
        self._inputs = (hidden, weight, bias)
        self._grads = [
            torch.zeros_like(tensor, dtype=dtype) if needs_grad and tensor is not None else None
            for needs_grad, tensor in zip(needed, self._inputs, strict=False)
        ]

    def add_tile(self, rows: slice, logit_grad: Tensor, is_finite: Tensor) -> None:
        """Add one tile, given the gradient of its `hidden @ weight.T + bias`; consumes it.

        Rows that are not finite (garbage of masked tokens) add nothing: 0 * nan would be nan. A
        soft cap can hide infinite hidden states from `is_finite`, so they are zeroed by themselves.
        """
        hidden, weight, _ = self._inputs
        grad_hidden, grad_weight, grad_bias = self._grads
        logit_grad.masked_fill_(~is_finite[:, None], 0.0)
        if grad_hidden is not None:
            grad_hidden[rows] = hidden_grad(logit_grad, weight)
        if grad_weight is not None:
            live_rows = hidden[rows].to(grad_weight.dtype).nan_to_num(0.0, posinf=0.0, neginf=0.0)
            grad_weight.addmm_(logit_grad.t(), live_rows)
        if grad_bias is not None:
            grad_bias += logit_grad.sum(0)

    def in_input_precision(self) -> tuple[Tensor | None, ...]:
        """The three gradients, each in its input's dtype; None where it was not needed."""
        return tuple(
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(self._grads, self._inputs, strict=True)
        )


class _SelectedLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: OutputHead,
        temperature: float,
        tile_rows: int,
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies; of what a tile computes only a number a row is kept."""
        dtype = compute_dtype(hidden, weight)
        lse = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        logp = torch.empty_like(lse)
        entropy = torch.empty_like(lse) if return_entropy else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiles(hidden.shape[0], tile_rows):
                # No name holds the logits, so that two tiles never exist at once.
                lse[rows], logp[rows], tile_entropy = _statistics_(
                    tempered_logits(hidden[rows], head, temperature),
                    targets[rows, None],
                    with_entropy=return_entropy,
                )
                if entropy is not None and tile_entropy is not None:
                    entropy[rows] = tile_entropy
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.head, ctx.temperature, ctx.tile_rows = head, temperature, tile_rows
        # An output that the loss does not use then brings None, not a tensor of zeros to process.
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch's own
        *output_grads: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Each tile's logits once more, and from them all gradients of the tile."""
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        logp_grad, entropy_grad = output_grads
        if logp_grad is None:
            logp_grad = torch.zeros_like(lse)
        grads = HeadGrads(ctx.needs_input_grad, hidden, weight, bias)
        head = replace(ctx.head, weight=weight, bias=bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in tiles(hidden.shape[0], ctx.tile_rows):
                logits = tempered_logits(hidden[rows], head, ctx.temperature)
                slope = projection_slope(logits, head, ctx.temperature)
                probs = logits.sub_(lse[rows, None]).exp_()
                if entropy_grad is None:
                    logit_grad = _logp_grad_(probs, targets[rows, None], logp_grad[rows, None])
                else:
                    # dH/dz = -p (log p + H); xlogy is 0 at p = 0.
                    entropy_slope = torch.xlogy(probs, probs).add_(probs * entropy[rows, None])
                    logit_grad = _logp_grad_(probs, targets[rows, None], logp_grad[rows, None])
                    logit_grad -= entropy_slope.mul_(entropy_grad[rows, None])
                    del entropy_slope
                grads.add_tile(rows, logit_grad.mul_(slope), lse[rows].isfinite())
                # Otherwise they stay until the next tile's logits are there.
                del logits, probs, logit_grad
        return (*grads.in_input_precision(), None, None, None, None, None)


def _statistics_(
    logits: Float[Tensor, "n V"], targets: Int[Tensor, "n 1"], *, with_entropy: bool
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Log-sum-exp, target log-probability and entropy of each row; overwrites the logits."""
    lse = logits.logsumexp(-1)
    logp = logits.gather(-1, targets).squeeze(-1) - lse
    if not with_entropy:
        return lse, logp, None
    probs = logits.sub_(lse[:, None]).exp_()
    return lse, logp, -torch.xlogy(probs, probs).sum(-1)


def _logp_grad_(
    probs: Float[Tensor, "n V"], targets: Int[Tensor, "n 1"], incoming: Float[Tensor, "n 1"]
) -> Float[Tensor, "n V"]:
    """d(log p of the target)/d(logits) = 1[v = target] - p_v, times the incoming gradient."""
    return probs.mul_(-incoming).scatter_add_(-1, targets, incoming)
