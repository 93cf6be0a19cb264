"""`evaluate --on modal`: what it plays, as a plan; what it reads from here, as files of the job."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from composer_replication.cli.evaluate_options import AskedEvaluation
from composer_replication.cli.modal_run import plan_on_modal, send_to_modal
from composer_replication.cli.recorded_run import RUNS_FOLDER
from composer_replication.cli.verb import Answer
from composer_replication.errors import InputError

if TYPE_CHECKING:
    from composer_replication.experiments.evaluation import EvaluationRequest

NOT_IN_IMAGE = {"reasoning_gym": "the package reasoning-gym"}
"""Tasks whose packages the image does not hold."""


def evaluate_on_modal(
    options: argparse.Namespace, asked: AskedEvaluation, request: "EvaluationRequest", name: str
) -> tuple[Answer, Path | None]:
    """Plan the evaluation, ask, and carry it out in a container.

    Args:
        options: of the verb.
        asked: the same, checked.
        request: with the prompts, which were made here to be counted.
        name: of the run directory.

    Returns:
        The answer, and the run directory; None where nothing was sent.

    Raises:
        InputError: a model or data that cannot be sent, several cards, or what the plan refuses.
    """
    from composer_replication.config.loading import load_config
    from composer_replication.experiments.evaluation_bundle import (
        larger_model,
        pack_evaluation,
    )
    from composer_replication.experiments.planned_evaluation import evaluation_size
    from composer_replication.launch.bundle import Bundle
    from composer_replication.planner.hardware import parse_gpu

    if options.gpu is not None and parse_gpu(options.gpu).num_gpus > 1:
        raise InputError(
            f"--gpu is {options.gpu!r}, and an evaluation computes on one card: the others would "
            "be paid for and idle. Leave the number out."
        )
    if request.data.task in NOT_IN_IMAGE:
        raise InputError(
            f"{request.data.task} needs {NOT_IN_IMAGE[request.data.task]}, which the image of a "
            "remote run leaves out: part of it compiles. Evaluate it here, or with --on local."
        )
    packed = pack_evaluation(
        asked.model,
        asked.against,
        None if asked.task is not None else asked.data or Path(asked.model),
        request.data.task,
        runs=RUNS_FOLDER,
        on_note=_note,
    )
    # A run that brings its own data does so there too.
    is_own = asked.data is None and packed.data == packed.model
    there = asked.elsewhere(packed.model, packed.against, None if is_own else packed.data)
    models = [asked.model] if asked.against is None else [asked.against, asked.model]
    config = load_config(None, [*asked.modal, f'name="{name}"'])
    config = config.model_copy(update={"model": larger_model(models)})
    plan = plan_on_modal("evaluate", options, config, evaluation_size(request))
    return send_to_modal("evaluate", options, config, plan, Bundle(there.arguments(), packed.files))


def _note(text: str) -> None:
    sys.stderr.write(f"note    {text}\n")
