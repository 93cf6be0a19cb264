"""`sweep`, with members that are real processes of this program and whose training is a sum."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from composer_replication.cli import main
from composer_replication.experiments.sweep_table import SweepReport

COMMAND = ["sweep", "base.toml", "--grid", "alpha_sdpo=0,0.2", "--out", "s"]
KILLED = [*COMMAND, "--seeds", "2"]


def report_of(folder):
    return SweepReport.model_validate_json((folder / "sweep.json").read_text())


def starts(folder):
    """How often each member's training body began, by its log."""
    return {
        path.stem: path.read_text().count("step 1\n") for path in (folder / "logs").glob("*.log")
    }


def test_every_point_and_seed_is_a_run_and_the_points_are_ranked(workplace, capsys):
    assert main([*COMMAND, "--seeds", "2", "--parallel", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == json.loads((workplace / "s" / "sweep.json").read_text())
    report = report_of(workplace / "s")
    assert [member.name for member in report.members] == [
        *("alpha_sdpo-0-seed-0", "alpha_sdpo-0-seed-1"),
        *("alpha_sdpo-0.2-seed-0", "alpha_sdpo-0.2-seed-1"),
    ]
    best, other = report.rows
    assert best.score_mean > other.score_mean
    assert best.score_spread > 0
    assert set(best.channels) == {"grpo", "sdpo"}
    for member in report.members:
        assert json.loads((workplace / member.folder / "summary.json").read_text())["steps"] == 4
    assert "<svg" in (workplace / "s" / "report.html").read_text()
    assert json.loads((workplace / "s" / "summary.json").read_text())["status"] == "passed"


def test_a_failed_member_is_retried_once_and_named_and_the_others_finish(
    workplace, monkeypatch, capsys
):
    monkeypatch.setenv("STAND_IN_FAIL", '{"alpha_sdpo-0-": 1, "alpha_sdpo-0.2-": 9}')
    assert main(["sweep", "base.toml", "--grid", "alpha_sdpo=0,0.1,0.2", "--out", "s"]) == 1
    said = capsys.readouterr().out
    assert "2 of 3 members passed" in said
    assert "failed  alpha_sdpo-0.2-seed-0: told to fail 9 times" in said
    assert "Its log: s/logs/alpha_sdpo-0.2-seed-0.log" in said
    failures = workplace / "s" / "members" / ".alpha_sdpo-0.2-seed-0.failures"
    assert failures.read_text() == "xx"  # twice, not more
    monkeypatch.setenv("STAND_IN_FAIL", "{}")
    before = starts(workplace / "s")
    wider = ["sweep", "base.toml", "--grid", "alpha_sdpo=0,0.1,0.2,0.3", "--out", "s", "--resume"]
    assert main(wider) == 0
    after = starts(workplace / "s")
    assert {name: after[name] - before.get(name, 0) for name in after} == {
        "alpha_sdpo-0-seed-0": 0,
        "alpha_sdpo-0.1-seed-0": 0,
        "alpha_sdpo-0.2-seed-0": 1,
        "alpha_sdpo-0.3-seed-0": 1,
    }


def test_a_sweep_that_was_killed_repeats_no_finished_member(workplace):
    environment = {**os.environ, "STAND_IN_STEP_S": "0.3"}
    command = [sys.executable, "-m", "composer_replication", *KILLED]
    sweep = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    second = workplace / "s/logs/alpha_sdpo-0.2-seed-1.log"
    checkpoint = workplace / "s/members/alpha_sdpo-0.2-seed-1/checkpoints/checkpoint-2"
    end = time.monotonic() + 60
    while not checkpoint.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    before = starts(workplace / "s")
    assert main([*KILLED, "--resume"]) == 0
    after = starts(workplace / "s")
    # The point with both channels takes longest and starts first.
    assert before == {"alpha_sdpo-0.2-seed-0": 1, "alpha_sdpo-0.2-seed-1": 1}
    assert set(after.values()) == {1}
    assert "resumed from step 2" in second.read_text()  # and went on from its checkpoint


def test_a_resumed_sweep_is_the_sweep_that_was_started(workplace, capsys):
    assert main([*COMMAND]) == 0
    other = ["sweep", "base.toml", "--grid", "beta_replay=0,1", "--out", "s", "--resume"]
    assert main(other) == 2
    assert (
        "holds 'alpha_sdpo-0-seed-0', which is no member of this sweep" in capsys.readouterr().err
    )


def test_a_resumed_sweep_ranks_no_member_of_another_length_among_its_own(workplace, capsys):
    assert main([*COMMAND]) == 0
    longer = [*COMMAND, "--resume", "--set", "grpo.max_steps=6"]
    assert main(longer) == 2
    said = capsys.readouterr().err
    assert "alpha_sdpo-0-seed-0 ran with other values of grpo.max_steps" in said
    assert main([*COMMAND, "--resume", "--set", "modal.retries=1"]) == 0


def test_resume_without_out_goes_on_with_the_newest_sweep(workplace, monkeypatch, capsys):
    sweep = ["sweep", "base.toml", "--grid", "alpha_sdpo=0.2"]
    assert main(sweep) == 0
    monkeypatch.setenv("STAND_IN_FAIL", '{"alpha_sdpo-0.2-": 9}')
    assert main(sweep) == 1
    monkeypatch.setenv("STAND_IN_FAIL", "{}")
    capsys.readouterr()
    assert main([*sweep, "--resume", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("sweep   1 members, 1 at a time here")
    assert main([*sweep, "--resume"]) == 0
    for name in ("base-sweep", "base-sweep-2"):
        assert json.loads((workplace / "runs" / name / "sweep.json").read_text())["status"] == (
            "passed"
        )


def test_points_of_a_list_show_every_key_that_one_of_them_sets(workplace, capsys):
    points = ["--point", "alpha_sdpo=0.2", "--point", "beta_replay=0.1"]
    assert main(["sweep", "base.toml", *points, "--out", "s"]) == 0
    table = capsys.readouterr().out
    (titles,) = [line for line in table.splitlines() if line.lstrip().startswith("#")]
    assert {"alpha_sdpo", "beta_replay"} <= set(titles.split())
    assert sum("base" in line.split() for line in table.splitlines()) == 2


def test_the_longest_members_start_first_and_the_table_keeps_its_order(workplace, capsys):
    steps = ["sweep", "base.toml", "--grid", "grpo.max_steps=2,6,4", "--out", "s"]
    assert main([*steps, "--json"]) == 0
    members = json.loads(capsys.readouterr().out)["members"]
    assert [member["point"]["grpo.max_steps"] for member in members] == ["2", "6", "4"]
    logs = sorted((workplace / "s/logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.stem.split("-")[1] for path in logs] == ["6", "4", "2"]


def test_a_dry_run_shows_the_members_in_their_order_and_runs_nothing(workplace, capsys):
    steps = ["sweep", "base.toml", "--grid", "grpo.max_steps=2,60,40", "--parallel", "2"]
    assert main([*steps, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("sweep   3 members, 2 at a time here, about ")
    assert [line.split()[1].split("-")[1] for line in shown.splitlines()[1:4]] == ["60", "40", "2"]
    assert "\ncost    0 USD\nplace   The local cpu ends in " in shown
    assert main([*steps, "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["point"]["grpo.max_steps"] for row in answer["members"]] == ["60", "40", "2"]
    longest, middle, short = (row["wall_s"] for row in answer["members"])
    assert longest > middle > short > 0
    assert answer["wall_s"] == pytest.approx(max(longest, middle + short), abs=0.05)
    assert (answer["function"], answer["plan"], answer["worst_usd"]) == (None, None, 0)
    assert (answer["placement"]["where"], answer["placement"]["usd"]) == ("local", 0)
    assert not (workplace / "runs").exists()


def test_a_dry_run_says_where_the_sweep_would_end_sooner(workplace, capsys):
    large = ["--set", "model=shape:qwen2.5-1.5b", "--set", "grpo.max_steps=200", "--seeds", "3"]
    assert main(["sweep", "base.toml", *large, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "place   None fits here; 3 containers of " in shown.out
    assert shown.out.endswith("USD. --on modal takes it there.\n")
    assert "note  a member is planned with " in shown.err
    assert "it may not fit here" in shown.err
    assert main(["sweep", "base.toml", *large, "--dry-run", "--json"]) == 0
    placement = json.loads(capsys.readouterr().out)["placement"]
    assert placement["where"] == "modal"
    assert placement["worst_usd"] > placement["usd"] > 0


def test_a_dry_run_on_modal_prices_the_whole_sweep_without_credentials(
    workplace, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "modal", None)
    sweep = ["sweep", "base.toml", "--grid", "grpo.max_steps=2,60", "--seeds", "2"]
    remote = [*sweep, "--on", "modal", "--gpu", "L40S", "--dry-run"]
    assert main([*remote, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in answer["members"]]
    assert [name.split("-")[1] for name in names] == ["60", "60", "2", "2"]
    function, plan = answer["function"], answer["plan"]
    assert (function["gpu"], function["max_containers"]) == ("L40S", 4)
    assert function["tags"]["verb"] == "train"
    assert function["tags"]["run_id"].startswith("base-sweep-")
    expected = [row["expected_usd"] for row in answer["members"]]
    assert answer["expected_usd"] == pytest.approx(sum(expected), abs=1e-3)
    assert expected[0] == expected[1] > expected[2] == expected[3]
    assert answer["worst_usd"] == pytest.approx(4 * plan["worst_usd"], abs=1e-3)
    assert answer["num_parallel"] == 4
    cap = f"{2.5 * plan['worst_usd']:.4f}"
    assert main([*remote, "--json", "--budget", cap]) == 0
    capped = json.loads(capsys.readouterr().out)
    assert (capped["num_parallel"], capped["worst_usd"]) == (2, float(cap))
    assert main([*remote, "--budget", "0.001"]) == 2
    assert main(remote) == 0
    assert '"max_containers": 4' in capsys.readouterr().out
    assert not (workplace / "runs").exists()


def test_a_sweep_on_modal_takes_a_card_on_which_every_member_ends(workplace, capsys):
    """With checkpointing a member needs less memory and more time, which a cheap card lacks."""
    command = ["sweep", "base.toml", "--on", "modal", "--dry-run", "--json",
               "--set", "model=shape:qwen2.5-0.5b", "--set", "grpo.max_steps=4000",
               "--set", "grpo.save_strategy=no", "--set", "grpo.max_completion_length=256",
               "--grid"]  # fmt: skip
    key = "grpo.gradient_checkpointing"
    alone = {}
    for value in ("false", "true"):
        assert main([*command, f"{key}={value}", "--gpu", "L4"]) == 0
        alone[value] = json.loads(capsys.readouterr().out)["members"][0]["wall_s"]
    assert alone["true"] > alone["false"] + 200
    timeout_s = round((alone["true"] + alone["false"]) / 2)
    limit = ["--set", f"modal.timeout_s={timeout_s}"]
    # The larger member alone stays where it is cheapest.
    assert main([*command, f"{key}=false", *limit]) == 0
    cheap = json.loads(capsys.readouterr().out)["function"]["gpu"]
    assert main([*command, f"{key}=true", *limit, "--gpu", cheap]) == 2
    capsys.readouterr()
    assert main([*command, f"{key}=false,true", *limit]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["function"]["gpu"] != cheap
    assert max(row["wall_s"] for row in both["members"]) < timeout_s


def test_a_resumed_sweep_plans_and_prices_what_is_not_done(workplace, capsys):
    assert main(COMMAND) == 0
    capsys.readouterr()
    remote = ["--on", "modal", "--gpu", "L40S"]
    resumed = [*COMMAND, "--resume", "--dry-run"]
    assert main([*resumed, *remote, "--seeds", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {row["seed"] for row in answer["members"]} == {1, 2}
    assert (answer["num_done"], len(answer["members"])) == (2, 4)
    assert answer["worst_usd"] == pytest.approx(4 * answer["plan"]["worst_usd"], abs=1e-3)
    assert main([*resumed, "--seeds", "2"]) == 0
    assert capsys.readouterr().out.startswith("sweep   2 members (2 more are done), 1 at a time")
    assert main([*resumed, *remote]) == 0
    assert capsys.readouterr().out.endswith("cost    0 USD\n")
    # Nothing is left to be asked or sent, so that no credentials are needed.
    assert main([*COMMAND, "--resume", *remote]) == 0
    assert set(starts(workplace / "s").values()) == {1}


def test_what_the_planner_does_not_know_runs_in_the_written_order(workplace, capsys):
    grid = ["sweep", "base.toml", "--grid", "grpo.max_steps=2,6", "--parallel", "2"]
    assert main([*grid, "--set", "grpo.optim=lion_32bit", "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["point"]["grpo.max_steps"] for row in answer["members"]] == ["2", "6"]
    assert (answer["num_parallel"], answer["wall_s"]) == (2, None)
    assert main([*grid, "--set", "data=nowhere"]) == 2
    assert "nowhere has no prompts.jsonl" in capsys.readouterr().err
    assert not (workplace / "runs").exists()
