"""The weight of a token is the teacher's acceptance of what stands before it."""

import math

import pytest
import torch

from composer_replication.losses.acceptance import prefix_acceptance


def oracle(policy, teacher, sites):
    """Plain Python, in float64."""
    weights = []
    for index, site in enumerate(sites):
        product = 1.0
        for earlier in range(index):
            if sites[earlier] == site:
                product *= min(1.0, math.exp(teacher[earlier] - policy[earlier]))
        weights.append(product)
    return weights


def test_hand_values():
    policy = torch.tensor([0.5, 1.0, 0.8, 0.25, 0.5]).log()
    teacher = torch.tensor([0.9, 0.25, 0.4, 0.5, 0.1]).log()
    sites = torch.tensor([0, 0, 0, 1, 1])
    found = prefix_acceptance(policy, teacher, sites)
    # More likely under the teacher is accepted; a quarter; half of that counts no more.
    assert found.tolist() == pytest.approx([1.0, 1.0, 0.25, 1.0, 1.0])


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_the_oracle(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (6,), generator=generator)
    sites = torch.repeat_interleave(torch.arange(6), lengths)
    policy, teacher = -3 * torch.rand(2, len(sites), generator=generator, dtype=torch.float64)
    expected = oracle(policy.tolist(), teacher.tolist(), sites.tolist())
    assert prefix_acceptance(policy, teacher, sites).tolist() == pytest.approx(expected, abs=1e-12)


def test_an_impossible_token_ends_what_counts_and_touches_no_other_action():
    policy = torch.zeros(5)
    teacher = torch.tensor([0.0, -math.inf, 0.0, 0.0, 0.0])
    found = prefix_acceptance(policy, teacher, torch.tensor([4, 4, 4, 7, 7]))
    assert found.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_equal_sides_weigh_nothing_down_and_no_gradient_passes():
    policy = torch.randn(6, requires_grad=True)
    found = prefix_acceptance(policy, policy.detach(), torch.zeros(6, dtype=torch.long))
    assert found.tolist() == [1.0] * 6
    assert not found.requires_grad


def test_no_token_has_no_weight():
    assert prefix_acceptance(torch.zeros(0), torch.zeros(0), torch.zeros(0).long()).shape == (0,)
