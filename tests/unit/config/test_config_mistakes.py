"""Each mistake in a configuration is one sentence: the value, why it cannot work, what to do."""

import pytest

from composer_replication.config.loading import load_config
from composer_replication.errors import ConfigError

CHANGE = "Change it in the file or with --set"
SHAPE = (
    "`[B, T]`: B rows of T tokens, the same at every step and sampled from nothing; None: real "
    "rollouts. T holds a state, a hint and an action."
)

MISTAKES = {
    "zero_temperature": (
        ["sdpo.temperature=0"],
        "sdpo.temperature is 0; it must be greater than 0. Divides the logits of student and "
        f"teacher before the softmax. {CHANGE} sdpo.temperature=VALUE.",
    ),
    "boolean_as_number": (
        ["seed=true"],
        "seed is True; it must be a whole number. Seeds Python, NumPy and torch. "
        f"{CHANGE} seed=VALUE.",
    ),
    "weight_is_nan": (
        ["alpha_sdpo=nan"],
        "alpha_sdpo is nan; it must be a finite number. Weight of SDPO; 0 turns the channel off. "
        f"{CHANGE} alpha_sdpo=VALUE.",
    ),
    "text_as_number": (
        ["beta_replay=much"],
        "beta_replay is 'much'; it must be a number. Weight of trace-replay DPO; 0 turns the "
        f"channel off. {CHANGE} beta_replay=VALUE.",
    ),
    "unknown_teacher": (
        ["teacher=emma"],
        "teacher is 'emma'; it must be 'live', 'ema' or 'frozen'. Weights of the hint-conditioned "
        "teacher: the policy's own, a slow copy of them, or the start's; None: `ema`, or `frozen` "
        f"under LoRA. {CHANGE} teacher=VALUE.",
    ),
    "clip_without_value": (
        ["sdpo.clip=token"],
        "sdpo.clip is 'token' and sdpo.clip_value is not set, so there is no bound to clip at. "
        "Set sdpo.clip_value, or leave sdpo.clip out.",
    ),
    "value_without_clip": (
        ["sdpo.clip_value=2.5"],
        "sdpo.clip_value is 2.5 and sdpo.clip is not set, so nothing would be clipped. "
        "Set sdpo.clip to 'token' or 'entry'.",
    ),
    "tail_without_top_k": (
        ["sdpo.tail=true"],
        "sdpo.tail is true and sdpo.top_k is not set. The whole vocabulary is compared then and "
        "leaves no tail. Set sdpo.top_k, or leave sdpo.tail out.",
    ),
    "top_k_from_without_top_k": (
        ["sdpo.top_k_from=policy"],
        "sdpo.top_k_from is 'policy' and sdpo.top_k is not set. The whole vocabulary is compared "
        "then and nothing is chosen. Set sdpo.top_k, or leave sdpo.top_k_from out.",
    ),
    "truncation_without_limit": (
        ["batch.truncation=middle"],
        "batch.truncation is 'middle' and batch.max_context_tokens is not set, so no row is ever "
        "too long. Set batch.max_context_tokens, or leave batch.truncation out.",
    ),
    "two_judges": (
        ["rollout.environment=api_drift", "rollout.reward=mine:score"],
        "rollout.environment is 'api_drift' and rollout.reward is 'mine:score'. An environment "
        "judges its own rollouts, so only one of them can give the reward. Leave one of them out.",
    ),
    "environment_misspelt": (
        ["rollout.environment=api_drfit"],
        "rollout.environment is 'api_drfit', which is neither a shipped environment nor "
        "'package.module:Class'. Did you mean 'api_drift'?",
    ),
    "reward_is_no_import_path": (
        ["rollout.reward=score.py"],
        "rollout.reward is 'score.py', which names no function to import. "
        "Write 'package.module:function'.",
    ),
    "fixed_rows_too_short": (
        ["smoke.fixed_shapes=[2, 8]"],
        f"smoke.fixed_shapes[1] is 8; it must be at least 16. {SHAPE} "
        f"{CHANGE} smoke.fixed_shapes=VALUE.",
    ),
    "fixed_shape_of_one_number": (
        ["smoke.fixed_shapes=[2]"],
        f"smoke.fixed_shapes[1] is missing. {SHAPE} Write every item of the array.",
    ),
    "two_shapes": (
        ["smoke.fixed_shapes=[2, 64]", "smoke.max_shape_tokens=128"],
        "smoke.fixed_shapes is [2, 64] and smoke.max_shape_tokens is 128. Every step already has "
        "the fixed shape, so there is no larger one to measure. Leave one of them out.",
    ),
    "core_channel_among_further_ones": (
        ["channels.sdpo=0.5"],
        "channels.sdpo is 0.5; [channels] weighs further channels, and 'sdpo' is a core one. "
        "Set alpha_sdpo instead.",
    ),
    "group_of_one": (
        ["grpo.num_generations=1"],
        "grpo.num_generations is 1; it must be at least 2. One rollout is its own baseline, so "
        "every advantage would be 0 and GRPO would not train. Raise grpo.num_generations.",
    ),
    "infinity_passed_through_to_trl": (
        ["grpo.extra.rates=[1.0, inf]"],
        "grpo.extra.rates[1] is inf; it must be a finite number. `[grpo]`: GRPOConfig's own keys, "
        f"passed through to TRL, which checks them when it starts. {CHANGE} "
        "grpo.extra.rates=VALUE.",
    ),
    "wrong_member_of_a_union": (
        ["lora.target_modules=[1]"],
        "lora.target_modules[0] is 1; it must be text. Names of the modules that get an adapter, "
        f"or every linear one. {CHANGE} lora.target_modules=VALUE.",
    ),
    "neither_member_of_a_union": (
        ["lora.target_modules=every"],
        "lora.target_modules is 'every'; it must be an array or 'all-linear'. Names of the modules "
        f"that get an adapter, or every linear one. {CHANGE} lora.target_modules=VALUE.",
    ),
    "misspelt_in_its_section": (
        ["sdpo.temprature=1"],
        "unknown key 'sdpo.temprature'. Did you mean 'sdpo.temperature'?",
    ),
    "section_left_out": (
        ["teacher_ema_rate=0.1"],
        "unknown key 'teacher_ema_rate'. Did you mean 'sdpo.teacher_ema_rate'? "
        "TRL's own settings go under [grpo].",
    ),
    "key_of_two_sections": (
        ["beta=0.1"],
        "unknown key 'beta'. Did you mean 'dpo.beta' or 'sdpo.beta'? "
        "TRL's own settings go under [grpo].",
    ),
    "key_of_another_section": (
        ["batch.temperature=1"],
        "unknown key 'batch.temperature'. Did you mean 'sdpo.temperature'?",
    ),
    "key_of_trl_at_the_top": (
        ["learning_rate=1e-5"],
        "unknown key 'learning_rate'. Known: alpha_sdpo, batch, beta_replay, channels, data, "
        "diagnostics, dpo, evaluation, grpo, guards, lora, modal, model, name, rollout, sdpo, "
        "seed, smoke, teacher, tree. "
        "TRL's own settings go under [grpo].",
    ),
    "like_nothing_in_its_section": (
        ["dpo.zzz=1"],
        "unknown key 'dpo.zzz'. Known: dpo.beta, dpo.label_smoothing, dpo.pairs_per_step.",
    ),
}


@pytest.mark.parametrize(("overrides", "text"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_says_what_was_given_why_it_fails_and_what_to_do(overrides, text):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert str(caught.value) == f"configuration: {text}"


def test_every_mistake_of_a_file_is_listed_at_once(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('seed = -1\nmodel = ""\n[dpo]\nbeta = 0\nlabel_smoothing = 0.5\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, [])
    first, *problems = str(caught.value).splitlines()
    assert first == f"{path}: 4 problems."
    assert [problem.split(";")[0].strip() for problem in problems] == [
        "model is ''",
        "seed is -1",
        "dpo.beta is 0",
        "dpo.label_smoothing is 0.5",
    ]


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(ConfigError, match=r"teacher is 'x{76}\.\.\.; it must be"):
        load_config(None, [f"teacher={'x' * 500}"])
