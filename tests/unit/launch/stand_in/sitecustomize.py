"""Python imports this at its start: the training bodies become sums, so that a run takes no torch.

Everything around them is the real thing: the command line, the run directory, its lock, checkpoints
and summary. What is summed depends on the configuration and on every step before, so that a run
that was resumed wrongly ends with another result.
"""

import errno
import io
import json
import os
import signal
import sys
import time
import types
from pathlib import Path


def run_train(config, run, console, *, resume=False):
    from composer_replication.errors import TrainingError
    from composer_replication.runs.checkpoint_folders import (
        checkpoint_step,
        newest_checkpoint,
        publish_checkpoint,
        staging_folder,
    )
    from composer_replication.runs.summary import Check, Summary

    checkpoint = newest_checkpoint(run.checkpoints_dir, print) if resume else None
    step = 0 if checkpoint is None else checkpoint_step(checkpoint)
    value = config.alpha_sdpo + 10 * config.beta_replay + config.seed
    if checkpoint is not None:
        value = json.loads((checkpoint / "state.json").read_text())["value"]
        print(f"resumed from step {step}", flush=True)
    run.truncate_metrics(last_step=step)
    _fail_as_told(run, TrainingError)
    while step < config.grpo.get("max_steps", 4):
        step += 1
        time.sleep(float(os.environ.get("STAND_IN_STEP_S", "0")))
        _meet_trouble(step, run.path.name)
        value = (value * 1.37 + step) % 7
        run.append_metrics({"step": step, "loss": value, "reward": value / 7})
        print(f"step {step}", flush=True)
        if os.environ.get("RANK", "0") == "0" and step % config.grpo.get("save_steps", 2) == 0:
            staged = staging_folder(run.checkpoints_dir) / f"checkpoint-{step}"
            staged.mkdir(parents=True, exist_ok=True)
            (staged / "state.json").write_text(json.dumps({"value": value}))
            publish_checkpoint(staged, run.checkpoints_dir)
    run.model_dir.mkdir(exist_ok=True)
    (run.model_dir / "weights.json").write_text(json.dumps(value))
    summary = Summary(
        status="passed",
        checks=[Check("channels_live/grpo", passed=True)],
        device="cpu",
        steps=step,
        median_step_s=0.1,
        total_s=1.0,
        channels={"grpo": {"loss_last": value}, "sdpo": {"loss_last": value / 2}},
    )
    run.write_summary(summary)
    console.print(f"passed  {step} steps")
    return summary


def run_smoke(config, run, console):
    return run_train(config, run, console)


def _meet_trouble(step, name):
    """`STAND_IN_..._AT` names the step at which the run hangs, runs out of memory or of room.

    Those hang that have `STAND_IN_HANG_IN` in their name, until the file `STAND_IN_GO` is there.
    """
    hangs = os.environ.get("STAND_IN_HANG_IN", "") in name
    if hangs and step == int(os.environ.get("STAND_IN_HANG_AT", "0")):
        if "STAND_IN_DEAF" in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        Path(os.environ["HOME"], "hanging").touch()
        end_s, go = time.monotonic() + 600, Path(os.environ.get("STAND_IN_GO", "/nonexistent"))
        while time.monotonic() < end_s and not go.exists():
            time.sleep(0.05)
    if step == int(os.environ.get("STAND_IN_OOM_AT", "0")):
        Path(os.environ["HOME"], "events").write_text("oom_kill 1\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if step == int(os.environ.get("STAND_IN_FULL_AT", "0")):
        Path(os.environ["HOME"], "full").touch()


def _jump(clock):
    """A clock that has gone on by `STAND_IN_JUMP_S` once a run hangs."""
    mark, jump_s = Path(os.environ["HOME"], "hanging"), float(os.environ["STAND_IN_JUMP_S"])
    return lambda: clock() + jump_s * mark.exists()


def _fill_up(open_file):
    """`open` on a disk whose volume of runs is full once the mark is there."""
    runs, mark = os.environ["COMPOSER_RUNS"], Path(os.environ["HOME"], "full")

    def open_or_refuse(file, mode="r", *args, **kwargs):
        if set(mode) & set("wax") and str(file).startswith(runs) and mark.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return open_file(file, mode, *args, **kwargs)

    return open_or_refuse


def _fail_as_told(run, error_class):
    """`STAND_IN_FAIL` names what fails how often, such as `{"seed-1": 1}`."""
    told = json.loads(os.environ.get("STAND_IN_FAIL", "{}"))
    marks = run.path.parent / f".{run.path.name}.failures"
    failures = len(marks.read_text()) if marks.exists() else 0
    for part, times in told.items():
        if part in run.path.name and failures < times:
            marks.write_text("x" * (failures + 1))
            raise error_class(f"told to fail {times} times")


for _name, _body in (("train", run_train), ("smoke", run_smoke)):
    _module = types.ModuleType(f"composer_replication.experiments.{_name}")
    setattr(_module, f"run_{_name}", _body)
    sys.modules[_module.__name__] = _module
_defaults = types.ModuleType("composer_replication.experiments.smoke_defaults")
_defaults.with_smoke_defaults = lambda config: config
sys.modules[_defaults.__name__] = _defaults
if "STAND_IN_FULL_AT" in os.environ and "COMPOSER_RUNS" in os.environ:
    io.open = _fill_up(io.open)
if "STAND_IN_JUMP_S" in os.environ and "COMPOSER_RUNS" in os.environ:
    time.time = _jump(time.time)
if "STAND_IN_OOM_AT" in os.environ and "COMPOSER_RUNS" in os.environ:
    import composer_replication.launch.container

    composer_replication.launch.container._CGROUP_EVENTS = Path(os.environ["HOME"], "events")
