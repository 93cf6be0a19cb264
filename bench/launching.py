"""What starting a run costs beside the run: `--on local`, and eight members four at a time.

    python bench/launching.py local --repeats 5
    python bench/launching.py sweep

- `local`: the same training of a tiny model with and without `--on local`, taking turns, each a
  command of its own; both must leave the same losses. The median of the pairs' differences.
- `sweep`: eight members that train, four in parallel, in the wall clock of the sweep over the least
  that any schedule of the durations measured in that run could take.

Each part is written to `bench/results/launching.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kill_resume import CONFIG, make_model
from step_measure import PROCESS_ENV

RESULTS = Path(__file__).parent / "results" / "launching.json"
PARALLEL = 4
ONE_STEP = ("--set", "grpo.max_steps=1")
GRID = ("--grid", "alpha_sdpo=0,0.05,0.1,0.2", "--grid", "beta_replay=0,0.05")


def main() -> int:
    """Exit 1 where a command failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("local", "sweep"))
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs of `local`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="composer-launching-") as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        (folder / "run.toml").write_text(CONFIG.format(model=folder / "model"), encoding="utf-8")
        try:
            part = local(folder, options.repeats) if options.part == "local" else sweep(folder)
        except subprocess.CalledProcessError as error:
            print(f"{error}\n{error.stderr[-2000:]}", file=sys.stderr)
            return 1
    print(json.dumps(part, indent=1))
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    stored[options.part] = part
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return 0


def local(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds that a process of its own adds to a run."""
    places = {"here": (), "on_local": ("--on", "local")}
    walls_s: dict[str, list[float]] = {name: [] for name in places}
    for repeat in range(repeats + 1):
        losses = []
        for name, flags in places.items():
            out = folder / f"{name}-{repeat}"
            started_s = time.perf_counter()
            _command(folder, "train", "run.toml", "--out", str(out), *ONE_STEP, *flags)
            # The first of each fills the disk's cache.
            if repeat:
                walls_s[name].append(time.perf_counter() - started_s)
            losses.append(_losses(out))
        assert losses[0] == losses[1], "both places must train the same"
    pairs = zip(walls_s["on_local"], walls_s["here"], strict=True)
    added_s = sorted(theirs - ours for theirs, ours in pairs)
    return {
        "machine": f"{len(os.sched_getaffinity(0))}-core CPU",
        "repeats": repeats,
        "median_s": {name: statistics.median(found) for name, found in walls_s.items()},
        "added_s": added_s,
    }


def sweep(folder: Path) -> dict[str, Any]:
    """Wall clock of eight members over the least possible."""
    _command(folder, "sweep", "run.toml", *GRID, "--parallel", str(PARALLEL), "--out", "sweep")
    report = json.loads((folder / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    return {
        "machine": f"{len(os.sched_getaffinity(0))}-core CPU",
        "members": len(report["members"]),
        "parallel": PARALLEL,
        "wall_s": report["wall_s"],
        "least_wall_s": report["least_wall_s"],
        "ratio": report["wall_s"] / report["least_wall_s"],
    }


def launching_lines() -> list[str]:
    """Both parts as sentences of docs/measurements.md."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    one, eight = found["local"], found["sweep"]
    added_s = one["added_s"]
    return [
        f"## Launching: a tiny model, {one['machine']}",
        "",
        "`python bench/launching.py local` and `python bench/launching.py sweep`",
        "",
        f"`--on local` adds {statistics.median(added_s):.2f} s to a run of "
        f"{one['median_s']['here']:.1f} s: the median of {one['repeats']} pairs",
        f"that took turns, with the same losses ({added_s[0]:.2f} to {added_s[-1]:.2f} s).",
        "",
        f"A sweep of {eight['members']} training members, {eight['parallel']} at a time, took "
        f"{eight['wall_s']:.0f} s, {eight['ratio']:.2f} of the",
        f"{eight['least_wall_s']:.0f} s that no schedule of those durations could beat.",
        "",
    ]


def _losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _command(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "composer_replication", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=True,
    )


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in PROCESS_ENV.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PROCESS_ENV})
    sys.exit(main())
