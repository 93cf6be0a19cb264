"""An evaluation as the planner takes it, and what the planner said of one that begins."""

from composer_replication.config.run_config import RunConfig
from composer_replication.errors import InputError
from composer_replication.experiments.evaluation import EvaluationRequest
from composer_replication.experiments.evaluation_bundle import larger_model
from composer_replication.experiments.forgetting_probe import old_convention_rows
from composer_replication.experiments.planned_run import (
    has_room,
    no_room_error,
    planned_here,
    write_plan,
)
from composer_replication.planner.evaluation_shape import EvaluationSize, evaluated_kind
from composer_replication.runs.run_directory import RunDirectory


def evaluation_size(request: EvaluationRequest) -> EvaluationSize:
    """How much it plays."""
    data = request.data
    # Greedy, sampled, and where the task replaced a convention, greedy under that.
    plays_old = bool(old_convention_rows(data.task, data.prompts))
    return EvaluationSize.of(
        data.prompts,
        num_models=1 if request.against is None else 2,
        episodes_a_prompt=1 + request.num_samples + plays_old,
        max_turns=data.max_turns,
        max_action_tokens=data.max_action_tokens,
    )


def write_planned_evaluation(request: EvaluationRequest, run: RunDirectory) -> None:
    """Write `planned.json`, by which the next evaluation's plan is calibrated.

    A model or a card that the formulas do not know gets none: the evaluation itself may well work.

    Raises:
        ConfigError: weights that are more than this device has.
    """
    models = [request.model] if request.against is None else [request.against, request.model]
    try:
        config = RunConfig(model=larger_model(models))
        candidate = planned_here(config, "evaluate", evaluation=evaluation_size(request))
    except InputError:
        return
    if candidate is None:
        return
    write_plan(candidate, run, "evaluate", evaluated_kind(candidate.shape.case.model))
    if not has_room(candidate):
        raise no_room_error(candidate, config.model or "")
