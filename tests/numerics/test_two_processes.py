"""Two processes (gloo, on CPU) equal one process with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_process_run

from composer_replication.runs.step_rows import without_measurements

# TRL's and its dependencies' own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

TIMEOUT_S = 240
"""Processes that wait for each other never end; the whole run takes a tenth of it."""


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """`of_two(case)` -> what both processes returned."""
    folder = tmp_path_factory.mktemp("two_processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = str(Path(two_process_run.__file__))
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        with (folder / f"log.{rank}").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, script, str(folder)],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        for process in processes:
            process.wait(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"Processes wait for each other; done: {sorted(folder.glob('*.pt'))}")
    finally:
        for process in processes:
            process.kill()
            process.wait()

    def read(case):
        files = [folder / f"{case}.{rank}.pt" for rank in range(2)]
        assert all(file.is_file() for file in files), (folder / "log.0").read_text()[-4000:]
        return [torch.load(file) for file in files]

    return read


def assert_equal_weights(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, rtol=0, atol=atol), name


@pytest.mark.parametrize("case", two_process_run.CASES)
def test_two_processes_of_the_trainer_equal_one(case, of_two, tmp_path):
    results = of_two(case)
    assert all(isinstance(result, tuple) for result in results), results
    (rows, weights), (_, other_weights) = results
    assert_equal_weights(weights, other_weights, atol=0)
    one_rows, one_weights = two_process_run.trainer_run(case, tmp_path, num_processes=1)
    assert_equal_weights(weights, one_weights, atol=3e-6)
    for row, one in zip(rows, one_rows, strict=True):
        losses = {name for name in one if name.startswith("loss/")}
        assert {name for name in row if name.startswith("loss/")} == losses
        for name in {"loss", "grad_norm"} | losses:
            assert row[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
        for name in ("tokens/grpo", "tokens/sdpo", "pairs/dpo"):
            assert row[name] == one[name], name
        # At the reference a margin is 0 up to rounding, and its sign, the accuracy, is anything.
        has_margin = abs(one.get("rewards/margins", 0.0)) > 1e-4
        accuracies = ("rewards/accuracies",) if has_margin else ()
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", *accuracies):
            assert (
                row.get(name) == pytest.approx(one[name], abs=1e-5)
                if name in one
                else name not in row
            )


def test_a_plain_loop_under_ddp_equals_one_process_even_where_one_has_nothing_to_do(of_two):
    results = of_two("plain loop")
    assert all(isinstance(result, tuple) for result in results), results
    (_, weights), (_, other_weights) = results
    assert_equal_weights(weights, other_weights, atol=0)
    _, one_weights = two_process_run.plain_loop(
        two_process_run.plain_shares(None), two_process_run.plain_counts()
    )
    assert_equal_weights(weights, one_weights, atol=1e-6)
    start = two_process_run.plain_loop([], [])[1]
    assert any(not torch.equal(start[name], weight) for name, weight in weights.items())


def test_ddp_that_broadcasts_buffers_is_refused_before_processes_wait_for_each_other(of_two):
    for result in of_two("plain loop that broadcasts buffers"):
        assert "broadcast_buffers=False" in result


def test_two_processes_that_resume_equal_two_that_never_stopped_bit_for_bit(of_two):
    for result in of_two("resumed"):
        assert isinstance(result, tuple), result
        (rows, weights), (again_rows, again_weights) = result
        assert [row["step"] for row in again_rows] == [1, 2, 3, 4]
        for row, again in zip(rows, again_rows, strict=True):
            assert without_measurements(again) == without_measurements(row)
        assert again_weights.keys() == weights.keys()
        assert all(torch.equal(again_weights[name], weights[name]) for name in weights)


def test_a_loss_that_is_not_finite_on_one_process_stops_both(of_two):
    for result in of_two("nan on one"):
        assert result.startswith("TrainingError")
        assert "dpo" in result


def test_reentrant_checkpointing_is_refused_where_ddp_cannot_add_up_its_gradients(of_two):
    for result in of_two("reentrant checkpointing"):
        assert result.startswith("ConfigError")
        assert "use_reentrant = false" in result
