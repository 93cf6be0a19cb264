"""A whole run of the evidence on a tiny model: data, training as the arm says, a result to keep."""

import dataclasses
import json

import pytest

from composer_replication.experiments.evidence import run_evidence, training_rows
from composer_replication.experiments.evidence_arms import ARMS, SETTINGS, EvidenceRun, fingerprint
from composer_replication.experiments.forgetting_probe import OLD_CONVENTION_TEXT
from composer_replication.runs.json_text import to_json_text


@pytest.fixture
def tiny_settings(tmp_path, tiny_llama, smollm2_tokenizer):
    """The settings of task A, cut to one step of a tiny model."""
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    smollm2_tokenizer.save_pretrained(model)
    settings = SETTINGS["api_drift"]
    grpo = {
        **settings.config["grpo"],
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "bf16": False,
    }
    config = {**settings.config, "model": str(model), "grpo": grpo}
    config["rollout"] = {"max_turns": 2, "max_action_tokens": 4}
    return dataclasses.replace(
        settings,
        num_train=8,
        num_heldout=8,
        num_curve=2,
        curve_every=1,
        config=config,
        num_tools=None,
    )


def run(arm, tmp_path, settings):
    lines = []
    folder = tmp_path / "runs"
    result = run_evidence(EvidenceRun("api_drift", arm, 1), folder, lines.append, settings)
    return json.loads(to_json_text(result)), lines, folder / f"api_drift-{arm}-s1"


def test_a_run_trains_measures_and_says_what_it_was(tmp_path, tiny_settings):
    result, lines, folder = run("all", tmp_path, tiny_settings)
    assert (result["task"], result["arm"], result["seed"], result["drift"]) == (
        "api_drift",
        "all",
        1,
        0,
    )
    assert result["settings"] == fingerprint("api_drift", ARMS["all"], tiny_settings)
    assert len(result["greedy"]["outcomes"]) == len(result["tools"]) == 8
    assert set(result["greedy"]["outcomes"]) <= {0, 1}
    assert len(set(result["tools"])) == 8
    assert result["pair_tools"] == ["read", "delete", "write", "search"]
    (point,) = result["curve"]
    assert point["generated_tokens"] == result["generated_tokens"] > 0
    assert result["forgetting"]["nats_per_token"] > 0
    row = json.loads((folder / "run" / "metrics.jsonl").read_text())
    assert row["tokens/sdpo"] > 0
    assert row["pairs/dpo"] == SETTINGS["api_drift"].config["dpo"]["pairs_per_step"]
    assert any(line.startswith("step 1  reward") for line in lines)
    training = (folder / "data" / "prompts.jsonl").read_text()
    assert '"split": "train"' in training
    assert not (folder / "data" / "hint_sites.jsonl").exists()


def test_a_run_on_some_tools_has_prompts_and_pairs_of_those_alone(tmp_path, tiny_settings):
    settings = dataclasses.replace(tiny_settings, num_tools=4)
    result, _, folder = run("dpo", tmp_path, settings)
    assert len(result["tools"]) == 8
    assert set(result["tools"]) == {"read", "delete", "list", "test"}
    prompts = (folder / "data" / "prompts.jsonl").read_text().splitlines()
    assert len(prompts) == 8
    pairs = [
        json.loads(line) for line in (folder / "data" / "pairs.jsonl").read_text().splitlines()
    ]
    assert {json.loads(pair["rejected"])["tool"] for pair in pairs} == {"read", "delete"}


def test_between_the_prompts_some_come_again_and_keep_the_old_convention(tmp_path, tiny_settings):
    settings = dataclasses.replace(tiny_settings, num_train=8, num_tools=4, old_convention_every=3)
    _, _, folder = run("grpo", tmp_path, settings)
    prompts = [
        json.loads(line) for line in (folder / "data" / "prompts.jsonl").read_text().splitlines()
    ]
    requests = [prompt["prompt"][-1]["content"] for prompt in prompts]
    kept = {
        number: request.removesuffix(f"\n\n{OLD_CONVENTION_TEXT}")
        for number, request in enumerate(requests)
        if OLD_CONVENTION_TEXT in request
    }
    # Of read, list, test the first; of delete, read, list not the one that was kept before.
    assert kept == {3: requests[0], 7: requests[4]}
    assert [prompt["num_drifted_tools"] for prompt in prompts] == [8, 8, 8, 0, 8, 8, 8, 0]


def test_every_tool_keeps_its_old_convention_as_often():
    settings = dataclasses.replace(SETTINGS["api_drift"], num_train=24, old_convention_every=2)
    rows = training_rows(EvidenceRun("api_drift", "all", 0), settings)
    kept = [row for row in rows.prompts if not row["num_drifted_tools"]]
    tools = [row["prompt"][-1]["content"].split()[0] for row in kept]
    assert sorted(tools) == sorted(["Read", "List", "Run", "Delete"] * 2)


def test_the_base_is_measured_and_not_trained_and_an_interrupted_run_leaves_nothing(
    tmp_path, tiny_settings
):
    left = tmp_path / "runs" / "api_drift-base-s1" / "run" / "metrics.jsonl"
    left.parent.mkdir(parents=True)
    left.write_text("half a row")
    result, _, folder = run("base", tmp_path, tiny_settings)
    assert (result["steps"], result["generated_tokens"], result["curve"]) == (0, 0, [])
    assert not (folder / "run" / "metrics.jsonl").exists()


def test_without_hints_an_untrained_policy_does_not_differ_from_its_ema(tmp_path, tiny_settings):
    _, _, folder = run("kl_to_ema", tmp_path, tiny_settings)
    row = json.loads((folder / "run" / "metrics.jsonl").read_text())
    assert row["tokens/sdpo"] > 0
    assert abs(row["loss/sdpo"]) < 1e-9
