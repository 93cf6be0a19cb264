"""Every shipped task: procedural, seeded, split by content, taken by a run."""

import json

import pytest

from composer_replication.config.execution_sections import SHIPPED_ENVIRONMENTS
from composer_replication.environments.registry import ENVIRONMENTS, environment_class
from composer_replication.errors import ConfigError, DataError
from composer_replication.experiments.evaluation_data import task_data
from composer_replication.experiments.run_data import load_run_data
from composer_replication.experiments.task_registry import TASKS, task_rows, write_task

NAMES = tuple(TASKS)


def texts(rows):
    """All that a model could be trained on."""
    messages = [m["content"] for row in rows.prompts for m in row["prompt"]]
    sites = [text for s in rows.hint_sites for text in (s.hint, s.action, *contents(s.state))]
    pairs = [text for p in rows.pairs for text in (p.chosen, p.rejected, *contents(p.state))]
    return messages + sites + pairs


def contents(state):
    return [message.content for message in state]


def test_tasks_environments_and_the_configuration_know_the_same_names():
    assert set(TASKS) == set(ENVIRONMENTS) == set(SHIPPED_ENVIRONMENTS)


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_rows(name):
    assert task_rows(name, "train") == task_rows(name, "train")
    assert task_rows(name, "train") != task_rows(name, "train", seed=1)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reasoning_gym"])
def test_data_of_another_seed_shares_no_prompt(name):
    prompts = [
        {json.dumps(row["prompt"]) for row in task_rows(name, "train", seed=seed).prompts}
        for seed in range(3)
    ]
    assert not prompts[0] & prompts[1]
    assert not prompts[1] & prompts[2]


@pytest.mark.parametrize("name", NAMES)
def test_every_prompt_starts_an_episode_and_none_comes_twice(name):
    for split in ("train", "heldout"):
        rows = task_rows(name, split)
        for row in rows.prompts:
            environment = environment_class(name)()
            environment.reset(**row)
            assert environment.get_reward() == 0.0
        assert len({json.dumps(row["prompt"]) for row in rows.prompts}) == len(rows.prompts)


@pytest.mark.parametrize("name", NAMES)
def test_no_request_or_source_of_the_heldout_split_is_in_the_training_split(name):
    training = "\n".join(texts(task_rows(name, "train")))
    rows = task_rows(name, "heldout")
    for row in rows.prompts:
        assert row["prompt"][-1]["content"] not in training
    sources = {record.source for record in [*rows.hint_sites, *rows.pairs]}
    train = task_rows(name, "train")
    assert not sources & {record.source for record in [*train.hint_sites, *train.pairs]}


@pytest.mark.parametrize("name", NAMES)
def test_a_written_folder_is_what_a_run_reads(name, tmp_path):
    manifest = write_task(tmp_path, name, num_episodes={"train": 16, "heldout": 8})
    data = load_run_data(str(tmp_path))
    assert data.task == manifest["task"] == name
    assert data.notes == []
    assert len(data.prompts) == manifest["counts"]["train"]["prompts"] >= 16
    assert data.hint_sites == task_rows(name, "train", num_episodes=16).hint_sites
    assert data.pairs == task_rows(name, "train", num_episodes=16).pairs
    heldout = load_run_data(str(tmp_path / "heldout"))
    assert len(heldout.prompts) == manifest["counts"]["heldout"]["prompts"] >= 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("knob", ["split", "seed", "num_episodes", "name", "task_seed"])
def test_what_has_an_option_of_its_own_is_no_knob(name, knob):
    with pytest.raises(ConfigError, match=f"The task {name} has no knob '{knob}'"):
        task_data(name, knobs={knob: 3})


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("api_drfit", "train", {}), ConfigError, "Did you mean 'api_drift'"),
        (("api_drift", "test", {}), ConfigError, "no split 'test'"),
        (("api_drift", "train", {"drift_sed": 1}), ConfigError, "Did you mean 'drift_seed'"),
        (("api_drift", "train", {"task_seed": 1}), ConfigError, "no knob 'task_seed'"),
        (("api_drift", "train", {"drift_seed": "1"}), DataError, "must be int"),
        (("api_drift", "train", {"seed": -1}), DataError, "0 or more"),
        (("api_drift", "train", {"num_episodes": 0}), DataError, "1 to 1000"),
        (("api_drift", "train", {"num_episodes": 1001}), DataError, "Use several seeds"),
    ],
)
def test_a_wrong_name_or_number_says_what_to_do(arguments, error, match):
    name, split, keywords = arguments
    with pytest.raises(error, match=match):
        task_rows(name, split, **keywords)
