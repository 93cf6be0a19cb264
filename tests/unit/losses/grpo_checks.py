"""Claims about `grpo_loss`; each takes the module under test, so mutants can be tried too."""

import itertools
import math

import loss_oracles
import pytest
import torch

from composer_replication.errors import ConfigError, DataError

LOSS_TYPES = ("dr_grpo", "dapo", "grpo", "bnpo")
LEVELS = ("token", "sequence")
MAX_LENGTH = 8


def rollouts(seed=0, dtype=torch.float64):
    """Policy and old log-probs, advantages and a mask with a tool gap, padding and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    policy = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    old = policy + 0.4 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    advantages = torch.randn(4, generator=generator, dtype=torch.float64)
    loss_mask = torch.tensor(
        [[1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    ).bool()
    return policy.to(dtype), old.to(dtype), advantages.to(dtype), loss_mask


def every_kind():
    for loss_type, level, delta in itertools.product(LOSS_TYPES, LEVELS, (None, 1.3)):
        yield {
            "loss_type": loss_type,
            "importance_sampling_level": level,
            "epsilon_low": 0.15,
            "epsilon_high": 0.25,
            "delta": delta,
            "max_completion_length": MAX_LENGTH,
        }


def step_loss(result):
    return result.loss_sum / result.denominator.clamp(min=1)


def oracle(policy, old, advantages, loss_mask, options):
    num_columns = policy.shape[1]
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(-1, num_columns)
    rows = loss_oracles.grpo_tokens(
        policy.tolist(),
        old.tolist(),
        advantages.tolist(),
        loss_mask.tolist(),
        level=options["importance_sampling_level"],
        low=options["epsilon_low"],
        high=options["epsilon_high"],
        delta=options["delta"],
    )
    tokens = [token for row in rows for token in row]
    if options["loss_type"] == "dr_grpo":
        return math.fsum(tokens) / (len(rows) * MAX_LENGTH)
    if options["loss_type"] == "grpo":
        return math.fsum(math.fsum(row) / max(len(row), 1) for row in rows) / len(rows)
    return math.fsum(tokens) / len(tokens)


def equals_the_plain_python_oracle(grpo):
    policy, old, advantages, loss_mask = rollouts()
    token_advantages = advantages[:, None] * torch.linspace(-1, 1, 6, dtype=torch.float64)
    for options, used in itertools.product(every_kind(), (advantages, token_advantages)):
        result = grpo.grpo_loss(policy, old, used, loss_mask, **options)
        expected = oracle(policy, old, used, loss_mask, options)
        assert step_loss(result).item() == pytest.approx(expected, rel=1e-10)


def equals_values_worked_out_by_hand(grpo):
    # Two rollouts of up to 4 tokens. Ratios: (2, 1) and (0.5); advantages 1 and -1; clip 0.8..1.2.
    # Tokens: -min(2, 1.2) = -1.2; -min(1, 1) = -1; -min(-0.5, -0.8) = 0.8. Sum -1.4.
    policy = torch.tensor([[math.log(2.0), 0.0, 0.0], [math.log(0.5), 0.0, 0.0]])
    old = torch.zeros(2, 3)
    advantages = torch.tensor([1.0, -1.0])
    loss_mask = torch.tensor([[True, True, False], [True, False, False]])
    by_hand = {
        "dr_grpo": (-1.4, 2 * 4),
        "dapo": (-1.4, 3),
        # Rollout means: (-1.2 - 1) / 2 = -1.1 and 0.8.
        "grpo": (-0.3, 2),
        "bnpo": (-1.4 / 3, 1),
    }
    for loss_type, (loss_sum, denominator) in by_hand.items():
        result = grpo.grpo_loss(
            policy, old, advantages, loss_mask, loss_type=loss_type, max_completion_length=4
        )
        assert result.loss_sum.item() == pytest.approx(loss_sum, abs=1e-6)
        assert result.denominator.item() == denominator
        # The first token of each rollout is past its clip in the direction of its advantage.
        assert (result.num_clipped.item(), result.num_tokens.item()) == (2, 3)
        assert result.clip_fraction.item() == pytest.approx(2 / 3)
    # Sequence level: rollout 1 has ratio exp(mean(ln 2, 0)) = sqrt 2 on both tokens.
    result = grpo.grpo_loss(
        policy,
        old,
        advantages,
        loss_mask,
        loss_type="dapo",
        importance_sampling_level="sequence",
        epsilon_high=0.5,
    )
    assert result.loss_sum.item() == pytest.approx(-2 * math.sqrt(2) + 0.8, abs=1e-6)


def gradient_equals_finite_differences(grpo):
    policy, old, advantages, loss_mask = rollouts()
    for options in every_kind():
        torch.autograd.gradcheck(
            lambda p, options=options: (
                grpo.grpo_loss(p, old, advantages, loss_mask, **options).loss_sum
            ),
            (policy.requires_grad_(),),
        )


def only_the_policy_gets_a_gradient(grpo):
    policy, old, advantages, loss_mask = rollouts()
    leaves = [x.requires_grad_() for x in (policy, old, advantages)]
    for old_logp in (old, None):
        result = grpo.grpo_loss(policy, old_logp, advantages, loss_mask, max_completion_length=8)
        grads = torch.autograd.grad(result.loss_sum, leaves, allow_unused=True)
        assert [grad is not None for grad in grads] == [True, False, False]


def without_old_policy_the_gradient_is_the_policy_gradient(grpo):
    policy, _, advantages, loss_mask = rollouts()
    result = grpo.grpo_loss(policy.requires_grad_(), None, advantages, loss_mask, loss_type="dapo")
    (grad,) = torch.autograd.grad(result.loss_sum, policy)
    torch.testing.assert_close(grad, -advantages[:, None] * loss_mask)
    torch.testing.assert_close(result.loss_sum, -(advantages[:, None] * loss_mask).sum())


def masked_garbage_changes_nothing(grpo):
    policy, old, advantages, loss_mask = rollouts()
    advantages = advantages[:, None].repeat(1, 6)
    dirty = [x.clone() for x in (policy, old, advantages)]
    dirty[0][~loss_mask] = -math.inf
    dirty[1][0, 2], dirty[1][2, 0], dirty[1][3, 5] = math.nan, -math.inf, math.inf
    dirty[2][1, 4], dirty[2][2] = math.nan, math.inf
    for options in every_kind():

        def run(p, o, a, options=options):
            leaf = p.clone().requires_grad_()
            result = grpo.grpo_loss(leaf, o, a, loss_mask, **options)
            return *result, torch.autograd.grad(result.loss_sum, leaf)[0]

        for value, clean in zip(run(*dirty), run(policy, old, advantages), strict=True):
            torch.testing.assert_close(value, clean, rtol=0, atol=0)


def micro_batches_sum_to_one_large_batch(grpo):
    policy, old, advantages, loss_mask = rollouts()
    inputs = (policy, old, advantages, loss_mask)
    for options in every_kind():
        if options["loss_type"] == "bnpo":
            continue
        whole = grpo.grpo_loss(*inputs, **options)
        parts = [
            grpo.grpo_loss(*(x[part] for x in inputs), **options)
            for part in (slice(0, 1), slice(1, 4))
        ]
        for field, total in zip(zip(*parts, strict=True), whole, strict=True):
            torch.testing.assert_close(sum(field), total)


def bnpo_is_the_mean_of_micro_batch_means(grpo):
    inputs = rollouts()
    parts = [
        grpo.grpo_loss(*(x[part] for x in inputs), loss_type="bnpo")
        for part in (slice(0, 1), slice(1, 4))
    ]
    dapo = [
        grpo.grpo_loss(*(x[part] for x in inputs), loss_type="dapo")
        for part in (slice(0, 1), slice(1, 4))
    ]
    means = [part.loss_sum / part.denominator for part in dapo]
    step = sum(part.loss_sum for part in parts) / sum(part.denominator for part in parts)
    torch.testing.assert_close(step, sum(means) / 2)


def nothing_to_train_on_gives_zero_in_the_graph(grpo):
    for options in every_kind():
        for shape in ((0, 6), (3, 0), (3, 6)):
            policy = torch.zeros(shape, requires_grad=True)
            result = grpo.grpo_loss(
                policy, None, torch.ones(shape[0]), torch.zeros(shape).bool(), **options
            )
            assert result.loss_sum.item() == 0
            assert result.num_tokens.item() == 0
            assert result.clip_fraction.item() == 0
            result.loss_sum.backward()
            assert policy.grad.eq(0).all()


def bf16_log_probabilities_are_compared_in_fp32(grpo):
    policy, old, advantages, loss_mask = rollouts(dtype=torch.bfloat16)
    result = grpo.grpo_loss(policy, old, advantages.float(), loss_mask, loss_type="dapo")
    assert result.loss_sum.dtype == torch.float32
    exact = grpo.grpo_loss(
        policy.double(), old.double(), advantages.double(), loss_mask, loss_type="dapo"
    )
    torch.testing.assert_close(result.loss_sum.double(), exact.loss_sum, rtol=1e-5, atol=1e-6)


def advantages_equal_values_worked_out_by_hand(grpo):
    # Groups (1, 3) and (0, 2): means 2 and 1; unbiased deviations sqrt(2) both.
    rewards = torch.tensor([1.0, 3.0, 0.0, 2.0])
    assert grpo.group_advantages(rewards, 2).tolist() == [-1.0, 1.0, -1.0, 1.0]
    scaled = 1 / (math.sqrt(2) + 1e-4)
    expected = [-scaled, scaled, -scaled, scaled]
    assert grpo.group_advantages(rewards, 2, "group").tolist() == pytest.approx(expected)
    # All four: mean 1.5, squares 0.25 + 2.25 + 2.25 + 0.25 = 5, deviation sqrt(5 / 3).
    scaled = 1 / (math.sqrt(5 / 3) + 1e-4)
    expected = [-scaled, scaled, -scaled, scaled]
    assert grpo.group_advantages(rewards, 2, "batch").tolist() == pytest.approx(expected)


def equal_or_unscored_rewards_have_zero_advantage(grpo):
    rewards = torch.tensor([2.0, 2.0, 2.0, math.nan, 1.0, 4.0, math.nan, math.nan, 5.0])
    for scale in ("none", "group", "batch"):
        advantages = grpo.group_advantages(rewards, 3, scale)
        assert advantages[[0, 1, 2, 3, 6, 7, 8]].eq(0).all()
        assert advantages[4] < 0 < advantages[5]
    assert grpo.group_advantages(torch.zeros(0), 4).shape == (0,)


def impossible_options_say_what_to_do(grpo):
    inputs = rollouts()
    for options, words in (
        ({"loss_type": "dapp"}, "Did you mean 'dapo'"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequense"}, "Did you mean 'sequence'"),
        ({}, "max_completion_length is None"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            grpo.grpo_loss(*inputs, **options)
    with pytest.raises(ConfigError, match="num_generations is 1"):
        grpo.group_advantages(torch.zeros(4), 1)
    with pytest.raises(ConfigError, match="Did you mean 'group'"):
        grpo.group_advantages(torch.zeros(4), 2, "groups")
    with pytest.raises(DataError, match="5 rewards are not whole groups of 2"):
        grpo.group_advantages(torch.zeros(5), 2)


ALL = (
    equals_the_plain_python_oracle,
    equals_values_worked_out_by_hand,
    gradient_equals_finite_differences,
    only_the_policy_gets_a_gradient,
    without_old_policy_the_gradient_is_the_policy_gradient,
    masked_garbage_changes_nothing,
    micro_batches_sum_to_one_large_batch,
    bnpo_is_the_mean_of_micro_batch_means,
    nothing_to_train_on_gives_zero_in_the_graph,
    bf16_log_probabilities_are_compared_in_fp32,
    advantages_equal_values_worked_out_by_hand,
    equal_or_unscored_rewards_have_zero_advantage,
    impossible_options_say_what_to_do,
)
