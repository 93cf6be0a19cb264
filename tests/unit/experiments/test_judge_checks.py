"""What judges the rollouts is imported, called for and tried before a model loads."""

import json

import pytest

from composer_replication.config.loading import load_config
from composer_replication.errors import ConfigError, InputError
from composer_replication.experiments.judge_checks import find_judge
from composer_replication.experiments.run_data import load_run_data

HELLO = [{"role": "user", "content": "hello"}]
JUDGES = "misbehaving_judges"


def judge(tmp_path, setting, *rows, manifest=None):
    lines = [json.dumps({"prompt": HELLO, **row}) for row in rows or ({},)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(json.dumps({"schema": 1, "task": manifest}))
    config = load_config(None, [setting] if setting else [])
    return find_judge(config, load_run_data(str(tmp_path)))


def refusal(tmp_path, setting, *rows, manifest=None):
    with pytest.raises(InputError) as caught:
        judge(tmp_path, setting, *rows, manifest=manifest)
    return str(caught.value)


def test_a_judge_without_a_mistake_is_found(tmp_path):
    environment, reward = judge(tmp_path, f"rollout.environment={JUDGES}:Plain")
    assert (environment.__name__, reward) == ("Plain", None)
    environment, reward = judge(tmp_path, f"rollout.reward={JUDGES}:right")
    assert (environment, reward.__name__) == (None, "right")
    assert judge(tmp_path, "smoke.fixed_shapes=[2, 64]") == (None, None)


REWARDS = {
    "without_keywords": (
        "which cannot be called: got an unexpected keyword argument 'completion_ids'. It gets "
        "prompts, completions, completion_ids, trainer_state, log_extra, log_metric, difficulty. "
        "Take what you need and **kwargs for the rest."
    ),
    "NO_FUNCTION": "which is no function but int. Name a function in TRL's signature.",
    "rigth": "which cannot be imported: misbehaving_judges has no 'rigth'. Did you mean 'right'?",
}


@pytest.mark.parametrize(("name", "text"), REWARDS.items(), ids=REWARDS)
def test_a_reward_that_cannot_be_called_is_refused(tmp_path, name, text):
    found = refusal(tmp_path, f"rollout.reward={JUDGES}:{name}", {"difficulty": 1})
    assert found.startswith(f"rollout.reward is 'misbehaving_judges:{name}', {text}")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import not_installed_anywhere", "No module named 'not_installed_anywhere'. Install its"),
        (
            "x = 1\ny = x / 0",
            "raised ZeroDivisionError: division by zero (broken_judge.py, line 2)",
        ),
        ("def f(:", "raised SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_fails_says_where(tmp_path, monkeypatch, source, text):
    (tmp_path / "broken_judge.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert text in refusal(tmp_path, "rollout.reward=broken_judge:f")


ENVIRONMENTS = {
    "WithArguments": (
        "The environment WithArguments() raised TypeError: WithArguments.__init__() missing 1 "
        "required positional argument: 'path'. It is made without arguments."
    ),
    "WithoutText": (
        "The environment WithoutText lacks reset, _step_text or get_reward, so the rollout loop "
        "cannot drive it. Implement composer_replication.environments.protocol.TextEnvironment."
    ),
    "NamedTask": (
        "{prompts}, line 1: NamedTask.reset raised TypeError: NamedTask.reset() got an unexpected "
        "keyword argument 'difficulty'. It was given difficulty; give every prompt what reset "
        "needs."
    ),
    "ResetsToNumber": (
        "{prompts}, line 1: ResetsToNumber.reset returned 3; what it returns is put at the end of "
        "the prompt. Return text or None."
    ),
}


@pytest.mark.parametrize(("name", "text"), ENVIRONMENTS.items(), ids=ENVIRONMENTS)
def test_an_environment_is_made_and_reset_before_it_is_needed(tmp_path, name, text):
    found = refusal(tmp_path, f"rollout.environment={JUDGES}:{name}", {"difficulty": 1})
    assert found == text.format(prompts=tmp_path / "prompts.jsonl")


def test_a_prompt_that_lacks_what_the_environment_needs_is_named_by_line(tmp_path):
    other = [{"role": "user", "content": "other"}]
    rows = ({"task": 1}, {"prompt": other})
    text = refusal(tmp_path, f"rollout.environment={JUDGES}:NamedTask", *rows)
    assert text == (
        f"{tmp_path / 'prompts.jsonl'}, line 2: NamedTask.reset raised TypeError: "
        "NamedTask.reset() missing 1 required positional argument: 'task'. It was given nothing "
        "beside the prompt; give every prompt what reset needs."
    )
    text = refusal(tmp_path, "rollout.environment=api_drift")
    assert text.startswith(f"{tmp_path / 'prompts.jsonl'}, line 1: An API-drift row has no 'task")


def test_prompts_that_a_rollout_could_not_tell_apart_are_refused(tmp_path):
    setting = f"rollout.environment={JUDGES}:Plain"
    assert refusal(tmp_path, setting, {"t": 1}, {"t": 2}).startswith(
        f"{tmp_path / 'prompts.jsonl'}, line 2 has the same prompt as line 1 and other values"
    )
    judge(tmp_path, setting, {"t": 1}, {"t": 1})


def test_a_column_that_some_rows_lack_is_refused_for_a_reward(tmp_path):
    setting = f"rollout.reward={JUDGES}:right"
    assert refusal(tmp_path, setting, {"t": 1}, {}).startswith(
        f"{tmp_path / 'prompts.jsonl'}, line 2: there is no 't', which other rows have"
    )


def test_data_without_a_judge_and_a_manifest_that_misspells_one_are_told(tmp_path):
    assert "names no task and rollout.reward is not set" in refusal(tmp_path, None)
    assert refusal(tmp_path, None, manifest="api_drfit").startswith(
        f"{tmp_path / 'manifest.json'}, task: There is no environment 'api_drfit'. Did you mean "
    )


def test_what_the_file_names_wins_over_the_manifest(tmp_path):
    setting = f"rollout.environment={JUDGES}:Plain"
    environment, _ = judge(tmp_path, setting, manifest="api_drfit")
    assert environment.__name__ == "Plain"
    with pytest.raises(ConfigError, match="cannot be imported"):
        judge(tmp_path, f"rollout.environment={JUDGES}:Absent", manifest="api_drift")
