import json
from importlib import resources
from pathlib import Path

import pytest

from composer_replication.environments.api_drift import ERROR_KINDS, ApiDrift
from composer_replication.environments.api_drift_rules import DEFAULT_DRIFT, TOOL_KEYS
from composer_replication.environments.api_drift_tasks import POOLS, task_from_seed
from composer_replication.experiments.api_drift_data import pair_tools
from composer_replication.experiments.task_registry import write_task
from composer_replication.traces.hints import hint_site_from_row, hint_site_row
from composer_replication.traces.pairs import pair_from_row, pair_row

SHIPPED = Path(str(resources.files("composer_replication.environments") / "data" / "api_drift"))
SPLITS = {"train": SHIPPED, "heldout": SHIPPED / "heldout"}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_shipped_data_is_what_this_version_makes_byte_for_byte(tmp_path):
    write_task(tmp_path, "api_drift")
    assert contents(tmp_path) == contents(SHIPPED)


def test_the_shipped_data_is_small():
    assert sum(map(len, contents(SHIPPED).values())) < 400_000


def test_another_seed_gives_other_tasks_and_another_drift_other_hints(tmp_path):
    write_task(tmp_path / "seed", "api_drift", seed=1)
    write_task(tmp_path / "drift", "api_drift", drift_seed=7)
    shipped = contents(SHIPPED)
    other_tasks, other_drift = contents(tmp_path / "seed"), contents(tmp_path / "drift")
    assert other_tasks["prompts.jsonl"] != shipped["prompts.jsonl"]
    assert other_drift["hint_sites.jsonl"] != shipped["hint_sites.jsonl"]


def test_a_drift_of_no_tools_leaves_nothing_to_hint_at(tmp_path):
    manifest = write_task(tmp_path, "api_drift", num_drifted_tools=0)
    assert manifest["counts"]["train"]["hint_sites"] == 0
    assert (tmp_path / "hint_sites.jsonl").read_text().strip() == ""


def test_the_manifest_counts_what_the_files_hold():
    manifest = json.loads((SHIPPED / "manifest.json").read_text())
    assert (manifest["schema"], manifest["task"], manifest["seed"]) == (1, "api_drift", 0)
    for split, folder in SPLITS.items():
        assert folder == SHIPPED / manifest["splits"][split]
        counts = manifest["counts"][split]
        for name in ("prompts", "hint_sites", "pairs"):
            assert counts[name] == len(rows(folder / f"{name}.jsonl"))


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_survives_the_readers_of_hint_sites_and_pairs(split):
    for row in rows(SPLITS[split] / "hint_sites.jsonl"):
        assert hint_site_row(hint_site_from_row(row, "row")) == row
    for row in rows(SPLITS[split] / "pairs.jsonl"):
        assert pair_row(pair_from_row(row, "row")) == row


@pytest.mark.parametrize("split", SPLITS)
def test_every_prompt_row_starts_an_episode_and_no_prompt_comes_twice(split):
    prompts = rows(SPLITS[split] / "prompts.jsonl")
    for row in prompts:
        ApiDrift().reset(**row)
    assert len({json.dumps(row["prompt"]) for row in prompts}) == len(prompts)


def test_hint_sites_cover_every_tool_and_every_error_kind():
    sites = rows(SHIPPED / "hint_sites.jsonl")
    assert {site["error_kind"] for site in sites} == set(ERROR_KINDS) - {"episode_over"}
    assert {tool_of(site) for site in sites} == set(TOOL_KEYS)


def test_training_pairs_cover_half_of_the_tools_and_heldout_pairs_all():
    train, heldout = (rows(folder / "pairs.jsonl") for folder in SPLITS.values())
    assert {tool_of(pair) for pair in train} == set(pair_tools(DEFAULT_DRIFT))
    assert len(pair_tools(DEFAULT_DRIFT)) == len(TOOL_KEYS) / 2
    assert {tool_of(pair) for pair in heldout} == set(TOOL_KEYS)


def tool_of(row):
    return task_from_seed(int(row["source"].rpartition("-")[2]), row["source"][:-5]).tool


def test_a_chosen_action_is_accepted_and_its_rejected_one_refused():
    for split, folder in SPLITS.items():
        for pair in rows(folder / "pairs.jsonl"):
            for action, is_refused in ((pair["chosen"], False), (pair["rejected"], True)):
                environment = ApiDrift()
                environment.reset(task_seed=int(pair["source"][-4:]), split=split)
                observation = environment._step_text(action)
                assert (observation.error is not None) is is_refused


def test_no_heldout_target_or_source_occurs_in_the_training_files():
    training = "".join(
        (SHIPPED / f"{name}.jsonl").read_text()
        for name in ("prompts", "hint_sites", "pairs", "episodes")
    )
    for row in rows(SPLITS["heldout"] / "prompts.jsonl"):
        task = task_from_seed(row["task_seed"], "heldout")
        assert task.target not in training
        assert f"heldout-{row['task_seed']:04d}" not in training
    for stem in POOLS["heldout"].stems:
        assert stem not in training


def test_episodes_are_atif_with_one_id_after_another_and_results_that_name_their_call():
    for trajectory in rows(SHIPPED / "episodes.jsonl"):
        assert trajectory["schema_version"] == "ATIF-v1.8"
        assert trajectory["agent"].keys() >= {"name", "version"}
        steps = trajectory["steps"]
        assert [step["step_id"] for step in steps] == list(range(1, len(steps) + 1))
        assert {step["source"] for step in steps} <= {"system", "user", "agent"}
        for step in steps:
            if step["source"] != "agent":
                assert not step.keys() & {"tool_calls", "observation"}
            calls = {call["tool_call_id"] for call in step.get("tool_calls", [])}
            for result in step.get("observation", {"results": []})["results"]:
                assert result.get("source_call_id") in (calls or {None})


def test_episodes_carry_reward_and_error_flags_and_mark_the_demonstrations():
    trajectories = rows(SHIPPED / "episodes.jsonl")
    assert {t["extra"]["composer"]["reward"] for t in trajectories} >= {0.3, 0.7}
    for trajectory in trajectories:
        copied = [step for step in trajectory["steps"] if step.get("is_copied_context")]
        assert len(copied) == 6
        own = [step for step in trajectory["steps"] if "extra" in step]
        for step in own:
            flags = step["extra"]["composer"]
            text = step["observation"]["results"][0]["content"]
            assert flags["is_error"] == text.startswith("error: ")
            assert ("hint" in flags) == flags["is_error"]


def test_an_episode_replayed_in_the_environment_gives_the_recorded_reward():
    for trajectory in rows(SHIPPED / "episodes.jsonl"):
        recorded = trajectory["extra"]["composer"]
        environment = ApiDrift()
        environment.reset(**recorded["spec"])
        for step in trajectory["steps"]:
            if "extra" in step:
                content = environment._step_text(step["message"]).content
                assert content == step["observation"]["results"][0]["content"]
        assert environment.get_reward() == recorded["reward"]
