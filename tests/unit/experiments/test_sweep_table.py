import json
from pathlib import Path

import composer_replication.experiments.sweep_table as sweep_table
from composer_replication.config.run_config import RunConfig
from composer_replication.experiments.sweep_grid import SweepMember
from composer_replication.experiments.sweep_picture import sweep_page
from composer_replication.experiments.sweep_table import (
    MemberResult,
    SweepReport,
    rank,
    read_member,
    sweep_json_schema,
)


def result(alpha, seed, score, status="passed", **more):
    return MemberResult(
        name=f"{alpha}-{seed}",
        point={"alpha_sdpo": alpha, "beta_replay": "0"},
        seed=seed,
        status=status,
        folder="f",
        score=score,
        **more,
    )


def test_points_are_ranked_by_their_mean_with_the_spread_over_seeds():
    rows = rank(
        [
            result("0", 0, 0.1, cost_usd=0.5),
            result("0", 1, 0.3, cost_usd=0.25),
            result("0.1", 0, 0.5, peak_gib=2.0),
            result("0.1", 1, 0.9, status="failed", cost_usd=1.0),
            result("0.2", 0, None, status="missing"),
        ]
    )
    assert [(row.rank, row.point["alpha_sdpo"]) for row in rows] == [
        (1, "0.1"),
        (2, "0"),
        (3, "0.2"),
    ]
    assert (rows[0].score_mean, rows[0].score_spread) == (0.5, None)  # a failed run has no say
    assert (rows[0].num_passed, rows[0].num_seeds, rows[0].cost_usd) == (1, 2, 1.0)
    assert abs(rows[1].score_mean - 0.2) < 1e-12
    assert abs(rows[1].score_spread - 0.1414213562) < 1e-9
    assert rows[1].cost_usd == 0.75
    assert rows[2].score_mean is None


def test_heldout_success_ranks_where_every_run_has_it():
    high_reward = result("0", 0, 0.9, heldout_success=0.25)
    high_success = result("0.1", 0, 0.2, heldout_success=0.75)
    rows = rank([high_reward, high_success])
    assert [(row.point["alpha_sdpo"], row.score_mean) for row in rows] == [
        ("0.1", 0.75),
        ("0", 0.25),
    ]
    assert {row.scored_by for row in rows} == {"heldout success"}
    # A run that failed has no say, one that was not measured turns to rewards.
    failed = result("0.2", 0, None, status="failed")
    assert rank([high_reward, high_success, failed])[0].scored_by == "heldout success"
    mixed = rank([high_reward, high_success, result("0.2", 0, 0.5)])
    assert [row.score_mean for row in mixed] == [0.9, 0.5, 0.2]
    assert {row.scored_by for row in mixed} == {"training reward"}


def test_a_score_is_the_mean_reward_of_the_last_quarter_of_the_steps(tmp_path):
    member = SweepMember("m", {}, 0, RunConfig())
    assert read_member(member, tmp_path).status == "missing"
    heldout = {"first": 0.0, "last": 0.5, "best": 0.75, "best_step": 4, "num_prompts": 8}
    summary = {
        "schema": 1,
        "status": "passed",
        "channels": {"sdpo": {"loss_last": 0.25}},
        "heldout": heldout,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = [{"step": step, "reward": float(step)} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    read = read_member(member, tmp_path)
    assert (read.score, read.channels) == (7.5, {"sdpo": 0.25})
    assert read.heldout_success == 0.5
    (tmp_path / "summary.json").write_text('{"schema": 0, "status": "passed"}')
    assert "another version" in read_member(member, tmp_path).error


def test_the_picture_has_a_cell_for_every_point_of_the_grid():
    results = [
        MemberResult(
            name=f"{a}-{b}",
            point={"alpha_sdpo": a, "beta_replay": b},
            seed=0,
            status="passed",
            folder="f",
            score=float(a) + float(b),
        )
        for a in ("0", "0.1", "10")
        for b in ("0", "0.05")
    ]
    page = sweep_page(SweepReport(status="passed", rows=rank(results), members=results), "a <b>")
    assert page.count("<rect") == 6
    assert page.index(">0.1<") < page.index(">10<")  # by size, not by spelling
    assert "#08519c" in page  # the best
    assert "#f7fbff" in page  # the worst
    assert "a &lt;b&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_published_schema_is_what_the_code_says():
    path = Path(sweep_table.__file__).with_name("sweep_schema.json")
    assert json.loads(path.read_text()) == sweep_json_schema()
