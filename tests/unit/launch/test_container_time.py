"""What containers were held for, and what a killed one leaves that the next cannot use."""

from composer_replication.launch.container import drop_half_commit, ended_s, held_s
from composer_replication.runs.run_directory import RunDirectory


def test_a_killed_attempt_counts_until_the_next_one_or_its_own_latest_end():
    def held(*spans):
        return held_s({"attempts": [list(span) for span in spans]})

    assert held((100.0, 130.0)) == 30.0
    assert held((100.0, 460.0), (150.0, 160.0)) == 50.0 + 10.0
    # The next one began long after that, in a call of its own.
    assert held((100.0, 460.0), (9000.0, 9010.0)) == 360.0 + 10.0
    assert ended_s({"attempts": [[1.0, 9.0], [2.0, 3.0]]}) == 3.0


def test_files_of_a_commit_that_was_cut_are_in_nobodys_way_and_a_run_directory_stays(tmp_path):
    half = tmp_path / "half"
    (half / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (half / "metrics.jsonl").write_text("{}\n")
    drop_half_commit(half)
    with RunDirectory.create(half, resume=True) as run:
        run.write_config("name = 'x'\n")
    drop_half_commit(half)
    assert (half / "config.toml").exists()
    drop_half_commit(tmp_path / "absent")
