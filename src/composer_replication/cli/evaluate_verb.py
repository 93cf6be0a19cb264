"""`evaluate`: does the model do the task on what it was not trained on, and better than before."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from composer_replication.cli.verb import JSON, Answer, Argument, Option, Verb, whole_number
from composer_replication.errors import InputError

if TYPE_CHECKING:
    from composer_replication.experiments.evaluation_data import EvaluationData

_WIDTH = 110

_EPILOG = """\
MODEL is what a configuration's model is, a run directory (its model/, or its newest checkpoint), or
a folder with a LoRA adapter. Without --task and --data, a run directory is measured on the held-out
split of its own data. Nothing of a held-out split is in the training data.

Writes --out: evaluation.json, and every episode in episodes_after.jsonl and episodes_before.jsonl.

examples:
  composer-replication evaluate smollm2-135m --task api_drift
  composer-replication evaluate runs/first --against smollm2-135m
  composer-replication evaluate runs/first --task call_format --set num_demos=1 --episodes 100

exit codes: 0 done, 1 failed, 2 your input, 130 Ctrl-C"""


def _evaluate(options: argparse.Namespace) -> Answer:
    from rich.console import Console

    from composer_replication.cli.recorded_run import RUNS_FOLDER
    from composer_replication.experiments.evaluation import EvaluationRequest, run_evaluation
    from composer_replication.experiments.evaluation_table import print_evaluation
    from composer_replication.runs.run_folders import claim_folder

    data = _data(options)
    request = EvaluationRequest(
        model=options.model,
        data=data,
        against=options.against,
        num_samples=whole_number("--samples", options.samples, default=4),
        temperature=_temperature(options.temperature),
        seed=_seed(options.seed),
    )
    folder = _folder(options.out) if options.out else None
    folder = folder or claim_folder(RUNS_FOLDER, f"evaluate-{data.task.rpartition(':')[2]}")
    progress = Console(stderr=True)
    try:
        report = run_evaluation(
            request, folder, lambda text: progress.print(text, highlight=False, soft_wrap=True)
        )
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
    if not options.json:
        console = Console()
        # A pipe has no width, and a table that breaks its lines cannot be read.
        console.width = max(console.width, _WIDTH)
        print_evaluation(report, console)
        console.print(f"wrote   {folder}", highlight=False, soft_wrap=True)
        if report.against is None:
            console.print(
                f"next    composer-replication evaluate {options.model} --against MODEL_BEFORE",
                highlight=False,
                soft_wrap=True,
            )
    return report.to_json(), 0


def _data(options: argparse.Namespace) -> "EvaluationData":
    """The prompts that the options name; every mistake in them is told here."""
    from composer_replication.experiments.evaluation_data import (
        HELDOUT_FOLDER,
        folder_data,
        run_data_of,
        task_data,
    )

    split = options.split or HELDOUT_FOLDER
    if options.task is None:
        given = {"--episodes": options.episodes, "--set": options.set or None}
        for flag, value in given.items():
            if value is not None:
                raise InputError(
                    f"{flag} shapes the data that --task makes, and no --task was given. Add "
                    f"--task, or drop {flag}."
                )
        if options.data is None:
            return run_data_of(options.model, split)
        return folder_data(options.data, split)
    if options.data is not None:
        raise InputError(
            "--task and --data were both given; the first makes prompts and the second reads them. "
            "Drop one."
        )
    episodes = options.episodes
    return task_data(
        options.task,
        split=split,
        seed=_seed(options.seed),
        num_episodes=None if episodes is None else whole_number("--episodes", episodes, default=64),
        knobs=_knobs(options.set),
    )


def _knobs(assignments: list[str]) -> dict[str, object]:
    """`--set KEY=VALUE` with a number, truth value or text."""
    knobs: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise InputError(
                f"--set was given {assignment!r}; it is KEY=VALUE, one knob of the task. "
                "Write for example --set num_demos=1."
            )
        try:
            knobs[key] = json.loads(text)
        except ValueError:
            knobs[key] = text
    return knobs


def _temperature(text: str | None) -> float:
    try:
        value = 1.0 if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(
            f"--temperature is {text!r}; it divides logits and must be a number above 0. "
            "Greedy decoding is measured anyway. Write for example --temperature 0.6."
        )
    return value


def _seed(text: str | None) -> int:
    if text is not None and not text.isdecimal():
        raise InputError(f"--seed is {text!r}; it must be a whole number from 0 on, such as 1.")
    return int(text or 0)


def _folder(path: Path) -> Path:
    """The folder of --out, empty."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        is_empty = not any(path.iterdir())
    except OSError as error:
        raise InputError(
            f"{path} cannot be made or read: {error.strerror}. Choose another --out."
        ) from error
    if not is_empty:
        raise InputError(
            f"{path} holds files already; nothing is overwritten. Choose another --out."
        )
    return path


EVALUATE = Verb(
    name="evaluate",
    summary="does a model do the task on held-out episodes; before against after",
    purpose="Plays held-out episodes, greedy and sampled, and says what changed and how surely.",
    epilog=_EPILOG,
    options=(
        Option("--task", "NAME", "shipped task: api_drift, call_format, fix_call, reasoning_gym"),
        Option("--data", "DIR", "data folder of yours with heldout/prompts.jsonl", "path"),
        Option("--against", "MODEL", "the model before; measured on the same prompts"),
        Option("--split", "NAME", "heldout (default), train, or of a task validation"),
        Option("--episodes", "N", "prompts of the task; default its own number"),
        Option("--samples", "K", "sampled episodes of each prompt; default 4"),
        Option("--temperature", "T", "of the sampled episodes; default 1"),
        Option("--seed", "N", "of the task's data and of sampling; default 0"),
        Option("--set", "KEY=VALUE", "one knob of the task; may be repeated", "repeated"),
        Option("--out", "DIR", "default runs/evaluate-<task>, numbered where taken", "path"),
        JSON,
    ),
    carry_out=_evaluate,
    argument=Argument("model", "MODEL", is_required=True, kind="text"),
)
