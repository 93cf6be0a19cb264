"""An option that the chosen path would ignore is refused; a weight of 0 leaves a note instead."""

import pytest

from composer_replication.config.loading import dump_config, load_config
from composer_replication.config.unused_options import check_used_options
from composer_replication.errors import ConfigError

FIXED = ["smoke.fixed_shapes=[2, 64]", "grpo.per_device_train_batch_size=2"]

REFUSED = {
    "average_of_a_frozen_teacher": (
        ["teacher=frozen", "sdpo.teacher_ema_rate=0.1"],
        "sdpo.teacher_ema_rate is 0.1 and teacher is 'frozen', which follows no average. "
        "Set teacher = 'ema', or leave sdpo.teacher_ema_rate out.",
    ),
    "average_of_the_teacher_that_lora_chooses": (
        ["lora.r=8", "sdpo.teacher_ema_rate=0.1"],
        "sdpo.teacher_ema_rate is 0.1 and teacher is 'frozen' by default under [lora], which "
        "follows no average. Set teacher = 'ema', or leave sdpo.teacher_ema_rate out.",
    ),
    "judge_of_nothing": (
        [*FIXED, "rollout.environment=api_drift"],
        "rollout.environment is 'api_drift' and smoke.fixed_shapes is [2, 64]: nothing is sampled "
        "or judged then. Leave one of them out.",
    ),
    "turns_of_nothing": (
        [*FIXED, "rollout.max_turns=2"],
        "rollout.max_turns is 2 and smoke.fixed_shapes is [2, 64]: nothing is sampled or judged "
        "then. Leave one of them out.",
    ),
    "data_that_is_not_read": (
        [*FIXED, "data=folder"],
        "data is 'folder' and smoke.fixed_shapes is [2, 64]: rows of that length are made up, and "
        "no data is read. Leave one of them out.",
    ),
    "limit_under_the_fixed_length": (
        [*FIXED, "batch.max_context_tokens=32"],
        "batch.max_context_tokens is 32 and smoke.fixed_shapes is [2, 64]: rows of 64 tokens are "
        "over that limit. Leave batch.max_context_tokens out.",
    ),
    "other_number_of_rows": (
        ["smoke.fixed_shapes=[2, 64]"],
        "smoke.fixed_shapes is [2, 64], which asks for 2 rows, and "
        "grpo.per_device_train_batch_size is 8. Make them equal.",
    ),
    "turns_without_environment": (
        ["rollout.reward=package.module:score", "rollout.max_turns=2"],
        "rollout.max_turns is 2 and rollout.reward is 'package.module:score': without an "
        "environment a rollout is one turn of grpo.max_completion_length tokens. Leave "
        "rollout.max_turns out.",
    ),
}


@pytest.mark.parametrize(("overrides", "text"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_ignored_is_refused(overrides, text):
    with pytest.raises(ConfigError) as caught:
        check_used_options(load_config(None, overrides))
    assert str(caught.value) == text


NOTED = {
    "nothing": ([], []),
    "sdpo_off": (
        ["alpha_sdpo=0", "sdpo.beta=1", "sdpo.teacher_ema_rate=0.1", "teacher=live"],
        ["alpha_sdpo is 0, so without effect: sdpo.beta, sdpo.teacher_ema_rate, teacher."],
    ),
    "dpo_off": (
        ["beta_replay=0", "dpo.beta=0.2"],
        ["beta_replay is 0, so without effect: dpo.beta."],
    ),
    "off_at_its_defaults": (["alpha_sdpo=0", "beta_replay=0"], []),
    "both_off": (
        ["alpha_sdpo=0", "beta_replay=0", "batch.max_context_tokens=64"],
        ["alpha_sdpo and beta_replay are 0, so without effect: batch.max_context_tokens."],
    ),
    "one_channel_alternates": (
        ["beta_replay=0", "batch.channel_schedule=alternate"],
        ["batch.channel_schedule is 'alternate' and only one channel is on."],
    ),
    "a_channel_of_ones_own_may_read_it": (["alpha_sdpo=0", "sdpo.beta=1", "channels.mine=1"], []),
    "average_of_an_ema_teacher": (["teacher=ema", "sdpo.teacher_ema_rate=0.1"], []),
    "the_default_rate_beside_a_frozen_teacher": (
        ["teacher=frozen", "sdpo.teacher_ema_rate=0.05"],
        [],
    ),
}


@pytest.mark.parametrize(("overrides", "notes"), NOTED.values(), ids=NOTED)
def test_a_weight_of_0_leaves_a_note_since_sweeps_go_through_it(overrides, notes):
    assert check_used_options(load_config(None, overrides)) == notes


@pytest.mark.parametrize("overrides", [case[0] for case in NOTED.values()], ids=NOTED)
def test_a_resolved_configuration_which_holds_every_key_passes_again(tmp_path, overrides):
    config = load_config(None, overrides)
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config))
    assert check_used_options(load_config(path, [])) == check_used_options(config)
