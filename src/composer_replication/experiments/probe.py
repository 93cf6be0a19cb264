"""`plan --probe`: ten steps of the run on this machine, as a measurement for its plan."""

import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from composer_replication.config.run_config import RunConfig
from composer_replication.errors import TrainingError
from composer_replication.experiments.train import run_train
from composer_replication.planner.calibration import Measured, measured_runs
from composer_replication.runs.run_directory import RunDirectory

NUM_STEPS = 10


def run_probe(config: RunConfig) -> Measured:
    """Train for ten steps in a folder that is gone afterwards.

    Raises:
        InputError: something that could not work.
        TrainingError: the run ended without a figure that a plan could use.
    """
    length = {"max_steps": NUM_STEPS, "save_strategy": "no"}
    probed = config.model_copy(update={"grpo": {**config.grpo, **length}})
    with tempfile.TemporaryDirectory(prefix="composer-probe-") as parent:
        folder = Path(parent) / "probe"
        with RunDirectory.create(folder, resume=False) as run:
            run_train(probed, run, Console(stderr=True))
        measured = measured_runs(folder)
    if not measured:
        raise TrainingError(
            "The probe's ten steps ran, and the planner has no formula for their model or card, "
            "so there is nothing to calibrate. Leave --probe out."
        )
    return replace(measured[0], is_probe=True)
