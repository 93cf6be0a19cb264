"""`evaluate`: does the model do the task on what it was not trained on, and better than before."""

import argparse
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from composer_replication.cli.evaluate_options import AskedEvaluation, asked_evaluation
from composer_replication.cli.launching import ON, is_elsewhere, run_job_on_local
from composer_replication.cli.modal_evaluate import evaluate_on_modal
from composer_replication.cli.modal_run import MODAL_OPTIONS
from composer_replication.cli.recorded_run import RUNS_FOLDER, open_run, record_ending
from composer_replication.cli.verb import JSON, RESUME, Answer, Argument, Option, Verb
from composer_replication.errors import ConfigError

if TYPE_CHECKING:
    from composer_replication.experiments.evaluation import EvaluationRequest
    from composer_replication.experiments.evaluation_report import EvaluationReport
    from composer_replication.runs.run_directory import RunDirectory
    from composer_replication.runs.summary import Summary

_WIDTH = 110

_EPILOG = """\
MODEL is what a configuration's model is, a run directory (its model/, or its newest checkpoint), or
a folder with a LoRA adapter. Without --task and --data, a run directory is measured on the held-out
split of its own data. Nothing of a held-out split is in the training data.

Writes --out: evaluation.json, every episode in episodes_after.jsonl and episodes_before.jsonl,
config.toml, summary.json. --resume runs what is missing there; what is finished is printed.

examples:
  composer-replication evaluate smollm2-135m --task api_drift
  composer-replication evaluate runs/first --against smollm2-135m
  composer-replication evaluate runs/first --task call_format --set num_demos=1 --episodes 100
  composer-replication evaluate Qwen/Qwen2.5-7B-Instruct --task api_drift --on modal --dry-run

exit codes: 0 done, 1 failed, 2 your input, 130 Ctrl-C"""


def _evaluate(options: argparse.Namespace) -> Answer:
    from composer_replication.runs.run_directory import has_passed
    from composer_replication.runs.run_folders import latest_folder

    asked = asked_evaluation(options)
    is_other_process = is_elsewhere(options)
    data = asked.episodes()
    request, table = asked.request(data), asked.table(data)
    name = f"evaluate-{data.task.rpartition(':')[2]}"
    if options.resume:
        earlier = options.out or latest_folder(RUNS_FOLDER, name)
        _refuse_another_evaluation(earlier, table)
        if has_passed(earlier):
            return _answer(options, earlier)
    if options.on == "modal":
        return _report_or(*evaluate_on_modal(options, asked, request, name))
    return _evaluate_here(options, asked, request, table, name, is_other_process)


def _evaluate_here(
    options: argparse.Namespace,
    asked: AskedEvaluation,
    request: "EvaluationRequest",
    table: Mapping[str, object],
    name: str,
    is_other_process: bool,
) -> Answer:
    """On this machine: in this process, or in one of its own."""
    from rich.console import Console

    from composer_replication.experiments.evaluation import check_models, run_evaluation
    from composer_replication.experiments.planned_evaluation import write_planned_evaluation
    from composer_replication.launch.job import Job, new_job_id

    check_models(request)
    progress = Console(stderr=True)

    def run_it(run: "RunDirectory") -> "Summary":
        write_planned_evaluation(request, run)
        report = run_evaluation(
            request, run.path, lambda text: progress.print(text, highlight=False, soft_wrap=True)
        )
        summary = _summary(report)
        run.write_summary(summary)
        return summary

    with open_run(options, name) as run:
        if not is_other_process:
            run.write_config(_config_text(table))
            summary, code = record_ending(run, lambda: run_it(run), model=request.model)
            return _answer(options, run.path) if code == 0 else (summary.to_json(), code)
    job = Job(job_id=new_job_id(name), verb="evaluate", arguments=asked.arguments())
    return _report_or(run_job_on_local(job, run.path, options), run.path)


def _refuse_another_evaluation(folder: Path, table: Mapping[str, object]) -> None:
    """An evaluation that goes on is the one that was begun in the folder.

    Raises:
        ConfigError: it measured something else.
    """
    path = folder / "config.toml"
    if not path.is_file():
        return
    begun = tomllib.loads(path.read_text(encoding="utf-8")).get("evaluate", {})
    different = sorted(k for k in begun.keys() | table.keys() if begun.get(k) != table.get(k))
    if different:
        raise ConfigError(
            f"{folder} was begun with other values of {', '.join(different)} ({path} has them). "
            "Two evaluations in one folder could not be told apart. Choose another --out."
        )


def _config_text(table: Mapping[str, object]) -> str:
    import tomlkit

    return tomlkit.dumps({"evaluate": dict(table)})


def _summary(report: "EvaluationReport") -> "Summary":
    """How the evaluation ended; its figures are in the report, its seconds calibrate plans."""
    from statistics import fmean

    from composer_replication.runs.summary import Summary

    models = [report.model] if report.against is None else [report.against, report.model]
    load_s = [model.load_seconds or 0.0 for model in models]
    played_s = [model.seconds - load for model, load in zip(models, load_s, strict=True)]
    return Summary(
        status="passed",
        model=report.model.label,
        device=report.device,
        # Its steps are its models.
        median_step_s=round(fmean(played_s), 1),
        phases_s={"load": round(sum(load_s), 1), "rollout": round(sum(played_s), 1)},
        total_s=report.total_s,
        notes=["The figures are in evaluation.json."],
    )


def _answer(options: argparse.Namespace, folder: Path) -> Answer:
    """The report of a finished evaluation, shown as a table unless it is printed as JSON."""
    from rich.console import Console

    from composer_replication.experiments.evaluation import read_report
    from composer_replication.experiments.evaluation_table import print_evaluation

    report = read_report(folder)
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


def _report_or(answer: Answer, folder: Path | None) -> Answer:
    """What another process found; what is known instead where it did not come to its end."""
    from composer_replication.experiments.evaluation import read_report
    from composer_replication.runs.run_directory import has_passed

    if answer[1] == 0 and folder is not None and has_passed(folder):
        return read_report(folder).to_json(), 0
    return answer


EVALUATE = Verb(
    name="evaluate",
    summary="does a model do the task on held-out episodes; before against after",
    purpose="Plays held-out episodes, greedy and sampled, and says what changed and how surely.",
    epilog=_EPILOG,
    options=(
        Option("--task", "NAME", "shipped task: api_drift, call_format, fix_call, reasoning_gym"),
        Option(
            "--data", "DIR", "data folder of yours with heldout/, or a run that has one", "path"
        ),
        Option("--against", "MODEL", "the model before; measured on the same prompts"),
        Option("--split", "NAME", "heldout (default), train, or of a task validation"),
        Option("--episodes", "N", "prompts of the task; default its own number"),
        Option("--turns", "N", "actions of an episode; default the run's, or 8"),
        Option("--action-tokens", "N", "where an action is cut; default the run's, or 48"),
        Option("--samples", "K", "sampled episodes of each prompt; default 4"),
        Option("--temperature", "T", "of the sampled episodes; default 1"),
        Option("--seed", "N", "of the task's data and of sampling; default 0"),
        Option(
            "--set", "KEY=VALUE", "one knob of the task, or modal.KEY; may be repeated", "repeated"
        ),
        Option("--out", "DIR", "default runs/evaluate-<task>, numbered where taken", "path"),
        RESUME,
        JSON,
        ON,
        *MODAL_OPTIONS,
    ),
    carry_out=_evaluate,
    argument=Argument("model", "MODEL", is_required=True, kind="text"),
)
