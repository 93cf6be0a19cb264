"""Guards: runs that cannot learn stop at the step they were given, and others are let alone."""

import dataclasses
import math
import re

import pytest
import torch
from tiny_training import STATE, all_equal, even_tokens, run
from transformers import TrainerCallback, TrainerControl, TrainerState

from composer_replication import ComposerConfig, HintSite
from composer_replication.errors import ConfigError, TrainingError
from composer_replication.training.run_guards import RunGuards

WITHOUT_EFFECT = [HintSite(STATE, "", f'{{"path": {i}}}', source=f"e{i}") for i in range(4)]

HEALTHY = {
    "loss": 0.1,
    "loss/grpo": 0.0,
    "loss/sdpo": 0.03,
    "loss/dpo": 0.6,
    "tokens/grpo": 100.0,
    "tokens/sdpo": 20.0,
    "pairs/dpo": 2.0,
    "frac_reward_zero_std": 0.5,
    "reward": 0.3,
    "entropy": 1.2,
    "completions/mean_length": 30.0,
    "completions/clipped_ratio": 0.25,
    "completions/repetition": 0.02,
    "grad_norm": 0.7,
}


def config(**changes):
    changes = {"output_dir": "nowhere"} | changes
    return ComposerConfig(use_cpu=True, bf16=False, **changes)


def stopped_at(rows, channels=("sdpo", "dpo"), every=1, **changes):
    """The step at which guards stop a run that logs these rows every so many steps, and why."""
    args = config(**changes)
    guards = RunGuards(args, channels)
    history = []
    for number, row in enumerate(rows, 1):
        history.append({**row, "step": number * every})
        state = TrainerState(global_step=number * every, log_history=history)
        try:
            guards.on_log(args, state, TrainerControl(), logs=row)
        except TrainingError as error:
            return number * every, str(error)
    return None, ""


BAD = {
    "no_spread": ({"frac_reward_zero_std": 1.0}, "every advantage was 0"),
    "no_effect": ({"loss/sdpo": 3e-8}, "no hint teaches anything"),
    "entropy": ({"entropy": 0.004}, "under 0.01: the policy gives nearly the same rollout"),
    "short": ({"completions/mean_length": 1.5}, "1.5 tokens long on average, at most 2"),
    "repetition": ({"completions/repetition": 0.7}, "0.7 of their 4-grams before: the policy"),
    "cut_off": ({"completions/clipped_ratio": 1.0}, "every completion was cut off"),
    "non_finite": ({"grad_norm": math.inf}, "the gradient's norm was inf"),
    "no_data": ({"pairs/dpo": 0.0}, "no pairs reached dpo.*set beta_replay = 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_stretch_stops_the_run_at_its_last_allowed_step(name):
    change, words = BAD[name]
    bad = HEALTHY | change
    step, text = stopped_at([HEALTHY, HEALTHY, *[bad] * 9], **{f"guard_{name}_steps": 4})
    assert step == 6

    assert re.search(words, text), text
    assert f"Stopped at step 6 by guards.{name}_steps. Over steps 3 to 6 (4), " in text
    assert "There is no checkpoint" in text
    assert f"guards.{name}_steps = 0 (in Python guard_{name}_steps = 0)" in text


@pytest.mark.parametrize("name", BAD)
def test_one_good_step_begins_the_count_anew(name):
    bad = HEALTHY | BAD[name][0]
    rows = [bad, bad, bad, HEALTHY, bad, bad, bad, HEALTHY]
    assert stopped_at(rows, **{f"guard_{name}_steps": 4}) == (None, "")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("changes", [{"steps": 0}, {"steps": None}, {"enabled": False}])
def test_a_guard_that_is_off_stops_nothing(name, changes):
    prefix = f"guard_{name}_" if "steps" in changes else "guard_"
    settings = {f"{prefix}{key}": value for key, value in changes.items()}
    assert stopped_at([HEALTHY | BAD[name][0]] * 400, **settings) == (None, "")


@pytest.mark.parametrize(
    ("channel", "row", "words"),
    [
        ("sdpo", {"tokens/sdpo": 0.0, "loss/sdpo": 0.0}, "give hint_sites, or set alpha_sdpo = 0"),
        ("dpo", {"pairs/dpo": 0.0}, "Every pair was dropped or none was given"),
        ("grpo", {"tokens/grpo": 0.0, "entropy": 0.0}, "Every rollout was empty or masked"),
    ],
)
def test_a_channel_without_data_is_named_with_what_feeds_it(channel, row, words):
    step, text = stopped_at([HEALTHY | row] * 5, guard_no_data_steps=3, guard_entropy_steps=3)
    assert step == 3
    assert "guards.no_data_steps" in text
    assert f"reached {channel}" in text
    assert words in text


def test_where_channels_alternate_a_channels_own_steps_count():
    """SDPO has every other step: three of its own are over at step 5."""
    own = {k: v for k, v in HEALTHY.items() if k != "loss/dpo"} | {"loss/sdpo": 0.0, "pairs/dpo": 0}
    other = {k: v for k, v in HEALTHY.items() if k != "loss/sdpo"} | {"tokens/sdpo": 0}
    step, text = stopped_at([own, other] * 5, channel_schedule="alternate", guard_no_effect_steps=3)
    assert step == 5
    assert "Over steps 1 to 5 (3 of the channel's own)" in text
    assert stopped_at([own, other] * 5, channel_schedule="alternate", guard_no_data_steps=1) == (
        None,
        "",
    )


def test_a_row_covers_all_steps_since_the_one_before():
    bad = HEALTHY | {"frac_reward_zero_std": 1.0}
    step, text = stopped_at([HEALTHY, bad, bad, bad], every=10, guard_no_spread_steps=15)
    assert step == 30
    assert "Over steps 11 to 30 (20)" in text


def test_rows_between_two_generations_neither_break_a_stretch_nor_stop_it():
    bad = HEALTHY | {"frac_reward_zero_std": 1.0}
    silent = {k: v for k, v in HEALTHY.items() if k not in ("frac_reward_zero_std", "reward")}
    assert stopped_at([bad, silent] * 4, guard_no_spread_steps=4)[0] == 5
    assert stopped_at([bad, silent, silent, silent], guard_no_spread_steps=3) == (None, "")


def test_loss_scaling_may_overflow_in_a_row_before_it_finds_its_scale():
    args = config()
    args.fp16 = True
    guards = RunGuards(args, ())
    history = []
    for step in range(1, 20):
        history.append(HEALTHY | {"grad_norm": math.inf, "step": step})
        guards.on_log(args, TrainerState(global_step=step, log_history=history), None, HEALTHY)
    history.append(HEALTHY | {"grad_norm": math.inf, "step": 20})
    with pytest.raises(TrainingError, match=r"Over steps 1 to 20 \(20\)"):
        guards.on_log(args, TrainerState(global_step=20, log_history=history), None, HEALTHY)


def test_in_half_precision_what_rounding_makes_is_no_effect():
    row = HEALTHY | {"loss/sdpo": 5e-4, "step": 1}
    args = config(guard_no_effect_steps=1)
    state = TrainerState(global_step=1, log_history=[row])
    RunGuards(args, ["sdpo"]).on_log(args, state, TrainerControl(), logs=row)
    with pytest.raises(TrainingError, match=r"0\.0005 nats a token, under 0\.001"):
        RunGuards(args, ["sdpo"], is_fp32=False).on_log(args, state, TrainerControl(), logs=row)


def test_evaluation_rows_are_no_steps():
    bad = HEALTHY | {"frac_reward_zero_std": 1.0}
    evaluation = {"eval_loss": 0.1, "eval_frac_reward_zero_std": 0.0}
    args = config(guard_no_spread_steps=2)
    guards = RunGuards(args, ())
    history = [bad | {"step": 1}, evaluation | {"step": 1}]
    state = TrainerState(global_step=1, log_history=history)
    guards.on_log(args, state, TrainerControl(), logs=evaluation)
    history.append(bad | {"step": 2})
    with pytest.raises(TrainingError, match="steps 1 to 2"):
        guards.on_log(
            args, TrainerState(global_step=2, log_history=history), TrainerControl(), logs=bad
        )


@pytest.mark.parametrize(
    "name",
    [
        field.name
        for field in dataclasses.fields(ComposerConfig)
        if field.name.startswith("guard_") and field.name != "guard_enabled"
    ],
)
def test_a_negative_bound_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is -1; it must be at least 0"):
        config(**{name: -1})


# ---- real runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["entropy", "short", "repetition"])
def test_after_a_collapse_the_last_checkpoint_from_before_it_is_named(name, tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    bad = HEALTHY | BAD[name][0]
    rows = [*[HEALTHY] * 5, *[bad] * 4]
    args = {"output_dir": str(tmp_path), f"guard_{name}_steps": 4}
    assert "The last good checkpoint is checkpoint-4." in stopped_at(rows, **args)[1]
    # What cannot learn has spoilt nothing: the newest goes on.
    args = {"output_dir": str(tmp_path), "guard_no_spread_steps": 4}
    rows = [*[HEALTHY] * 5, *[HEALTHY | BAD["no_spread"][0]] * 4]
    assert "The last checkpoint is checkpoint-8." in stopped_at(rows, **args)[1]


def test_a_real_run_with_equal_rewards_stops_and_names_its_last_checkpoint(build):
    trainer = build(
        reward=all_equal,
        guard_no_spread_steps=3,
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert trainer.state.global_step == 3
    text = str(caught.value)
    assert "Over steps 1 to 3 (3), all rewards within every group were equal" in text
    assert "(mean reward 1)" in text
    # The third step's checkpoint would come after its row.
    assert "The last checkpoint is checkpoint-2." in text


def test_a_run_that_learns_is_not_stopped(build):
    rows = run(build(max_steps=4, guard_no_spread_steps=2, guard_no_effect_steps=2))
    assert len(rows) == 4


def test_hints_that_say_nothing_stop_a_real_run(build):
    trainer = build(hint_sites=WITHOUT_EFFECT, teacher="live", guard_no_effect_steps=2, max_steps=4)
    with pytest.raises(TrainingError, match="SDPO had tokens and its mean divergence was"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_hints_that_say_nothing_stop_a_run_in_bf16(build):
    """Sites of several lengths, so that teacher rows are padded otherwise than the student's."""
    sites = [*WITHOUT_EFFECT, *(HintSite(STATE, "", "one more path " * 4, source="long"),)]
    trainer = build(hint_sites=sites, teacher="live", bf16=True, guard_no_effect_steps=2)
    with pytest.raises(TrainingError, match=r"under 0\.001"):
        trainer.train()


def test_hints_that_say_nothing_stop_a_run_of_alternating_channels_at_sdpos_own_step(build):
    trainer = build(
        hint_sites=WITHOUT_EFFECT,
        teacher="live",
        channel_schedule="alternate",
        guard_no_effect_steps=2,
        max_steps=6,
    )
    with pytest.raises(TrainingError, match="Over steps 1 to 3"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_two_iterations_over_equal_rewards_count_as_steps(build):
    """Rows of the second iteration carry no rewards: they were judged with the first."""
    trainer = build(reward=all_equal, num_iterations=2, guard_no_spread_steps=3, max_steps=8)
    with pytest.raises(TrainingError, match="Over steps 1 to 3"):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_before_its_checkpoint(build, tmp_path):
    """The loss is 0 and finite; the slope of a square root at 0 is not."""
    trainer = build(save_strategy="steps", save_steps=1)
    trainer._compute_trace_replay_loss = lambda model, inputs: torch.sqrt(
        next(model.parameters()).square().sum() * 0.0
    )
    with pytest.raises(TrainingError, match="The gradient norm of step 1 is nan"):
        trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


class Killed(TrainerCallback):
    """Ends a run after a step, without a checkpoint of it."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def equal_from_the_second_step_on(completion_ids, trainer_state, **columns):
    if trainer_state.global_step >= 1:
        return all_equal(completion_ids)
    return even_tokens(completion_ids)


def test_a_resumed_run_stops_where_the_whole_one_would_have(build, tmp_path):
    """Steps 2 to 5 are bad; 2 and 3 are known from the checkpoint alone."""
    options = {
        "reward": equal_from_the_second_step_on,
        "guard_no_spread_steps": 4,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    first = build(**options)
    first.add_callback(Killed(4))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = build(**options)
    with pytest.raises(TrainingError, match=r"Over steps 2 to 5 \(4\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert again.state.global_step == 5
