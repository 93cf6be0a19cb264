"""The evaluate verb: one model, or two on the same prompts, held out; greedy and sampled.

request = EvaluationRequest("runs/first", task_data("api_drift"), against="smollm2-135m")
run_evaluation(request, Path("runs/evaluation"), print).change
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from torch import nn

from composer_replication.experiments.evaluate import (
    EvaluationResult,
    evaluate,
)
from composer_replication.experiments.evaluated_model import (
    check_evaluated_model,
    load_evaluated_model,
    model_place,
)
from composer_replication.experiments.evaluation_data import EvaluationData
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
from composer_replication.traces.json_lines import Row
from composer_replication.training.model_source import LoadedModel

REPORT_FILE = "evaluation.json"

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


@quiet_libraries()
def run_evaluation(request: EvaluationRequest, folder: Path, say: Say) -> EvaluationReport:
    """Measure the models one after the other and write `evaluation.json` and the episodes.

    Args:
        request: what to measure.
        folder: gets the files; it exists.
        say: receives a line for each thing that takes long.

    Raises:
        ModelError: a model that cannot be loaded; all of them are looked at before one is.
        DataError: a prompt that the environment refuses.
        RewardError: an environment that fails in every episode.
    """
    started_s = time.perf_counter()
    given = [request.model] if request.against is None else [request.against, request.model]
    places = [model_place(each, say) for each in given]
    for place in places:
        check_evaluated_model(place)
    names = ["after"] if request.against is None else ["before", "after"]
    figures = {
        name: _measure(each, place, request, folder / f"episodes_{name}.jsonl", say)
        for name, each, place in zip(names, given, places, strict=True)
    }
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
        total_s=round(time.perf_counter() - started_s, 1),
    )
    write_text_atomically(folder / REPORT_FILE, report.to_json() + "\n")
    return report


def _measure(
    given: str, place: str, request: EvaluationRequest, episodes: Path, say: Say
) -> ModelFigures:
    started_s = time.perf_counter()
    say(f"{given}: loading")
    loaded = load_evaluated_model(place, say)
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
    write_text_atomically(episodes, "\n".join(lines) + "\n")
    pairs = None
    if data.pairs:
        found = pair_margin(model, loaded.tokenizer, data.pairs)
        pairs = Margin(found.mean_nats, found.preferred, len(data.pairs))
    old_rows = old_convention_rows(data.task, data.prompts)
    old = _play(loaded, data, old_rows, say, given, decoding="greedy") if old_rows else None
    text = text_loss(model, loaded.tokenizer)
    return ModelFigures(
        given=given,
        label=loaded.label,
        greedy=played(greedy),
        sampled=played(sampled),
        pairs=pairs,
        forgetting=Forgetting(
            text.nats_per_token, text.num_tokens, None if old is None else played(old)
        ),
        seconds=round(time.perf_counter() - started_s, 1),
    )


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
        max_turns=data.max_turns,
        max_action_tokens=data.max_action_tokens,
        **how,
    )
