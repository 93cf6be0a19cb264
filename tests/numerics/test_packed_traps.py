"""Ways to get a prefix tree wrong without any error, each reproduced; mutants of ours each die.

The first half shows what the stock ways give on a tree, so that a simplification back to them
fails here with its reason.
"""

import dataclasses
from functools import partial

import numpy as np
import pytest
import tiny_families
import torch
from torch.distributed.utils import _apply_to_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache
from tree_batches import largest_errors, losses_and_gradients, shared_batch

from composer_replication.errors import ModelError
from composer_replication.step import rectangle_kernels, rectangles, tree_attention, tree_forward
from composer_replication.step.attention_interface import attend, follow_trees
from composer_replication.step.hidden_states import causal_lm, final_hidden_states
from composer_replication.step.hidden_states import tree_hidden_states as on_tree
from composer_replication.step.packed import score_packed
from composer_replication.step.tree_attention import RectangleKernel
from composer_replication.step.tree_forward import TreeOptions
from composer_replication.step.trie import PrefixTree

CPU = torch.device("cpu")
WRONG = 0.05
"""Of the norm of hidden states: far above any rounding."""


def sequences():
    rng = np.random.default_rng(1)
    stem, middle = rng.integers(6, 50, 14), rng.integers(6, 50, 6)
    tails = [rng.integers(6, 50, size) for size in (7, 9, 5)]
    ends = [[middle, tails[0]], [middle, tails[1]], [tails[2]]]
    return [np.concatenate([stem, *parts]) for parts in ends]


def largest_difference(hidden_TH, tree, model):
    """Between rows of the tree and each sequence alone."""
    errors = []
    for ids, rows in zip(sequences(), tree.rows, strict=True):
        row = torch.from_numpy(ids)[None]
        alone = final_hidden_states(model, row, torch.ones_like(row))[0]
        errors.append(float((hidden_TH[rows] - alone).norm() / alone.norm()))
    return max(errors)


@pytest.fixture
def model():
    return tiny_families.tiny_model("qwen2", dtype=torch.float64)


@pytest.fixture
def tree():
    return PrefixTree(sequences())


@torch.no_grad()
def test_stock_attention_takes_branches_for_documents_or_lets_them_see_each_other(model, tree):
    ids, positions = tree.token_ids[None], tree.positions[None]
    for mask in (None, torch.ones_like(ids)):
        hidden = model.model(input_ids=ids, position_ids=positions, attention_mask=mask)[0][0]
        assert largest_difference(hidden, tree, model) > WRONG
    ours = on_tree(model, tree, RectangleKernel(tree, CPU))
    assert largest_difference(ours, tree, model) < 1e-12


@torch.no_grad()
def test_a_cache_is_empty_under_checkpointing_and_so_carries_no_prefix(model, tree):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cache = DynamicCache(config=model.config)
    model.model(input_ids=tree.token_ids[None], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0
    ours = on_tree(model, tree, RectangleKernel(tree, CPU))
    assert largest_difference(ours, tree, model.eval()) < 1e-12


def test_a_forward_of_a_tree_makes_no_cache(model, tree, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a cache was made")

    monkeypatch.setattr(DynamicCache, "__init__", refuse)
    on_tree(model, tree, RectangleKernel(tree, CPU)).sum().backward()


def test_what_travels_to_the_attention_is_not_rebuilt_by_fsdp(model, tree):
    """FSDP1 casts every input, and makes dataclasses and containers anew on the way."""
    kernel, seen = RectangleKernel(tree, CPU), []

    def note(_module, _args, keywords):
        cast = _apply_to_tensors(lambda tensor: tensor.clone(), keywords)
        seen.append(cast["prefix_tree"])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    on_tree(model, tree, kernel)
    handle.remove()
    assert [travelled is kernel for travelled in seen] == [True]
    again = _apply_to_tensors(lambda tensor: tensor.clone(), {"x": Wrapped(kernel)})
    assert isinstance(again["x"], Wrapped), "a dataclass is what is rebuilt"


@dataclasses.dataclass
class Wrapped:
    kernel: object


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor):
                self.num_bytes = max(self.num_bytes, value.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("scored", ["with gradient", "teacher"])
def test_no_mask_of_all_pairs_is_built(scored):
    """Of 100,000 tokens it would have 10 GB; transformers builds one where no mask is given."""
    model = tiny_families.tiny_model("qwen2", dtype=torch.float32, max_position_embeddings=4096)
    rng = np.random.default_rng(0)
    stem = rng.integers(6, 50, 1500)
    long = PrefixTree([np.concatenate([stem, rng.integers(6, 50, 200)]) for _ in range(3)])
    with torch.set_grad_enabled(scored == "with gradient"), LargestStorage() as largest:
        hidden = on_tree(model, long, RectangleKernel(long, CPU))
        if scored == "with gradient":
            hidden.sum().backward()
    assert largest.num_bytes < long.num_rows**2 / 4


@torch.no_grad()
def test_a_sliding_window_counts_positions_and_not_rows(tree):
    model = tiny_families.tiny_model("mistral_sliding")
    ours = on_tree(model, tree, RectangleKernel(tree, CPU))
    assert largest_difference(ours, tree, model) < 1e-6
    by_row = PrefixTree(sequences())
    by_row.positions = torch.arange(by_row.num_rows)
    kernel = RectangleKernel(by_row, CPU)
    assert largest_difference(on_tree(model, tree, kernel), tree, model) > WRONG


def test_recomputation_in_the_backward_uses_the_tree_too(model, tree, monkeypatch):
    calls = []
    kernel = RectangleKernel(tree, CPU)

    def counted(*arguments):
        calls.append(model.config._attn_implementation)
        return kernel(*arguments)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    hidden = on_tree(model, tree, counted)
    assert model.config._attn_implementation == "sdpa"
    assert len(calls) == 2
    hidden.sum().backward()
    assert len(calls) == 4
    assert set(calls) == {"composer_prefix_tree"}
    assert model.config._attn_implementation == "sdpa"


def test_a_failed_forward_leaves_the_models_own_attention(model, tree):
    def fails(*_arguments):
        raise ModelError("no such luck")

    with pytest.raises(ModelError):
        on_tree(model, tree, fails)
    assert model.config._attn_implementation == "sdpa"
    follow_trees(causal_lm(model))
    attention = model.model.layers[0].self_attn
    assert len(attention._forward_pre_hooks) == len(attention._forward_hooks) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout": 0.1}, "drops 10% of its attention"),
        ({"s_aux": torch.zeros(4)}, "passes s_aux"),
        ({"position_bias": torch.zeros(4)}, "passes position_bias"),
    ],
)
def test_attention_with_something_beside_the_tree_is_refused(model, tree, changes, reason):
    module = model.model.layers[0].self_attn
    states = torch.zeros(1, 4, tree.num_rows, 8)
    with pytest.raises(ModelError, match=reason):
        attend(module, states, states, states, None, prefix_tree=None, **changes)


def test_attention_to_a_cache_or_to_what_comes_after_is_refused(model):
    module = model.model.layers[0].self_attn
    query, longer = torch.zeros(1, 4, 5, 8), torch.zeros(1, 4, 9, 8)
    with pytest.raises(ModelError, match="5 queries and 9 keys"):
        attend(module, query, longer, longer, None, prefix_tree=None)
    module.is_causal = False
    with pytest.raises(ModelError, match="not causal"):
        attend(module, query, query, query, None, prefix_tree=None)


# ---- mutants ------------------------------------------------------------------------------------

BATCH = shared_batch()


def no_dense_rectangles(patch):
    """Branches do not see what they share."""
    own = rectangles.rectangles_of
    patch.setattr(
        tree_attention,
        "rectangles_of",
        lambda *a: [part for part in own(*a) if part.mask != "none"],
    )


def branches_see_each_other(patch):
    """Reach is the end of the row."""
    patch.setattr(
        PrefixTree,
        "reach",
        property(lambda tree: torch.full((tree.num_rows,), tree.num_rows)),
    )


def positions_by_row(patch):
    """Positions count rows of the layout, not tokens of the sequence."""
    own = PrefixTree.__init__

    def init(tree, parts):
        own(tree, parts)
        tree.positions = torch.arange(tree.num_rows)

    patch.setattr(PrefixTree, "__init__", init)


def partial_results_are_averaged(patch):
    """Merging forgets how much each rectangle weighs."""
    half = torch.tensor(2.0).log()
    patch.setattr(
        rectangles.torch, "logaddexp", lambda a, b: torch.maximum(a, b) + half.to(a.dtype)
    )


def backward_of_each_rectangle_alone(patch):
    """Each partial backward normalises by its own keys."""
    own_forward, own_backward = rectangles.rectangle_forward, rectangles.rectangle_backward

    def backward(query, key, value, distance, mask, scoring, whole):
        out, lse = own_forward(query, key, value, distance, mask, scoring)
        alone = rectangle_kernels.Merged(out, lse, whole.output_grad)
        return own_backward(query, key, value, distance, mask, scoring, alone)

    patch.setattr(rectangles, "rectangle_backward", backward)


def a_token_is_scored_by_its_own_row(patch):
    """The head reads the row of the token, not of the one before it."""
    own = tree_forward._joined

    def joined(asked):
        parts, tokens = own(asked)
        parts = [np.append(part, 7) for part in parts]
        return parts, tokens + np.array([0, 1])

    patch.setattr(tree_forward, "_joined", joined)


def grouped_heads_lose_their_sum(patch):
    """Keys get the gradient of one of their query heads."""
    own = rectangles.rectangle_backward

    def backward(query, *rest):
        of_query, of_key, of_value = own(query, *rest)
        return of_query, of_key / query.shape[1], of_value

    patch.setattr(rectangles, "rectangle_backward", backward)


MUTANTS = [
    no_dense_rectangles,
    branches_see_each_other,
    positions_by_row,
    partial_results_are_averaged,
    backward_of_each_rectangle_alone,
    a_token_is_scored_by_its_own_row,
    grouped_heads_lose_their_sum,
]


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_a_mutant_is_far_from_separate_forwards(plant, monkeypatch):
    model = tiny_families.exact_norms(tiny_families.tiny_model("qwen2"))
    theirs = losses_and_gradients(model, BATCH)
    assert max(largest_errors(losses_and_gradients(model, BATCH, score_packed), theirs)) < 1e-10
    plant(monkeypatch)
    assert max(largest_errors(losses_and_gradients(model, BATCH, score_packed), theirs)) > 1e-3


def test_parts_of_a_step_that_was_cut_are_not_kept_together():
    """Under a budget no part's activations outlive its own forward."""
    model = tiny_families.tiny_model("llama")
    alive = []

    class Counting(RectangleKernel):
        def __call__(self, query, key, value, scoring):
            # A live teacher's own tree has no gradient and runs once.
            if torch.is_grad_enabled():
                alive.append(query.shape[2])
            return super().__call__(query, key, value, scoring)

    cut = partial(score_packed, options=TreeOptions(max_tokens=50, kernel=Counting))
    with pytest.warns(UserWarning, match="A step is cut into "):
        losses_and_gradients(model, BATCH, cut)
    num_layers = model.config.num_hidden_layers
    # Every part runs once forward and once again when its gradient is due.
    assert len(alive) % (2 * num_layers) == 0
    assert len(alive) > 2 * num_layers
    assert max(alive) <= max(50, max(len(ids) for ids in sequences()) * 4)
