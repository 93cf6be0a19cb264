import json
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from composer_replication.errors import InputError
from composer_replication.launch.job import Job, command_line, new_job_id, write_files

JOB = Job(
    job_id="a-1",
    verb="train",
    arguments=("run.toml", "--set", "seed=2"),
    files={"run.toml": b"seed = 1\n", "data/prompts.jsonl": bytes(range(256))},
    gpu="H100!:2",
    timeout_s=60.0,
    retries=2,
    deadline_s=1e9,
)


def test_a_job_survives_its_journey_as_json():
    assert Job.from_payload(json.loads(json.dumps(JOB.to_payload()))) == JOB


def test_a_job_of_another_version_is_refused():
    with pytest.raises(InputError, match="has schema 2 and this version reads 1"):
        Job.from_payload({**JOB.to_payload(), "schema": 2})


def test_one_card_needs_no_launcher():
    assert command_line(JOB, Path("out")) == [
        *(sys.executable, "-m", "composer_replication", "train"),
        *("run.toml", "--set", "seed=2", "--out", "out", "--resume"),
    ]


def test_accelerate_understands_the_command_of_several_cards():
    several = Job(job_id="a", verb="train", arguments=("run.toml",), num_processes=4)
    command = command_line(several, Path("out"))
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    read = launch_command_parser().parse_args(command[3:])
    assert read.num_processes == 4
    assert read.module
    assert read.training_script == "composer_replication"
    assert read.training_script_args == ["train", "run.toml", "--out", "out", "--resume"]


def test_files_are_laid_where_the_job_says(tmp_path):
    write_files(JOB, tmp_path)
    assert (tmp_path / "data" / "prompts.jsonl").read_bytes() == bytes(range(256))


def test_ids_of_jobs_of_one_name_differ():
    assert len({new_job_id("a") for _ in range(20)}) == 20
