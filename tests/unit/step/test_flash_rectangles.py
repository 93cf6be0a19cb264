"""Rectangles in few launches: what a launch may hold, and the merged attention against an oracle.

On a CPU the kernel of a launch is played by dense softmax; the real one runs where CUDA is.
"""

import numpy as np
import pytest
import torch
from test_rectangles import inputs, outputs_and_grads, random_tree
from torch._subclasses.fake_tensor import FakeTensorMode

from composer_replication.step import flash_rectangles, tree_attention
from composer_replication.step.flash_rectangles import FlashAttention, launches_of, why_no_flash
from composer_replication.step.rectangle_kernels import Scoring
from composer_replication.step.rectangles import rectangles_of
from composer_replication.step.tree_attention import DenseKernel, RectangleKernel
from composer_replication.step.trie import PrefixTree

CPU = torch.device("cpu")
SCORING = Scoring(0.3)


def segments(launch):
    """Each rectangle of a launch as slices of its rows."""
    for bounds in zip(
        launch.q_bounds[:-1], launch.q_bounds[1:], launch.k_bounds[:-1], launch.k_bounds[1:],
        strict=True,
    ):  # fmt: skip
        q_start, q_stop, k_start, k_stop = map(int, bounds)
        yield slice(q_start, q_stop), slice(k_start, k_stop)


def segment_scores(query, key, launch, scale):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if launch.is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), float("-inf"))
    return scores


def dense_forward(query, key, value, launch, scale):
    """What one launch of the kernel returns, by dense softmax."""
    outputs, lses = [], []
    num_groups = query.shape[1] // key.shape[1]
    for rows, keys in segments(launch):
        scores = segment_scores(query[rows], key[keys], launch, scale)
        values = value[keys].repeat_interleave(num_groups, 1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lses, 1)


def dense_backward(whole, query, key, value, launch, scale):
    """Gradients of one launch from the output and log-sum-exp of all keys."""
    output_grad, output, lse = whole
    num_groups = query.shape[1] // key.shape[1]
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    for rows, keys in segments(launch):
        probs = (segment_scores(query[rows], key[keys], launch, scale) - lse[:, rows, None]).exp()
        values = value[keys].repeat_interleave(num_groups, 1)
        of_probs = torch.einsum("qhd,khd->hqk", output_grad[rows], values)
        row_dot = (output_grad[rows] * output[rows]).sum(-1).t()
        of_scores = probs * (of_probs - row_dot[..., None]) * scale
        expanded = key[keys].repeat_interleave(num_groups, 1)
        grads[0][rows] = torch.einsum("hqk,khd->qhd", of_scores, expanded)
        of_keys = torch.einsum("hqk,qhd->khd", of_scores, query[rows])
        of_values = torch.einsum("hqk,qhd->khd", probs, output_grad[rows])
        for grad, part in ((grads[1], of_keys), (grads[2], of_values)):
            grad[keys] = part.unflatten(1, (-1, num_groups)).sum(2)
    return tuple(grads)


@pytest.fixture
def dense_launches(monkeypatch):
    monkeypatch.setattr(tree_attention, "why_no_flash", lambda *_: None)
    monkeypatch.setattr(flash_rectangles, "flash_forward", dense_forward)
    monkeypatch.setattr(flash_rectangles, "flash_backward", dense_backward)


@pytest.mark.usefixtures("dense_launches")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_heads", "num_kv"), [(4, 4), (6, 2)])
def test_merged_launches_equal_masked_softmax_in_value_and_gradient(seed, num_heads, num_kv):
    tree = random_tree(seed)
    options = {"num_heads": num_heads, "num_kv": num_kv}
    ours, theirs = (
        outputs_and_grads(kernel(tree, CPU), inputs(tree, **options), SCORING)
        for kernel in (RectangleKernel, DenseKernel)
    )
    for mine, oracle in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("dense_launches")
def test_a_tree_without_branches_is_one_launch(monkeypatch):
    tree = PrefixTree([np.arange(9)])
    calls = []

    def counted(*args):
        calls.append(args)
        return dense_forward(*args)

    monkeypatch.setattr(flash_rectangles, "flash_forward", counted)
    ours, theirs = (
        outputs_and_grads(kernel(tree, CPU), inputs(tree), SCORING)
        for kernel in (RectangleKernel, DenseKernel)
    )
    assert len(calls) == 1
    for mine, oracle in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=0, atol=1e-11)


def rows_of(part, num_rows):
    return torch.arange(num_rows)[part].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_each_rectangle_is_in_one_launch_and_no_row_is_twice_in_one(seed):
    tree = random_tree(seed, num=12)
    rectangles = rectangles_of(tree)
    found = []
    for launch in launches_of(rectangles, CPU):
        queries, keys = (rows_of(part, tree.num_rows) for part in (launch.queries, launch.keys))
        assert len(set(queries)) == len(queries)
        assert len(set(keys)) == len(keys)
        lengths = [
            (rows.stop - rows.start, cols.stop - cols.start) for rows, cols in segments(launch)
        ]
        assert launch.max_queries == max(length for length, _ in lengths)
        assert launch.max_keys == max(length for _, length in lengths)
        found += [
            (queries[rows], keys[cols], "causal" if launch.is_causal else "none")
            for rows, cols in segments(launch)
        ]
    expected = [
        (rows_of(part.queries, tree.num_rows), rows_of(part.keys, tree.num_rows), part.mask)
        for part in rectangles
    ]
    assert sorted(found) == sorted(expected)


def test_there_are_as_many_launches_as_the_tree_nests():
    prefix = np.arange(50)
    branches = [np.append(prefix, [100 + branch] * 4) for branch in range(5)]
    assert len(launches_of(rectangles_of(PrefixTree(branches)), CPU)) == 2
    # Two groups, one after another, each with a fork of its own below the prefix.
    nested = [np.append(one, [200 + tail] * 3) for one in branches[:2] for tail in range(3)]
    launches = launches_of(rectangles_of(PrefixTree(nested)), CPU)
    assert len(launches) == 3
    assert [int(launch.q_bounds.numel()) - 1 for launch in launches] == [6, 1, 2]
    assert launches[1].queries == slice(57, 76)


def test_a_cpu_keeps_its_own_kernel():
    query, _, value = inputs(random_tree(0), dtype=torch.bfloat16)
    assert why_no_flash(query, value, SCORING) == "it is CUDA's"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "queries are torch.float32"),
        ({"capability": (7, 5)}, "older than the kernel"),
        ({"softcap": 50.0}, "the model's is 50"),
        ({"size": 256, "value_size": 256}, "heads of 256 numbers"),
        ({"size": 68, "value_size": 68}, "multiples of 8"),
        ({"value_size": 32}, "with values of 32"),
    ],
)
def test_what_cudas_kernel_does_not_take_is_named(changes, reason, monkeypatch):
    case = {"dtype": torch.bfloat16, "capability": (8, 0), "softcap": None, "size": 64}
    case |= {"value_size": 64} | changes
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: case["capability"])
    with FakeTensorMode():
        query, value = (
            torch.empty(1, 4, 3, case[size], device="cuda", dtype=case["dtype"])
            for size in ("size", "value_size")
        )
    found = why_no_flash(query, value, Scoring(0.3, case["softcap"]))
    assert found is None if reason is None else reason in found


@pytest.mark.usefixtures("dense_launches")
@pytest.mark.parametrize(
    ("softcap", "window", "reason"),
    [(9.0, None, "the model's is 9"), (None, 5, "a window of 5 tokens cuts"), (None, None, None)],
)
def test_plain_products_on_a_gpu_are_told(softcap, window, reason, monkeypatch, recwarn):
    monkeypatch.setattr(
        tree_attention,
        "why_no_flash",
        lambda *_: None if softcap is None else f"the model's is {softcap:g}",
    )
    query, key, value = inputs(random_tree(3))
    # A GPU's tensor in all but where it lies.
    query = query.detach().as_subclass(type("OnGpu", (torch.Tensor,), {"is_cuda": True}))
    RectangleKernel(random_tree(3), CPU)(query, key, value, Scoring(0.3, softcap, window))
    messages = [str(warning.message) for warning in recwarn]
    if reason is None:
        assert not messages
    else:
        (message,) = messages
        assert message.startswith("The attention of the prefix tree runs as plain matrix products")
        assert reason in message


def test_a_window_that_cuts_rectangles_leaves_no_launch_and_a_longer_one_changes_nothing():
    tree = random_tree(2)
    assert launches_of(rectangles_of(tree, window=3), CPU) == []
    whole, long = (len(launches_of(rectangles_of(tree, w), CPU)) for w in (None, 500))
    assert whole == long > 1


@pytest.mark.usefixtures("dense_launches")
def test_where_no_launch_computes_a_window_the_rectangles_do():
    tree, scoring = random_tree(3), Scoring(0.3, window=5)
    ours, theirs = (
        outputs_and_grads(kernel(tree, CPU), inputs(tree), scoring)
        for kernel in (RectangleKernel, DenseKernel)
    )
    for mine, oracle in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=0, atol=1e-11)


def cuda_case(tree, *, size, dtype=torch.bfloat16):
    """The same rounded inputs in half precision on CUDA and in fp64 on the CPU."""
    exact = inputs(tree, num_heads=6, num_kv=2, size=size, value_size=size)
    halves = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    return halves, [x.detach().cpu().double().requires_grad_() for x in halves]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 64, 128, 192])
def test_cudas_kernel_equals_fp64_on_random_trees(size, dtype, monkeypatch):
    # The plain kernel is right too, but it is not what this test is of.
    monkeypatch.setattr(tree_attention.RectangleAttention, "apply", None)
    for seed in range(3):
        tree = random_tree(seed, num=10, length=300)
        halves, exact = cuda_case(tree, size=size, dtype=dtype)
        scoring = Scoring(size**-0.5)
        ours = outputs_and_grads_on(RectangleKernel(tree, torch.device("cuda")), halves, scoring)
        theirs = outputs_and_grads_on(DenseKernel(tree, CPU), exact, scoring)
        for mine, oracle in zip(ours, theirs, strict=True):
            assert (mine - oracle).norm() <= 1e-2 * oracle.norm()


@pytest.mark.cuda
@pytest.mark.parametrize(
    "scoring", [Scoring(0.3, softcap=1.5), Scoring(0.3, window=40)], ids=["a soft cap", "a window"]
)
def test_on_cuda_caps_and_windows_take_the_plain_kernel(scoring, monkeypatch):
    monkeypatch.setattr(FlashAttention, "apply", None)
    tree = random_tree(1, length=100)
    halves, exact = cuda_case(tree, size=64)
    with pytest.warns(UserWarning, match="plain matrix products"):
        ours = outputs_and_grads_on(RectangleKernel(tree, torch.device("cuda")), halves, scoring)
    theirs = outputs_and_grads_on(DenseKernel(tree, CPU), exact, scoring)
    for mine, oracle in zip(ours, theirs, strict=True):
        assert (mine - oracle).norm() <= 1e-2 * oracle.norm()


def outputs_and_grads_on(kernel, tensors, scoring):
    """As `outputs_and_grads`, in fp64 on the CPU, with one weighting for every device."""
    output = kernel(*tensors, scoring)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    weights = weights.to(torch.bfloat16).to(output)
    found = [output, *torch.autograd.grad((output * weights).sum(), tensors)]
    return [tensor.detach().cpu().double() for tensor in found]
