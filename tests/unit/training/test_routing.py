"""Routing: failures train SDPO alone, successes train GRPO alone, and nothing is trained twice."""

import collections
import itertools
from typing import ClassVar

import pytest
import torch
from test_rollouts import ROWS, make_trainer

from composer_replication import HintSite, Message
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.errors import ConfigError
from composer_replication.training.routing import (
    leave_grpo,
    sites_of_failures,
    sites_of_rollouts,
)


def row(reward, *names):
    sites = [
        HintSite((Message("user", "Do it."),), "Use file.", '{"path": 1}', source=name)
        for name in names
    ]
    return {"environment_reward": reward, "rollout_hint_sites": sites}


FAILED, RECOVERED, CLEAN = row(0.3, "a", "b"), row(1.0, "c"), row(1.0)
OTHER_FAILED = row(0.1, "d")
ROLLOUTS = [FAILED, RECOVERED, CLEAN, OTHER_FAILED]


def test_only_failed_rollouts_give_error_turns():
    assert [site.source for site in sites_of_failures(ROLLOUTS, 1.0)] == ["a", "b", "d"]
    assert [site.source for site in sites_of_failures(ROLLOUTS, 0.3)] == ["d"]
    assert [site.source for site in sites_of_rollouts(ROLLOUTS)] == ["a", "b", "c", "d"]
    assert sites_of_failures([], 1.0) == []


def test_a_rollout_whose_environment_failed_later_is_a_failure_with_its_error_turns():
    assert [site.source for site in sites_of_failures([row(None, "a"), row(1.0, "b")], 1.0)] == [
        "a"
    ]


def test_tenths_that_add_up_to_nearly_1_are_a_success():
    assert sum([0.1] * 10) < 1.0
    assert sites_of_failures([row(sum([0.1] * 10), "a")], 1.0) == []


def test_a_rollout_leaves_grpo_only_where_sdpo_takes_one_of_its_turns():
    advantages = torch.tensor([-0.3, 0.2, 0.4, -0.3])
    chosen = [FAILED["rollout_hint_sites"][1]]
    assert leave_grpo(chosen, ROLLOUTS, advantages) == 1
    assert advantages.tolist() == pytest.approx([0.0, 0.2, 0.4, -0.3])
    assert leave_grpo([], ROLLOUTS, advantages) == 0
    assert advantages.tolist() == pytest.approx([0.0, 0.2, 0.4, -0.3])


class SecondTrySucceeds:
    """Every other episode of a goal ends well at its second action; the others fail twice.

    Environments start side by side, so the order is that within a goal's group alone.
    """

    num_started: ClassVar = collections.defaultdict(itertools.count)

    def reset(self, *, goal, **row):
        self.succeeds = next(self.num_started[goal]) % 2 == 1
        self.num_actions = 0

    def _step_text(self, action):
        self.num_actions += 1
        if self.num_actions == 2 and self.succeeds:
            return Observation("ok", is_done=True)
        error = ToolError("bad_key", "wrong call.", '{"file": "x"}')
        return Observation("error: wrong call.", is_done=self.num_actions == 2, error=error)

    def get_reward(self):
        return 1.0 if self.succeeds else 0.0


def routed_run(tmp_path, tiny_llama, tokenizer, **changes):
    """The run's logged row, and the advantages that reached the loss."""
    trainer = make_trainer(
        tmp_path, tiny_llama(), tokenizer, environment=SecondTrySucceeds, rows=ROWS, **changes
    )
    seen = []
    compute = trainer._compute_loss

    def watched(model, inputs):
        seen.append(inputs["advantages"].clone())
        return compute(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return rows[0], torch.cat(seen)


def test_in_a_run_failures_have_no_advantage_and_successes_give_sdpo_no_token(
    tmp_path, tiny_llama, smollm2_tokenizer
):
    row, advantages = routed_run(
        tmp_path / "a",
        tiny_llama,
        smollm2_tokenizer,
        rollout_routing="failures",
        hint_sites_per_step=8,
    )
    assert row["rollouts/routed"] == 2
    assert sorted(advantages.tolist()) == pytest.approx([0.0, 0.0, 0.5, 0.5])
    plain, advantages = routed_run(
        tmp_path / "b", tiny_llama, smollm2_tokenizer, hint_sites_per_step=8
    )
    assert sorted(advantages.tolist()) == pytest.approx([-0.5, -0.5, 0.5, 0.5])
    assert "rollouts/routed" not in plain
    # Two failures have two error turns each; unrouted, the two successes add their first turns.
    assert plain["tokens/sdpo"] > row["tokens/sdpo"] > 0


def test_what_sdpo_has_no_room_for_stays_with_grpo(tmp_path, tiny_llama, smollm2_tokenizer):
    row, advantages = routed_run(
        tmp_path, tiny_llama, smollm2_tokenizer, rollout_routing="failures", hint_sites_per_step=1
    )
    assert row["rollouts/routed"] == 1
    assert sorted(advantages.tolist()) == pytest.approx([-0.5, 0.0, 0.5, 0.5])


def test_without_sdpo_nothing_is_routed(tmp_path, tiny_llama, smollm2_tokenizer):
    row, advantages = routed_run(
        tmp_path, tiny_llama, smollm2_tokenizer, rollout_routing="failures", alpha_sdpo=0.0
    )
    assert "rollouts/routed" not in row
    assert sorted(advantages.tolist()) == pytest.approx([-0.5, -0.5, 0.5, 0.5])


def test_routing_beside_channels_that_take_turns_is_refused(
    tmp_path, tiny_llama, smollm2_tokenizer
):
    with pytest.raises(ConfigError, match="failures would train nothing"):
        make_trainer(
            tmp_path,
            tiny_llama(),
            smollm2_tokenizer,
            rollout_routing="failures",
            channel_schedule="alternate",
        )
