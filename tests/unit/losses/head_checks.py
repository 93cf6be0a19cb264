"""Claims about `selected_logp`; each takes the module under test, so mutants can be tried too."""

import itertools
import math

import loss_oracles
import pytest
import torch

from composer_replication.errors import ConfigError, DataError

TARGETS = torch.tensor([3, 0, 10, 5, 5, 1, 7])


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def heads(module):
    weight, bias = normal(11, 5, seed=1), normal(11, seed=2)
    return (
        module.OutputHead(weight),
        module.OutputHead(weight, bias),
        module.OutputHead(weight, softcap=2.0),
        module.OutputHead(weight, bias, 0.7, 1.5),
    )


def dense_logits(hidden, head):
    """The head's definition, written out."""
    bias = 0 if head.bias is None else head.bias
    z = head.logit_scale * (torch.einsum("nh,vh->nv", hidden, head.weight) + bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def equals_the_plain_python_oracle(module):
    hidden = normal(7, 5)
    for head, temperature in itertools.product(heads(module), (1.0, 0.7)):
        expected = loss_oracles.logp_and_entropy(dense_logits(hidden, head), TARGETS, temperature)
        options = {"temperature": temperature, "tile_rows": 3}
        both = module.selected_logp(hidden, head, TARGETS, return_entropy=True, **options)
        alone = module.selected_logp(hidden, head, TARGETS, **options)
        torch.testing.assert_close(both, expected)
        torch.testing.assert_close(alone, expected[0])
        torch.testing.assert_close(head.logits(hidden), dense_logits(hidden, head))


def equals_values_worked_out_by_hand(module):
    # Logits (2, 0) at temperature 2 are (1, 0): log p_0 = 1 - ln(e + 1) = -0.3132617,
    # p_0 = 0.7310586, entropy = 0.7310586 * 0.3132617 + 0.2689414 * 1.3132617 = 0.5822034.
    hidden, weight = torch.tensor([[2.0]]), torch.tensor([[1.0], [0.0]])
    logp, entropy = module.selected_logp(
        hidden, weight, torch.tensor([0]), temperature=2.0, return_entropy=True
    )
    assert logp.tolist() == pytest.approx([-0.3132617], abs=1e-6)
    assert entropy.tolist() == pytest.approx([0.5822034], abs=1e-6)
    # Cap 1: (tanh 2, 0) = (0.9640276, 0), so log p_0 = 0.9640276 - ln(e^0.9640276 + 1).
    capped = module.selected_logp(hidden, module.OutputHead(weight, softcap=1.0), torch.tensor([0]))
    assert capped.item() == pytest.approx(0.9640276 - math.log(math.exp(0.9640276) + 1), abs=1e-6)


def gradient_equals_finite_differences(module):
    for head in heads(module):
        leaves = [normal(7, 5).requires_grad_(), head.weight.clone().requires_grad_()]
        if head.bias is not None:
            leaves.append(head.bias.clone().requires_grad_())

        def both(hidden, weight, bias=None, head=head):
            trained = module.OutputHead(weight, bias, head.logit_scale, head.softcap)
            return module.selected_logp(
                hidden, trained, TARGETS, temperature=1.3, return_entropy=True, tile_rows=3
            )

        torch.autograd.gradcheck(both, leaves)


def gradients_go_only_where_they_are_needed(module):
    weight, bias, hidden = normal(11, 5, seed=1), normal(11, seed=2), normal(7, 5)
    for needs in itertools.product((False, True), repeat=3):
        if not any(needs):
            continue
        leaves = [
            leaf.clone().requires_grad_(need)
            for leaf, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        logp = module.selected_logp(leaves[0], module.OutputHead(*leaves[1:]), TARGETS)
        logp.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(needs)


def unused_output_costs_no_gradient(module):
    hidden = normal(7, 5).requires_grad_()
    head = heads(module)[3]
    _, entropy = module.selected_logp(hidden, head, TARGETS, return_entropy=True)
    (only_entropy,) = torch.autograd.grad(entropy.sum(), hidden)
    z = dense_logits(hidden, head).log_softmax(-1)
    (expected,) = torch.autograd.grad(-(z.exp() * z).sum(), hidden)
    torch.testing.assert_close(only_entropy, expected)


def garbage_rows_leave_the_other_rows_and_the_head_alone(module):
    hidden, weight = normal(7, 5), normal(11, 5, seed=1)
    loss_mask = torch.tensor([True, False, True, True, False, True, True])
    dirty = hidden.clone()
    dirty[1], dirty[4, 2] = math.nan, math.inf

    for softcap in (None, 2.0):

        def run(values, softcap=softcap):
            h, w = values.clone().requires_grad_(), weight.clone().requires_grad_()
            head = module.OutputHead(w, softcap=softcap)
            logp, entropy = module.selected_logp(h, head, TARGETS, return_entropy=True, tile_rows=3)
            kept = torch.where(loss_mask, logp + 0.1 * entropy, 0.0)
            return kept.detach(), *torch.autograd.grad(kept.sum(), (h, w))

        torch.testing.assert_close(run(dirty), run(hidden))


def an_excluded_entry_has_no_nan(module):
    bias = torch.zeros(11, dtype=torch.float64)
    bias[2] = -math.inf
    hidden = normal(7, 5).requires_grad_()
    head = module.OutputHead(normal(11, 5, seed=1), bias)
    logp, entropy = module.selected_logp(hidden, head, TARGETS, return_entropy=True)
    (logp.sum() + entropy.sum()).backward()
    assert logp.isfinite().all()
    assert entropy.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad.norm(dim=-1) > 0).all()


def micro_batches_sum_to_one_large_batch(module):
    hidden, weight = normal(7, 5), normal(11, 5, seed=1)

    def head_grad(part):
        w = weight.clone().requires_grad_()
        logp = module.selected_logp(hidden[part], w, TARGETS[part])
        return torch.autograd.grad(logp.sum(), w)[0]

    torch.testing.assert_close(
        head_grad(slice(0, 3)) + head_grad(slice(3, 7)), head_grad(slice(0, 7))
    )


def no_rows_give_an_empty_result_in_the_graph(module):
    hidden = torch.zeros(0, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    logp, entropy = module.selected_logp(hidden, weight, targets, return_entropy=True)
    assert logp.shape == entropy.shape == (0,)
    loss = logp.sum() + entropy.sum()
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad.shape == (0, 5)
    assert weight.grad.eq(0).all()


def half_precision_inputs_give_fp32_results_under_autocast_too(module):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for hidden_dtype, head_dtype in itertools.product(dtypes, dtypes):
        h, w = normal(7, 5, dtype=hidden_dtype), normal(11, 5, seed=1, dtype=head_dtype)

        def run(h, w, autocast=False):
            h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logp = module.selected_logp(h, w, TARGETS, tile_rows=2)
            logp.sum().backward()
            return logp, h.grad, w.grad

        results, exact = run(h, w), run(h.double(), w.double())
        assert [x.dtype for x in results] == [torch.float32, hidden_dtype, head_dtype]
        for result, expected in zip(results, exact, strict=True):
            # Only the result is rounded to the input's precision, not the sums on the way.
            rounding = torch.finfo(result.dtype).eps
            torch.testing.assert_close(result.double(), expected, rtol=rounding + 1e-5, atol=1e-6)
        for cast, plain in zip(run(h, w, autocast=True), results, strict=True):
            torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def weight_gradient_is_summed_in_fp32(module):
    # 512 equal rows of weight 1/512 each: a bf16 sum would stop growing at 256 addends.
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long)
    (module.selected_logp(hidden, weight, targets, tile_rows=1) / 512).sum().backward()
    assert weight.grad.flatten().tolist() == [0.5, -0.5]


def impossible_arguments_say_what_to_do(module):
    hidden, weight = torch.zeros(7, 5), torch.zeros(11, 5)
    with pytest.raises(ConfigError, match=r"temperature is 0\.0"):
        module.selected_logp(hidden, weight, TARGETS, temperature=0.0)
    with pytest.raises(ConfigError, match="tile_rows is 0"):
        module.selected_logp(hidden, weight, TARGETS, tile_rows=0)
    with pytest.raises(DataError, match="hidden size 5 but its head takes 4"):
        module.selected_logp(hidden, module.OutputHead(torch.zeros(11, 4)), TARGETS)
    with pytest.raises(ConfigError, match="softcap is 0"):
        module.OutputHead(weight, softcap=0.0)


ALL = (
    equals_the_plain_python_oracle,
    equals_values_worked_out_by_hand,
    gradient_equals_finite_differences,
    gradients_go_only_where_they_are_needed,
    unused_output_costs_no_gradient,
    garbage_rows_leave_the_other_rows_and_the_head_alone,
    an_excluded_entry_has_no_nan,
    micro_batches_sum_to_one_large_batch,
    no_rows_give_an_empty_result_in_the_graph,
    half_precision_inputs_give_fp32_results_under_autocast_too,
    weight_gradient_is_summed_in_fp32,
    impossible_arguments_say_what_to_do,
)
