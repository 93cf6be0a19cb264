"""What a reward function judges is evaluated as it is trained: one turn, TRL's keywords."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer_replication.cli import main
from composer_replication.errors import RewardError
from composer_replication.experiments.evaluate import evaluate
from composer_replication.training.rewards import checked_reward

ROWS = [
    {"prompt": [{"role": "user", "content": f"Add {n} and 1."}], "answer": n + 1} for n in range(3)
]
SEEN = []


def letters(*, completions, answer, **rest):
    SEEN.append({"completions": completions, "answer": answer, **rest})
    return [len(turns[-1]["content"]) % 3 / 2 for turns in completions]


async def letters_later(**keywords):
    return letters(**keywords)


def unsure(*, completions, **rest):
    return [None if index % 2 else 1.0 for index in range(len(completions))]


def broken(**rest):
    raise ZeroDivisionError


@pytest.fixture
def model(tiny_model_dir):
    return (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        AutoTokenizer.from_pretrained(tiny_model_dir),
    )


def played(model, function, **how):
    SEEN.clear()
    reward = checked_reward(function, f"rewards:{function.__name__}")
    how = {"decoding": "greedy", "max_turns": 1, "max_action_tokens": 5} | how
    return evaluate(*model, "rewards:it", ROWS, reward=reward, **how)


@pytest.mark.parametrize("function", [letters, letters_later])
def test_the_function_gets_every_episode_with_its_columns_as_in_training(model, function):
    result = played(model, function, decoding="sampled", num_samples=2)
    (seen,) = SEEN
    assert seen["answer"] == [1, 1, 2, 2, 3, 3]
    assert seen["prompts"] == [row["prompt"] for row in ROWS for _ in range(2)]
    texts = [model[1].decode(ids, skip_special_tokens=True) for ids in seen["completion_ids"]]
    assert [turns[-1]["content"] for turns in seen["completions"]] == texts
    assert all(1 <= len(ids) <= 5 for ids in seen["completion_ids"])
    assert [e.reward for e in result.episodes] == [len(text) % 3 / 2 for text in texts]
    assert [e.num_actions for e in result.episodes] == [1] * 6


def test_what_the_function_leaves_unscored_is_no_success_and_is_counted(model):
    result = played(model, unsure)
    assert [e.reward for e in result.episodes] == [1.0, None, 1.0]
    assert result.num_failed == 1
    assert result.success.rate == pytest.approx(2 / 3)


def test_a_function_that_raises_is_named(model):
    with pytest.raises(RewardError, match=r"rewards:broken.*ZeroDivisionError"):
        played(model, broken)


def test_a_run_is_evaluated_while_it_trains_and_afterwards(
    tmp_path, tiny_model_dir, monkeypatch, capsys
):
    for folder in (tmp_path / "data", tmp_path / "data/heldout"):
        folder.mkdir()
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "my_rewards.py").write_text(
        "def letters(*, completions, answer, **rest):\n"
        "    return [len(turns[-1]['content']) % 3 / 2 for turns in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run.toml").write_text(
        f"""
model = "{tiny_model_dir}"
data = "{tmp_path / "data"}"
alpha_sdpo = 0
beta_replay = 0
[rollout]
reward = "my_rewards:letters"
[grpo]
num_generations = 2
per_device_train_batch_size = 2
max_completion_length = 6
max_steps = 2
bf16 = false
[evaluation]
every_steps = 1
prompts = 2
"""
    )
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / "run.toml"), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    capsys.readouterr()
    command = ["evaluate", str(out), "--out", str(tmp_path / "after"), "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == "my_rewards:letters"
    episodes = [
        json.loads(line)
        for line in (tmp_path / "after/episodes_after.jsonl").read_text().splitlines()
    ]
    assert {len(episode["turns"]) for episode in episodes} == {1}
    rewards = [len(episode["turns"][0]["content"]) % 3 / 2 for episode in episodes]
    assert [episode["reward"] for episode in episodes] == rewards
