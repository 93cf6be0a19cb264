"""The evaluate verb: one model, or two on the same prompts, held out; greedy and sampled.

What was measured of one model is kept until the other is measured too, so that an evaluation that
was killed goes on with what is missing.

request = EvaluationRequest("runs/first", task_data("api_drift"), against="smollm2-135m")
run_evaluation(request, Path("runs/evaluation"), print).change
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from torch import nn

from composer_replication.errors import RunDirectoryError
from composer_replication.experiments.evaluate import (
    EvaluationResult,
    evaluate,
)
from composer_replication.experiments.evaluated_model import (
    check_evaluated_model,
    load_evaluated_model,
    model_place,
)
from composer_replication.experiments.evaluation_data import REPORT_FILE, EvaluationData
from composer_replication.experiments.evaluation_report import (
    EvaluationReport,
    Forgetting,
    Margin,
    ModelFigures,
    episode_rows,
    played,
)
from composer_replication.experiments.forgetting_probe import old_convention_rows, text_loss
from composer_replication.experiments.pair_margins import pair_margin
from composer_replication.experiments.policy_sampling import Decoding
from composer_replication.experiments.quiet_libraries import quiet_libraries
from composer_replication.experiments.trainer_setup import device_label
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.runs.run_directory import FIGURES_PREFIX
from composer_replication.traces.json_lines import Row
from composer_replication.training.model_source import LoadedModel

_FIGURES = TypeAdapter(ModelFigures)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """What is to be measured.

    Example: `EvaluationRequest("runs/first", task_data("api_drift"), against="smollm2-135m")`.
    """

    model: str
    """As `load_model` takes it, a run directory, or a LoRA adapter."""
    data: EvaluationData
    against: str | None = None
    """The model before."""
    num_samples: int = 4
    """Sampled episodes of each prompt."""
    temperature: float = 1.0
    seed: int = 0
    """Of the sampling."""


def check_models(request: EvaluationRequest) -> None:
    """Look at every model before weights are read and before anything is written.

    Raises:
        ModelError: one that cannot be loaded.
    """
    for given in _models(request).values():
        # What stands in for a model is said when that is loaded.
        check_evaluated_model(model_place(given, lambda _: None))


@quiet_libraries()
def run_evaluation(request: EvaluationRequest, folder: Path, say: Say) -> EvaluationReport:
    """Measure the models one after the other and write `evaluation.json` and the episodes.

    An evaluation that was finished in `folder` is read and not run again; one that was begun there
    goes on.

    Args:
        request: what to measure; the one that `folder` was begun with.
        folder: gets the files; it exists.
        say: receives a line for each thing that takes long.

    Raises:
        ModelError: a model that cannot be loaded.
        DataError: a prompt that the environment refuses.
        RewardError: an environment that fails in every episode.
    """
    if (folder / REPORT_FILE).is_file():
        say(f"{folder} is finished: {REPORT_FILE} is from then.")
        _forget_figures(request, folder)
        return read_report(folder)
    started_s = time.perf_counter()
    figures, kept_s = dict[str, ModelFigures](), 0.0
    for name, given in _models(request).items():
        kept = _read_figures(folder, name)
        if kept is not None:
            say(f"{given}: measured before")
            kept_s += kept.seconds
        figures[name] = kept or _measure(given, name, request, folder, say)
    report = EvaluationReport.of(
        figures["after"],
        figures.get("before"),
        task=request.data.task,
        data=request.data.label,
        num_prompts=len(request.data.prompts),
        num_samples=request.num_samples,
        temperature=request.temperature,
        seed=request.seed,
        device=device_label(),
        versions={name: version(name) for name in ("torch", "transformers")},
        total_s=round(time.perf_counter() - started_s + kept_s, 1),
    )
    write_text_atomically(folder / REPORT_FILE, report.to_json() + "\n")
    _forget_figures(request, folder)
    return report


def read_report(folder: Path) -> EvaluationReport:
    """The report of a finished evaluation.

    Raises:
        RunDirectoryError: one that this version does not read.
    """
    try:
        return EvaluationReport.model_validate_json((folder / REPORT_FILE).read_bytes())
    except ValidationError as error:
        raise RunDirectoryError(
            f"{folder / REPORT_FILE} is not a report that this version reads "
            f"({error.error_count()} problems). Evaluate again with another --out."
        ) from None


def _models(request: EvaluationRequest) -> dict[str, str]:
    """What was given, the model before first."""
    if request.against is None:
        return {"after": request.model}
    return {"before": request.against, "after": request.model}


def _figures_path(folder: Path, name: str) -> Path:
    return folder / f"{FIGURES_PREFIX}{name}.json"


def _read_figures(folder: Path, name: str) -> ModelFigures | None:
    """What an earlier attempt measured; None where it did not come so far."""
    path = _figures_path(folder, name)
    return _FIGURES.validate_json(path.read_bytes()) if path.is_file() else None


def _forget_figures(request: EvaluationRequest, folder: Path) -> None:
    """The report has them."""
    for name in _models(request):
        _figures_path(folder, name).unlink(missing_ok=True)


def _measure(
    given: str, name: str, request: EvaluationRequest, folder: Path, say: Say
) -> ModelFigures:
    """All figures of one model; they and its episodes are on disk then."""
    started_s = time.perf_counter()
    say(f"{given}: loading")
    loaded = load_evaluated_model(model_place(given, say), say)
    load_s = time.perf_counter() - started_s
    data, model = request.data, cast(nn.Module, loaded.model)
    greedy = _play(loaded, data, data.prompts, say, given, decoding="greedy")
    sampled = _play(
        loaded,
        data,
        data.prompts,
        say,
        given,
        decoding="sampled",
        num_samples=request.num_samples,
        temperature=request.temperature,
        seed=request.seed,
    )
    lines = episode_rows(data.prompts, greedy) + episode_rows(data.prompts, sampled)
    write_text_atomically(folder / f"episodes_{name}.jsonl", "\n".join(lines) + "\n")
    pairs = None
    if data.pairs:
        found = pair_margin(model, loaded.tokenizer, data.pairs)
        pairs = Margin(found.mean_nats, found.preferred, len(data.pairs))
    old_rows = old_convention_rows(data.task, data.prompts)
    old = _play(loaded, data, old_rows, say, given, decoding="greedy") if old_rows else None
    text = text_loss(model, loaded.tokenizer)
    figures = ModelFigures(
        given=given,
        label=loaded.label,
        greedy=played(greedy),
        sampled=played(sampled),
        pairs=pairs,
        forgetting=Forgetting(
            text.nats_per_token, text.num_tokens, None if old is None else played(old)
        ),
        seconds=round(time.perf_counter() - started_s, 1),
        load_seconds=round(load_s, 1),
    )
    write_text_atomically(_figures_path(folder, name), _FIGURES.dump_json(figures).decode())
    return figures


def _play(
    loaded: LoadedModel,
    data: EvaluationData,
    rows: list[Row],
    say: Say,
    given: str,
    *,
    decoding: Decoding,
    **how: Any,  # noqa: ANN401, keywords of `evaluate`
) -> EvaluationResult:
    what = "old convention" if rows is not data.prompts else decoding
    say(f"{given}: {what}, {len(rows) * how.get('num_samples', 1)} episodes")
    return evaluate(
        cast(nn.Module, loaded.model),
        loaded.tokenizer,
        data.task,
        rows,
        decoding=decoding,
        reward=data.reward,
        max_turns=data.max_turns,
        max_action_tokens=data.max_action_tokens,
        step_timeout_s=data.step_timeout_s,
        max_concurrency=data.max_concurrency,
        **how,
    )
