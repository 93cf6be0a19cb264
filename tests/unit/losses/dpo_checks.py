"""Claims about `dpo_loss`; each takes the module under test, so mutants can be tried too."""

import math

import loss_oracles
import pytest
import torch

from composer_replication.errors import ConfigError


def pairs(num_pairs=5, seed=0, dtype=torch.float64):
    """Chosen, rejected, reference chosen, reference rejected."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, num_pairs, generator=generator, dtype=torch.float64).mul(3).sub(20)
    return [row.clone().to(dtype) for row in values]


def equals_the_plain_python_oracle(dpo):
    logps = pairs()
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.3], dtype=torch.float64)
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.2), (2.0, 0.4)):
        rows = zip(*(row.tolist() for row in logps), strict=True)
        losses = [loss_oracles.dpo_pair(*row, beta, smoothing) for row in rows]
        options = {"beta": beta, "label_smoothing": smoothing}
        result = dpo.dpo_loss(*logps, **options)
        assert result.loss_sum.item() == pytest.approx(math.fsum(losses), rel=1e-10)
        weighted = dpo.dpo_loss(*logps, pair_weights=weights, **options)
        expected = math.fsum(w * x for w, x in zip(weights.tolist(), losses, strict=True))
        assert weighted.loss_sum.item() == pytest.approx(expected, rel=1e-10)


def equals_values_worked_out_by_hand(dpo):
    # Ratios: chosen -10 - (-12) = 2, rejected -11 - (-10) = -1, margin 3, beta 0.5: 1.5.
    # -ln sigmoid(1.5) = ln(1 + e^-1.5) = 0.2014133, -ln sigmoid(-1.5) = 1.7014133.
    logps = [torch.tensor([value]) for value in (-10.0, -11.0, -12.0, -10.0)]
    result = dpo.dpo_loss(*logps, beta=0.5)
    assert result.loss_sum.item() == pytest.approx(0.2014133, abs=1e-6)
    assert result.num_pairs == 1
    assert result.chosen_rewards.tolist() == [1.0]
    assert result.rejected_rewards.tolist() == [-0.5]
    assert result.accuracy.item() == 1.0
    # Smoothing 0.1, weight 2: 2 * (0.9 * 0.2014133 + 0.1 * 1.7014133) = 0.7028266.
    smoothed = dpo.dpo_loss(*logps, beta=0.5, label_smoothing=0.1, pair_weights=torch.tensor([2.0]))
    assert smoothed.loss_sum.item() == pytest.approx(0.7028266, abs=1e-6)


def gradient_equals_finite_differences(dpo):
    chosen, rejected, ref_chosen, ref_rejected = pairs()
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.3], dtype=torch.float64)

    def loss(policy_chosen, policy_rejected):
        return dpo.dpo_loss(
            policy_chosen,
            policy_rejected,
            ref_chosen,
            ref_rejected,
            beta=0.4,
            label_smoothing=0.1,
            pair_weights=weights,
        ).loss_sum

    torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


def only_the_policy_gets_a_gradient(dpo):
    leaves = [row.requires_grad_() for row in pairs()]
    weights = torch.ones(5, dtype=torch.float64, requires_grad=True)
    result = dpo.dpo_loss(*leaves, pair_weights=weights)
    result.loss_sum.backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, True, False, False]
    assert weights.grad is None
    assert leaves[0].grad.lt(0).all(), "descent must raise the chosen log-probability"
    assert leaves[1].grad.gt(0).all(), "descent must lower the rejected log-probability"
    for metric in (result.chosen_rewards, result.rejected_rewards, result.accuracy):
        assert not metric.requires_grad


def garbage_in_a_pair_of_weight_zero_changes_nothing(dpo):
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.3], dtype=torch.float64)

    def run(logps):
        leaves = [row.clone().requires_grad_() for row in logps[:2]]
        result = dpo.dpo_loss(*leaves, *logps[2:], pair_weights=weights, label_smoothing=0.1)
        return result.loss_sum, *torch.autograd.grad(result.loss_sum, leaves)

    clean = pairs()
    dirty = [row.clone() for row in clean]
    dirty[0][1], dirty[2][1], dirty[1][3] = -math.inf, -math.inf, math.nan
    for value, expected in zip(run(dirty), run(clean), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def micro_batches_sum_to_one_large_batch(dpo):
    logps = pairs()
    weights = torch.tensor([1.0, 0.5, 2.0, 0.7, 0.3], dtype=torch.float64)
    whole = dpo.dpo_loss(*logps, pair_weights=weights)
    parts = [
        dpo.dpo_loss(*(row[part] for row in logps), pair_weights=weights[part])
        for part in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum)
    assert sum(part.num_pairs for part in parts) == whole.num_pairs == 5


def no_pairs_give_zero_in_the_graph(dpo):
    leaves = [torch.zeros(0, requires_grad=True) for _ in range(2)]
    result = dpo.dpo_loss(*leaves, torch.zeros(0), torch.zeros(0))
    assert result.loss_sum.item() == 0
    assert result.num_pairs == 0
    assert result.accuracy.item() == 0
    result.loss_sum.backward()
    assert all(leaf.grad.shape == (0,) for leaf in leaves)


def accuracy_counts_pairs_whose_chosen_side_gained_more(dpo):
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    result = dpo.dpo_loss(chosen, rejected, torch.zeros(4), torch.zeros(4))
    assert result.accuracy.item() == 0.5


def extreme_margins_stay_finite(dpo):
    logps = [torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), torch.zeros(2), torch.zeros(2)]
    chosen = logps[0].requires_grad_()
    result = dpo.dpo_loss(*logps, beta=1.0)
    result.loss_sum.backward()
    assert result.loss_sum.item() == pytest.approx(1e4)
    assert chosen.grad.tolist() == pytest.approx([-1.0, 0.0])


def bf16_log_probabilities_are_subtracted_in_fp32(dpo):
    logps = pairs(dtype=torch.bfloat16)
    result = dpo.dpo_loss(*logps)
    assert result.loss_sum.dtype == torch.float32
    exact = dpo.dpo_loss(*(row.double() for row in logps)).loss_sum
    torch.testing.assert_close(result.loss_sum.double(), exact, rtol=1e-6, atol=0)


def impossible_options_say_what_to_do(dpo):
    for beta in (0.0, -0.1, math.nan):
        with pytest.raises(ConfigError, match="Pass a beta above 0"):
            dpo.dpo_loss(*pairs(), beta=beta)
    for smoothing in (-0.1, 0.5, 1.0):
        with pytest.raises(ConfigError, match="Lower label_smoothing"):
            dpo.dpo_loss(*pairs(), label_smoothing=smoothing)


ALL = (
    equals_the_plain_python_oracle,
    equals_values_worked_out_by_hand,
    gradient_equals_finite_differences,
    only_the_policy_gets_a_gradient,
    garbage_in_a_pair_of_weight_zero_changes_nothing,
    micro_batches_sum_to_one_large_batch,
    no_pairs_give_zero_in_the_graph,
    accuracy_counts_pairs_whose_chosen_side_gained_more,
    extreme_margins_stay_finite,
    bf16_log_probabilities_are_subtracted_in_fp32,
    impossible_options_say_what_to_do,
)
