"""Actions at recorded states end where the model's positions do."""

from dataclasses import replace

import pytest
from tiny_training import SITES

from composer_replication.batch.render import render_state
from composer_replication.training.site_sampling import sample_site_actions

BUDGET = 6
"""Tokens of an action: the tiny trainer's completion length."""


def of_length(num_tokens, tokenizer):
    """A site whose state has so many tokens."""
    ids = render_state(tokenizer, SITES[0].state)
    return replace(SITES[0], state_ids=tuple((ids * num_tokens)[:num_tokens]))


@pytest.fixture
def trainer(build):
    trainer = build()
    # Cut off only by the budget, so that each has as many tokens as it may.
    trainer.generation_config.min_new_tokens = BUDGET
    return trainer


def sampled_lengths(trainer, state_lengths):
    sites = [of_length(n, trainer.processing_class) for n in state_lengths]
    found = sample_site_actions(trainer, sites, seed=0)
    assert all(site.is_on_policy for site in found)
    return [(len(site.state_ids), len(site.action_ids)) for site in found]


def test_an_action_near_the_last_position_is_cut_and_its_neighbours_are_not(trainer):
    last = trainer.model.config.max_position_embeddings
    lengths = [20, last - 2, last, last - BUDGET, last + 1]
    expected = [(20, BUDGET), (last - 2, 2), (last - BUDGET, BUDGET)]
    assert sampled_lengths(trainer, lengths) == expected


def test_states_without_room_alone_give_no_site(trainer):
    last = trainer.model.config.max_position_embeddings
    assert sampled_lengths(trainer, [last, last + 3]) == []


def test_a_model_without_positions_has_no_limit_but_the_budget(trainer):
    last = trainer.model.config.max_position_embeddings
    vars(trainer.model.config)["max_position_embeddings"] = None
    assert sampled_lengths(trainer, [last - 2]) == [(last - 2, BUDGET)]
