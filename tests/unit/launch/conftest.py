"""An empty working directory, and child processes whose training is a sum; see `stand_in/`."""

import os
from pathlib import Path

import pytest
from fake_modal import fake_modal

from composer_replication.cli import modal_members
from composer_replication.cli.process_settings import REEXECUTED_GUARD
from composer_replication.launch import modal_job

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The working directory, with `base.toml`; runs of 4 steps, a checkpoint at every second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "cache"))
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv(REEXECUTED_GUARD, "1")  # a second start of each process changes nothing here
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), *([path] if path else [])]))
    (tmp_path / "base.toml").write_text('name = "base"\n[grpo]\nmax_steps = 4\nsave_steps = 2\n')
    return tmp_path


@pytest.fixture
def platform(workplace, monkeypatch):
    """A double of Modal at work, whose containers train as `workplace` does."""
    for module in (modal_job, modal_members):
        monkeypatch.setattr(module, "_POLL_S", 0.2)
    environment = {"PYTHONPATH": str(STAND_IN), REEXECUTED_GUARD: "1"}
    with fake_modal(workplace / "modal", environment) as platform:
        yield platform
