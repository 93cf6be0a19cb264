"""One pass of hidden rows through the output head serves every loss of the step.

Log-probabilities and entropies at one temperature or several, and the divergence from a teacher,
are read off the same tile of logits: a row is projected once, and once more in the backward.
Letters: R hidden rows, H hidden size, N scored tokens, M compared tokens, G the teacher's hidden
size, n rows of a tile, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from composer_replication.losses.divergence import DivergenceOptions, blocks, divergence_
from composer_replication.losses.head import (
    HeadGrads,
    OutputHead,
    check_projection,
    check_temperature,
    compute_dtype,
    projection_slope,
    tempered_logits,
    tiles,
)
from composer_replication.losses.sdpo import check_vocabulary, clip_tokens


@dataclass(frozen=True, eq=False, slots=True)
class ScoredTokens:
    """Tokens whose log-probability is wanted, and the entropy at each if asked.

    Example: the third hidden row predicts token 17: `ScoredTokens(tensor([2]), tensor([17]))`.
    """

    rows: Int[Tensor, " N"]
    """The hidden row that predicts each; several tokens may share one. Where these are on the CPU,
    planning the pass does not wait for the hidden states."""
    targets: Int[Tensor, " N"]
    temperature: float = 1.0
    with_entropy: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class ComparedTokens:
    """Hidden rows whose whole distribution is compared with a teacher's."""

    rows: Int[Tensor, " M"]
    teacher_hidden: Float[Tensor, "M G"]
    teacher_head: OutputHead
    options: DivergenceOptions


@dataclass(frozen=True, eq=False, slots=True)
class HeadScores:
    """What one head pass returns, all in nats."""

    logp: tuple[Float[Tensor, " _"], ...]
    """For each `ScoredTokens`, which differ in number of tokens."""
    entropy: tuple[Float[Tensor, " _"] | None, ...]
    divergence: Float[Tensor, " M"] | None


def head_pass(
    hidden: Float[Tensor, "R H"],
    head: OutputHead,
    scored: Sequence[ScoredTokens],
    compared: ComparedTokens | None = None,
    *,
    tile_rows: int,
) -> HeadScores:
    """Scores of all tokens from one projection of each row, differentiable in hidden and head.

    The numbers are those of `selected_logp` and `fused_generalized_jsd`; no gradient reaches the
    teacher. Memory is about 3 fp32 tiles of `tile_rows` by the vocabulary.

    Raises:
        ConfigError: a temperature is not positive.
        DataError: hidden sizes, heads or vocabularies do not match.
    """
    check_projection("hidden", hidden, head)
    for part in scored:
        check_temperature(part.temperature)
    if compared is not None:
        check_projection("teacher_hidden", compared.teacher_hidden, compared.teacher_head)
        num_vocab = head.weight.shape[0], compared.teacher_head.weight.shape[0]
        check_vocabulary(*num_vocab, compared.options)
    outputs = _HeadPass.apply(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        hidden, head.weight, head.bias, head, tuple(scored), compared, tile_rows
    )
    values = cast("tuple[Tensor, ...]", outputs)
    num = len(scored)
    entropy = [
        value if part.with_entropy else None
        for part, value in zip(scored, values[num : 2 * num], strict=True)
    ]
    divergence = None
    if compared is not None:
        divergence = clip_tokens(values[-1], compared.options)
    return HeadScores(values[:num], tuple(entropy), divergence)


class _HeadPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        scored: tuple[ScoredTokens, ...],
        compared: ComparedTokens | None,
        tile_rows: int,
    ) -> tuple[Tensor, ...]:
        """All log-probs, all entropies, then the divergence if one is asked for."""
        dtype = compute_dtype(hidden, weight)
        edges = [*range(0, hidden.shape[0], tile_rows), hidden.shape[0]]
        # What is scored has this type, and is on this device wherever its rows are.
        like = hidden.new_empty(0, dtype=dtype)
        logs = [_LogProbs(part, edges, like) for part in scored]
        divergences = None if compared is None else _Divergences(compared, edges, like)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(hidden, tile_rows, logs, divergences):
                tile = rows.start // tile_rows
                logits = tempered_logits(hidden[rows], head, 1.0)
                for part in logs:
                    part.score(tile, logits)
                if divergences is not None:
                    divergences.score(tile, logits)
                del logits
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.logs, ctx.divergences, ctx.tile_rows = head, logs, divergences, tile_rows
        # An output that the loss does not use then brings None, not a tensor of zeros to process.
        ctx.set_materialize_grads(False)
        scores = [part.take() for part in logs]
        values = () if divergences is None else (divergences.take(),)
        return *(logp for logp, _ in scores), *(entropy for _, entropy in scores), *values

    @staticmethod
    @once_differentiable  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch's own
        *output_grads: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Each tile's logits once more; every part adds its gradient of them."""
        hidden, weight, bias = ctx.saved_tensors
        grads = HeadGrads(ctx.needs_input_grad, hidden, weight, bias)
        head = replace(ctx.head, weight=weight, bias=bias)
        num = len(ctx.logs)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _tiles(hidden, ctx.tile_rows, ctx.logs, ctx.divergences):
                tile = rows.start // ctx.tile_rows
                logits = tempered_logits(hidden[rows], head, 1.0)
                # An entry of -inf is excluded and spoils nothing; +inf and nan spoil their row.
                is_finite = logits.amax(-1).isfinite()
                logit_grad = torch.zeros_like(logits)
                for part, of_logp, of_entropy in zip(
                    ctx.logs, output_grads[:num], output_grads[num : 2 * num], strict=True
                ):
                    part.add_grad(tile, logits, logit_grad, of_logp, of_entropy)
                if ctx.divergences is not None and output_grads[-1] is not None:
                    ctx.divergences.add_grad(tile, logits, logit_grad, output_grads[-1])
                logit_grad.mul_(projection_slope(logits, head, 1.0))
                grads.add_tile(rows, logit_grad, is_finite)
                # Otherwise they stay until the next tile's logits are there.
                del logits, logit_grad
        return (*grads.in_input_precision(), None, None, None, None)


def take_rows(hidden: Float[Tensor, "R H"], rows: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
    """`hidden[rows]`; rows on the CPU are sent along without waiting for the device."""
    return hidden[_sent(rows, hidden.device)]


def _sent(index: Int[Tensor, "..."], device: torch.device) -> Int[Tensor, "..."]:
    # From pageable memory the bytes are copied out before the call returns, so that nothing can
    # change them later; only the wait for what the device does beforehand is left out.
    return index.to(device, non_blocking=True)


def _tiles(
    hidden: Float[Tensor, "R H"],
    tile_rows: int,
    logs: "Sequence[_LogProbs]",
    divergences: "_Divergences | None",
) -> Iterator[slice]:
    """Tiles of the hidden rows; of one kind are those with as much of every part in them."""

    def kind_of(tile: int) -> tuple[int, ...]:
        sizes = [size for part in logs for size in part.sizes(tile)]
        return (*sizes, 0 if divergences is None else divergences.size(tile))

    return tiles(hidden.shape[0], tile_rows, kind_of)


def _least_log(dtype: torch.dtype) -> float:
    """The logarithm of nothing that is above 0, whose products with weights stay finite."""
    return -math.sqrt(torch.finfo(dtype).max)


class _LogProbs:
    """Log-probabilities and entropies of `ScoredTokens`, tile by tile.

    Tokens may share a hidden row, and a softmax is a row's. So there are two lists, cut into the
    same tiles: *entries* are the tokens in the caller's order, *rows* the distinct hidden rows
    behind them, ascending. `of(tile)` is a tile's part of such a list; `local(tile)` says where its
    rows are in the tile of logits; a *position* is a place among the tile's own distinct rows.

    Example: tokens predicted by rows `3 0 9 3`, tiles of 5 rows. The first tile has entries `1 0 3`
    (rows 0, 3, 3), its distinct rows `0 3` and so positions `0 1 1`; the second has entry `2`, row
    9, which is row 4 of that tile and its position 0.
    """

    def __init__(self, tokens: ScoredTokens, edges: list[int], like: Tensor) -> None:
        inverse = tokens.rows.unique(return_inverse=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        rows, row_of_token = cast("tuple[Tensor, Tensor]", inverse)
        self._row_of_token = _sent(row_of_token, like.device)
        self._entries = _ByTile(tokens.rows, edges, like.device)
        self._rows = _ByTile(rows, edges, like.device)
        self._tokens = tokens
        self._lse = like.new_empty(len(rows))
        self._row_entropy = torch.zeros_like(self._lse)
        self.logp = like.new_empty(len(tokens.rows))
        self.entropy = torch.empty_like(self.logp)

    def score(self, tile: int, logits: Float[Tensor, "n V"]) -> None:
        """Fill in what this tile's logits say."""
        entries, position = self._places(tile)
        own = self._tempered(tile, logits)
        top = own.amax(-1, keepdim=True)
        target_logits = own.sub_(top)[position, self._tokens.targets[entries]]
        weights = own.exp()
        total = weights.sum(-1)
        log_total = total.log()
        self._lse[self._rows.of(tile)] = log_total + top.squeeze(-1)
        self.logp[entries] = target_logits - log_total[position]
        if self._tokens.with_entropy:
            # -inf logits have weight 0, and 0 * -inf would be nan.
            mean = weights.mul_(own.clamp_(min=_least_log(own.dtype))).sum(-1) / total
            self._row_entropy[self._rows.of(tile)] = log_total - mean
            self.entropy[entries] = self._entropy_of(tile)[position]

    def sizes(self, tile: int) -> tuple[int, int]:
        """Tokens and scored rows of a tile."""
        return self._entries.size(tile), self._rows.size(tile)

    def take(self) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """The log-probs and entropies, which are no longer held here.

        An output that its own node holds is never freed, nor is anything else that the node holds.
        """
        outputs = self.logp, self.entropy
        del self.logp, self.entropy
        return outputs

    def add_grad(
        self,
        tile: int,
        logits: Float[Tensor, "n V"],
        logit_grad: Float[Tensor, "n V"],
        of_logp: Float[Tensor, " N"] | None,
        of_entropy: Float[Tensor, " N"] | None,
    ) -> None:
        """d(log p of a target)/dz = [v = target] - p_v and dH/dz = -p (log p + H), weighted."""
        entries, position = self._places(tile)
        own = self._tempered(tile, logits).sub_(self._lse[self._rows.of(tile), None])
        logp_share = own.new_zeros(own.shape[0], 1)
        if of_logp is not None:
            logp_share.index_add_(0, position, of_logp[entries, None].to(own.dtype))
        if of_entropy is not None and self._tokens.with_entropy:
            entropy_share = torch.zeros_like(logp_share)
            entropy_share.index_add_(0, position, of_entropy[entries, None].to(own.dtype))
            probs = own.exp()
            # -inf logits have probability 0, and 0 * -inf would be nan.
            own.clamp_(min=_least_log(own.dtype)).add_(self._entropy_of(tile)[:, None])
            grad = own.mul_(entropy_share).add_(logp_share).mul_(probs).neg_()
        else:
            grad = own.exp_().mul_(-logp_share)
        if of_logp is not None:
            targets = self._tokens.targets[entries]
            grad.index_put_((position, targets), of_logp[entries].to(grad.dtype), accumulate=True)
        grad.div_(self._tokens.temperature)
        logit_grad.index_add_(0, self._rows.local(tile), grad)

    def _places(self, tile: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """The tile's tokens, and the place of each one's row among the tile's scored rows."""
        entries = self._entries.of(tile)
        return entries, self._row_of_token[entries] - self._rows.first(tile)

    def _entropy_of(self, tile: int) -> Float[Tensor, " m"]:
        return self._row_entropy[self._rows.of(tile)]

    def _tempered(self, tile: int, logits: Tensor) -> Tensor:
        own = logits[self._rows.local(tile)]
        return own if self._tokens.temperature == 1 else own.div_(self._tokens.temperature)


class _Divergences:
    """Divergences of `ComparedTokens`, tile by tile."""

    def __init__(self, tokens: ComparedTokens, edges: list[int], like: Tensor) -> None:
        self._tokens = tokens
        self._entries = _ByTile(tokens.rows, edges, like.device)
        self.values = like.new_empty(len(tokens.rows))

    def score(self, tile: int, logits: Float[Tensor, "n V"]) -> None:
        """Fill in what this tile's logits say."""
        self.values[self._entries.of(tile)], _ = self._compare(tile, logits, need_grad=False)

    def size(self, tile: int) -> int:
        """Compared rows of a tile."""
        return self._entries.size(tile)

    def take(self) -> Float[Tensor, " M"]:
        """The divergences, which are no longer held here; see `_LogProbs.take`."""
        values = self.values
        del self.values
        return values

    def add_grad(
        self,
        tile: int,
        logits: Float[Tensor, "n V"],
        logit_grad: Float[Tensor, "n V"],
        of_value: Float[Tensor, " M"],
    ) -> None:
        """Add the weighted gradient of each divergence to its row."""
        _, grad = self._compare(tile, logits, need_grad=True)
        weight = of_value[self._entries.of(tile)].to(grad.dtype) / self._tokens.options.temperature
        logit_grad.index_add_(0, self._entries.local(tile), grad.mul_(weight[:, None]))

    def _compare(self, tile: int, logits: Tensor, *, need_grad: bool) -> tuple[Tensor, Tensor]:
        tokens, entries = self._tokens, self._entries.of(tile)
        temperature = tokens.options.temperature
        own = logits[self._entries.local(tile)].div_(temperature)
        teacher = tempered_logits(tokens.teacher_hidden[entries], tokens.teacher_head, temperature)
        values = own.new_empty(len(entries))
        for rows in blocks(own):
            values[rows] = divergence_(
                own[rows], teacher[rows], tokens.options, need_grad=need_grad
            )
        return values, own


class _ByTile:
    """Which of the given rows fall into each tile, and where in it, as indices on a device."""

    def __init__(self, rows: Int[Tensor, " N"], edges: list[int], device: torch.device) -> None:
        ordered, order = rows.sort(stable=True)
        limits = torch.tensor(edges, device=rows.device)
        bounds = torch.searchsorted(ordered, limits)
        self._bounds: list[int] = bounds.tolist()  # pyright: ignore[reportUnknownMemberType]
        self._sorted, self._order = _sent(ordered, device), _sent(order, device)
        self._edges = edges

    def first(self, tile: int) -> int:
        """How many of the given rows lie in the tiles before."""
        return self._bounds[tile]

    def size(self, tile: int) -> int:
        """How many lie in the tile."""
        return self._bounds[tile + 1] - self._bounds[tile]

    def of(self, tile: int) -> Int[Tensor, " m"]:
        """Indices into the given rows."""
        return self._order[self._bounds[tile] : self._bounds[tile + 1]]

    def local(self, tile: int) -> Int[Tensor, " m"]:
        """The same entries' rows, counted from the tile's first."""
        return self._sorted[self._bounds[tile] : self._bounds[tile + 1]] - self._edges[tile]
