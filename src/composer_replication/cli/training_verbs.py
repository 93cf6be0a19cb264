"""`smoke` and `train`."""

import argparse
import json
from typing import TYPE_CHECKING

from composer_replication.cli.launching import ON, is_elsewhere, run_elsewhere
from composer_replication.cli.modal_run import MODAL_OPTIONS
from composer_replication.cli.recorded_run import carry_out_in_run
from composer_replication.cli.verb import RUN_OPTIONS, Answer, Argument, Option, Verb
from composer_replication.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from composer_replication.runs.run_directory import RunDirectory
    from composer_replication.runs.summary import Summary

_SMOKE_EPILOG = """\
Writes runs/<name>/: config.toml, metrics.jsonl, summary.json, rollouts/. --resume runs it again
in the same folder. Where a key is given twice, options win over --set, and --set over the file.

examples:
  composer-replication smoke
  composer-replication smoke --model Qwen/Qwen2.5-0.5B-Instruct --steps 50
  composer-replication smoke --fixed-shapes 2,1024 --set beta_replay=0

exit codes: 0 every check passed, 1 a check or the run failed, 2 your input, 130 Ctrl-C"""

_TRAIN_EPILOG = """\
Writes runs/<name>/: config.toml, metrics.jsonl, summary.json, rollouts/, checkpoints/, model/.
--resume continues from the newest whole checkpoint, or starts where there is none; only the length
of the run and what is kept of it may have changed.

examples:
  composer-replication train configs/train_qwen2.5_7b.toml --out runs/first
  composer-replication train runs/first/config.toml --out runs/first --resume

exit codes: 0 done, 1 failed, 2 your input, 130 Ctrl-C"""


def _smoke(options: argparse.Namespace) -> Answer:
    from composer_replication.config.loading import load_config

    overrides = _smoke_overrides(options)
    config = load_config(options.config, overrides)
    if is_elsewhere(options):
        return run_elsewhere("smoke", options, config, overrides)
    if options.config is None:
        from composer_replication.config.smoke_defaults import with_smoke_defaults
        from composer_replication.experiments.trainer_setup import device

        config = with_smoke_defaults(config, "cuda" if device().type == "cuda" else "cpu")

    def run_it(run: "RunDirectory", console: "Console") -> "Summary":
        from composer_replication.experiments.smoke import run_smoke

        # A smoke has no checkpoint to go on from: its rows start anew.
        run.truncate_metrics(last_step=-1)
        return run_smoke(config, run, console)

    return carry_out_in_run(config, options, run_it)


def _train(options: argparse.Namespace) -> Answer:
    from composer_replication.config.loading import load_config

    config = load_config(options.config, options.set)
    if is_elsewhere(options):
        return run_elsewhere("train", options, config, options.set)

    def run_it(run: "RunDirectory", console: "Console") -> "Summary":
        from composer_replication.experiments.train import run_train

        return run_train(config, run, console, resume=options.resume)

    return carry_out_in_run(config, options, run_it)


def _smoke_overrides(options: argparse.Namespace) -> list[str]:
    """`--set` and the smoke's own options as overrides; the later ones win."""
    overrides: list[str] = list(options.set)
    # JSON's quoting is TOML's, so that a path with '=' or quotes stays one text.
    if options.model is not None:
        overrides.append(f"model={json.dumps(options.model, ensure_ascii=False)}")
    if options.data is not None:
        overrides.append(f"data={json.dumps(options.data, ensure_ascii=False)}")
    if options.steps is not None:
        if not options.steps.isdecimal() or int(options.steps) == 0:
            raise InputError(
                f"--steps is {options.steps!r}; it counts optimizer steps and must be a whole "
                "number of at least 1. Write for example --steps 50."
            )
        overrides.append(f"smoke.steps={int(options.steps)}")
    if options.fixed_shapes is not None:
        sizes = options.fixed_shapes.split(",")
        if len(sizes) != 2 or not all(size.strip().isdecimal() for size in sizes):
            raise InputError(
                f"--fixed-shapes is {options.fixed_shapes!r}; it must be two whole numbers, B "
                "rows and T tokens, with a comma between. Write for example --fixed-shapes 2,1024."
            )
        overrides.append(f"smoke.fixed_shapes=[{int(sizes[0])}, {int(sizes[1])}]")
    return overrides


SMOKE = Verb(
    name="smoke",
    summary="do the channels run end to end on my model; how much memory, how long a step",
    purpose="Runs the three channels end to end and reports memory, step time and every check.",
    epilog=_SMOKE_EPILOG,
    options=(
        Option("--model", "M", "Hugging Face id or local folder; sets model"),
        Option("--data", "DIR", "folder of prompts, hint sites and pairs; sets data"),
        Option("--steps", "N", "optimizer steps, at least 1; sets smoke.steps"),
        Option(
            "--fixed-shapes",
            "B,T",
            "B rows of T tokens at every step, nothing sampled; such as 2,1024",
        ),
        *RUN_OPTIONS,
        ON,
        *MODAL_OPTIONS,
    ),
    carry_out=_smoke,
    argument=Argument("config", "CONFIG.toml", is_required=False),
)

TRAIN = Verb(
    name="train",
    summary="the run that a configuration file describes",
    purpose="Trains the model that CONFIG.toml describes and saves it.",
    epilog=_TRAIN_EPILOG,
    options=(*RUN_OPTIONS, ON, *MODAL_OPTIONS),
    carry_out=_train,
    argument=Argument("config", "CONFIG.toml", is_required=True),
)
