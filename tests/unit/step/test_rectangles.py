"""Rectangle attention against masked softmax, value and gradient, on random trees."""

import numpy as np
import pytest
import torch

from composer_replication.step import rectangle_kernels, rectangles
from composer_replication.step.rectangle_kernels import Scoring
from composer_replication.step.rectangles import rectangles_of
from composer_replication.step.tree_attention import DenseKernel, RectangleKernel
from composer_replication.step.trie import PrefixTree

CPU = torch.device("cpu")
SCORINGS = {
    "plain": Scoring(0.3),
    "a soft cap": Scoring(0.3, softcap=1.5),
    "a window": Scoring(0.3, window=5),
    "a window and a soft cap": Scoring(0.3, softcap=1.5, window=3),
    "a window longer than the tree": Scoring(0.3, window=500),
    "a window of one": Scoring(0.3, window=1),
}


def random_tree(seed, num=8, length=18):
    """Two-token vocabularies branch at every depth; the last sequence shares nothing."""
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 2, rng.integers(1, length)) for _ in range(num)]
    return PrefixTree([*sequences, np.full(7, 9)])


def inputs(tree, *, num_heads=4, num_kv=2, dtype=torch.float64, size=8, value_size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_heads, size), (num_kv, size), (num_kv, value_size)]
    return [
        # As models make them: projected by row, then transposed.
        torch.randn(1, tree.num_rows, *shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]


def outputs_and_grads(kernel, tensors, scoring):
    output = kernel(*tensors, scoring)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


def assert_kernels_agree(tree, scoring, *, tolerance=1e-11, **options):
    ours, theirs = (
        outputs_and_grads(kernel(tree, CPU), inputs(tree, **options), scoring)
        for kernel in (RectangleKernel, DenseKernel)
    )
    for mine, oracle in zip(ours, theirs, strict=True):
        assert mine.dtype == oracle.dtype
        # A window of one leaves keys without any gradient.
        assert (mine - oracle).norm() <= tolerance * max(float(oracle.norm()), 1.0)


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize("seed", range(4))
def test_rectangles_equal_masked_softmax_in_value_and_gradient(seed, scoring):
    assert_kernels_agree(random_tree(seed), scoring)


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_windows_and_chunks_smaller_than_runs_change_nothing(scoring, monkeypatch):
    monkeypatch.setattr(rectangles, "_WINDOW_CHUNK_ROWS", 3)
    monkeypatch.setattr(rectangle_kernels, "_TILE_ELEMENTS", 40)
    assert_kernels_agree(random_tree(5), scoring)


@pytest.mark.parametrize(("num_heads", "num_kv"), [(4, 4), (4, 1), (6, 2)])
def test_grouped_heads_share_their_keys_and_values(num_heads, num_kv):
    assert_kernels_agree(random_tree(1), SCORINGS["plain"], num_heads=num_heads, num_kv=num_kv)


def test_values_may_have_another_size_than_keys():
    assert_kernels_agree(random_tree(2), SCORINGS["plain"], value_size=5)


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_stays_near_the_oracle(scoring, dtype, tolerance):
    assert_kernels_agree(random_tree(3), scoring, dtype=dtype, tolerance=tolerance)


def test_the_gradient_passes_gradcheck():
    tree = PrefixTree([np.array([1, 2, 3]), np.array([1, 2, 4, 4]), np.array([1, 5])])
    kernel = RectangleKernel(tree, CPU)
    tensors = inputs(tree, size=2, value_size=2)
    for scoring in SCORINGS.values():
        assert torch.autograd.gradcheck(
            lambda *x, s=scoring: kernel(*x, s), tensors, fast_mode=True
        )


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("seed", range(6))
def test_rectangles_cover_each_visible_pair_once_and_hardly_more(seed, window):
    tree = random_tree(seed)
    distance = tree.positions[:, None] - tree.positions[None]
    visible = tree.visible() & (distance < (window or 10**9))
    covered = torch.zeros(tree.num_rows, tree.num_rows, dtype=torch.int)
    for part in rectangles_of(tree, window):
        block = covered[part.queries, part.keys]
        if part.mask == "none":
            block += 1
        else:
            block += (
                torch.ones_like(block).tril()
                if part.mask == "causal"
                else ((distance >= 0) & (distance < window))[part.queries, part.keys].int()
            )
    assert torch.equal(covered, visible.int())


def test_a_tree_of_branches_needs_one_square_each_and_one_dense_rectangle():
    prefix = np.arange(50)
    tree = PrefixTree([np.append(prefix, [100 + branch] * 4) for branch in range(5)])
    masks = [part.mask for part in rectangles_of(tree)]
    assert masks == 5 * ["causal"] + ["none"]
    dense = rectangles_of(tree)[-1]
    assert (dense.queries, dense.keys) == (slice(54, 70), slice(0, 50))


def test_a_branch_gets_no_gradient_from_its_sibling():
    tree = PrefixTree([np.array([1, 2, 3]), np.array([1, 2, 4])])
    query, key, value = inputs(tree)
    output = RectangleKernel(tree, CPU)(query, key, value, Scoring(0.3))
    grads = torch.autograd.grad(output[0, tree.rows[1][-1]].sum(), [query, key, value])
    sibling = tree.rows[0][-1]
    for grad in grads:
        assert grad[0, :, sibling].abs().max() == 0
        assert grad[0, :, tree.rows[1][-1]].abs().max() > 0
