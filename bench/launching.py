"""What starting a run costs beside the run: `--on local`, and eight members four at a time.

    python bench/launching.py local --repeats 20
    python bench/launching.py sweep

- `local`: the same run with and without `--on local`, taking turns, each a command of its own; both
  must leave the same rows. The median of the pairs' differences. Its training is the sum that the
  tests of launching use: a real one's seconds vary by more than what is measured.
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
STAND_IN = Path(__file__).parents[1] / "tests" / "unit" / "launch" / "stand_in"
SUMS = """
name = "sums"
[grpo]
max_steps = 4
save_steps = 2
"""
GRID = ("--grid", "alpha_sdpo=0,0.05,0.1,0.2", "--grid", "beta_replay=0,0.05")


def main() -> int:
    """Exit 1 where a command failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("local", "sweep"))
    parser.add_argument("--repeats", type=int, default=20, help="pairs of runs of `local`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="composer-launching-") as scratch:
        folder = Path(scratch)
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
    (folder / "run.toml").write_text(SUMS, encoding="utf-8")
    places = {"here": (), "on_local": ("--on", "local")}
    walls_s: dict[str, list[float]] = {name: [] for name in places}
    for repeat in range(repeats + 1):
        rows = []
        for name, flags in places.items():
            out = folder / f"{name}-{repeat}"
            started_s = time.perf_counter()
            _command(folder, STAND_IN, "train", "run.toml", "--out", str(out), *flags)
            # The first of each fills the disk's cache.
            if repeat:
                walls_s[name].append(time.perf_counter() - started_s)
            rows.append((out / "metrics.jsonl").read_text(encoding="utf-8"))
        assert rows[0] == rows[1], "both places must train the same"
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
    make_model(folder / "model")
    (folder / "run.toml").write_text(CONFIG.format(model=folder / "model"), encoding="utf-8")
    command = ("sweep", "run.toml", *GRID, "--parallel", str(PARALLEL), "--out", "sweep")
    _command(folder, Path(__file__).parent, *command)
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
        f"## Launching: {eight['machine']}",
        "",
        "`python bench/launching.py local` and `python bench/launching.py sweep`",
        "",
        f"`--on local` adds {statistics.median(added_s):.2f} s on a {one['machine']}: the median",
        f"of {one['repeats']} pairs of runs that took turns "
        f"({added_s[0]:.2f} to {added_s[-1]:.2f} s).",
        "",
        f"A sweep of {eight['members']} members that train a tiny model, {eight['parallel']} at a "
        f"time, took {eight['wall_s']:.0f} s, {eight['ratio']:.2f} of the",
        f"{eight['least_wall_s']:.0f} s that no schedule of those durations could beat.",
        "",
    ]


def _command(folder: Path, modules: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "composer_replication", *arguments],
        cwd=folder,
        env={**os.environ, **PROCESS_ENV, "PYTHONPATH": str(modules)},
        capture_output=True,
        text=True,
        check=True,
    )


if __name__ == "__main__":
    sys.exit(main())
