"""The forward of a model over the prefix tree of many sequences, within a budget of tokens.

Letters: B sequences, N tokens asked for, R hidden rows returned, T rows of a tree, H hidden size.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from composer_replication.errors import ConfigError, DataError
from composer_replication.losses.head import OutputHead
from composer_replication.step.hidden_states import (
    output_head,
    tree_hidden_states,
    zero_in_graph,
)
from composer_replication.step.tree_attention import RectangleKernel, TreeKernel
from composer_replication.step.trie import (
    Ids,
    PrefixTree,
    num_unique_tokens,
    split_at_nodes,
)

CPU_HEAD_TILE_MIB = 32
GPU_HEAD_TILE_MIB = 512


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """What a packed forward may use."""

    max_tokens: int | None = None
    """Most tokens of one forward. A larger step is cut at a node of its tree, and each part is
    computed again when its gradient is due. None: no limit."""
    head_tile_mib: int | None = None
    """Size of one fp32 tile of logits; about 3 exist at once. None: by device."""
    kernel: Callable[[PrefixTree, torch.device], TreeKernel] = RectangleKernel

    def __post_init__(self) -> None:
        for name in ("max_tokens", "head_tile_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"{name} is {value}; a forward needs at least 1. Set None for no limit."
                )


@dataclass(frozen=True, slots=True)
class RowsAsked:
    """Sequences without padding, and the tokens in them whose predicting hidden row is wanted."""

    sequences: Sequence[Ids]
    tokens: np.ndarray
    """[N, 2]: (sequence, position) of each token; its row is that of the token before it."""


def forward_trees(
    model: nn.Module, asked: Mapping[str, RowsAsked], options: TreeOptions
) -> tuple[Float[Tensor, "R H"], dict[str, Int[Tensor, " N"]]]:
    """Final hidden states of the rows asked for, and for each asker the row of each token.

    The rows are on the CPU whatever the model's device: what is planned from them then waits for
    no forward.

    Raises:
        DataError: a token that is the first of its sequence, which nothing predicts.
    """
    device = next(model.parameters()).device
    sequences, tokens = _joined(asked)
    if not len(tokens):
        return _no_rows(model), {name: torch.empty(0, dtype=torch.long) for name in asked}
    parts = split_at_nodes(sequences, options.max_tokens)
    trees: list[PrefixTree] = []
    first_row = 0
    rows_of: list[Ids] = list(sequences)
    for part in parts:
        trees.append(PrefixTree([sequences[index] for index in part]))
        for index, rows in zip(part, trees[-1].rows, strict=True):
            rows_of[index] = rows + first_row
        first_row += trees[-1].num_rows
    _warn_of_a_dear_cut(len(parts), first_row, sequences)
    wanted = np.array([rows_of[sequence][position - 1] for sequence, position in tokens], np.int64)
    kept, places = np.unique(wanted, return_inverse=True)
    hidden = _hidden_rows(model, trees, torch.from_numpy(kept), options, device)
    counts = [len(each.tokens) for each in asked.values()]
    found = torch.from_numpy(places).split(counts)
    return hidden, dict(zip(asked, found, strict=True))


def _warn_of_a_dear_cut(num_parts: int, num_rows: int, sequences: Sequence[Ids]) -> None:
    """Say so where what parts repeat makes them, computed twice, dearer than one by one."""
    num_tokens = sum(map(len, sequences))
    is_dear = num_parts > 1 and 2 * num_rows > num_tokens
    if is_dear and num_rows > num_unique_tokens(sequences):
        warnings.warn(
            f"A step is cut into {num_parts} parts, which compute {2 * num_rows} tokens where its "
            f"sequences one by one have {num_tokens}: what is longer than batch.tree_max_tokens is "
            "computed again for each of its branches. Raise it if the memory allows, or set tree = "
            "'off'.",
            stacklevel=3,
        )


def head_tile_rows(head: OutputHead, device: torch.device, options: TreeOptions) -> int:
    """Rows of logits that fit one tile of the budget."""
    default = CPU_HEAD_TILE_MIB if device.type == "cpu" else GPU_HEAD_TILE_MIB
    return max(1, (options.head_tile_mib or default) * 2**20 // (4 * head.weight.shape[0]))


def _joined(asked: Mapping[str, RowsAsked]) -> tuple[list[Ids], np.ndarray]:
    """All sequences in one list, each up to its last asked token, whose own row nobody needs."""
    sequences: list[Ids] = []
    tokens: list[np.ndarray] = []
    for name, each in asked.items():
        if len(each.tokens) and each.tokens[:, 1].min() < 1:
            raise DataError(
                f"A token of the {name} is the first of its sequence, so there is nothing to "
                "predict it from. Give every action a state of at least one token."
            )
        stops = np.zeros(len(each.sequences), np.int64)
        np.maximum.at(stops, each.tokens[:, 0], each.tokens[:, 1])
        tokens.append(each.tokens + np.array([len(sequences), 0]))
        sequences += [ids[:stop] for ids, stop in zip(each.sequences, stops, strict=True)]
    return sequences, np.concatenate([np.empty((0, 2), np.int64), *tokens])


def _hidden_rows(
    model: nn.Module,
    trees: list[PrefixTree],
    kept: Int[Tensor, " R"],
    options: TreeOptions,
    device: torch.device,
) -> Float[Tensor, "R H"]:
    ends = np.cumsum([tree.num_rows for tree in trees])
    bounds = torch.searchsorted(kept, torch.from_numpy(np.concatenate([[0], ends]))).tolist()
    parts = []
    for i, tree in enumerate(trees):
        local = kept[bounds[i] : bounds[i + 1]] - int(ends[i] - tree.num_rows)
        parts.append(partial(_part_rows, tree=tree, rows=local.to(device), options=options))
    if len(parts) == 1:
        return parts[0](model)
    # Each part's activations live only while its own gradient is computed. DDP prepares once for
    # all of them: its own forward is not to be run again in the middle of a backward.
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    hidden = torch.cat([checkpoint(run, inner, use_reentrant=False) for run in parts])
    return hidden + zero_in_graph(model) if inner is not model else hidden


def _no_rows(model: nn.Module) -> Float[Tensor, "0 H"]:
    """No hidden state, but in the graph: an optimizer step without data still backpropagates."""
    weight = output_head(model).weight
    return weight.detach().new_zeros(0, weight.shape[1]) + zero_in_graph(model)


def _part_rows(
    model: nn.Module, *, tree: PrefixTree, rows: Int[Tensor, " R"], options: TreeOptions
) -> Float[Tensor, "R H"]:
    kernel = options.kernel(tree, rows.device)
    return tree_hidden_states(model, tree, kernel)[rows]
