"""Does it learn? Runs the missing runs of the evidence, one small result file each.

    python bench/evidence.py --max-runs 1                    # the most telling one of the missing
    python bench/evidence.py --only task=api_drift --only arm=all,grpo
    python bench/evidence.py --only seed=7 --only drift=3    # outside the plan
    python bench/evidence.py --render                        # docs/evidence.md from what is there
    python bench/evidence.py --list                          # what is missing

A run that is interrupted leaves no result and is run again. Processes may work side by side.
"""

import argparse
import sys
from pathlib import Path

from evidence_page import write_page
from filelock import FileLock, Timeout

from composer_replication.errors import InputError
from composer_replication.experiments.evidence_arms import next_runs
from composer_replication.experiments.evidence_report import finished
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.runs.json_text import to_json_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "evidence"


def main() -> int:
    """Run what is missing, then render the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-runs", type=int, default=None, help="stop after so many runs")
    parser.add_argument("--only", action="append", default=[], metavar="KEY=VALUES")
    parser.add_argument("--list", action="store_true", help="show what is missing and stop")
    parser.add_argument("--render", action="store_true", help="only write docs/evidence.md")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.render:
        write_page(args.results, ROOT / "docs")
        return 0
    only = {name: values for name, _, values in (text.partition("=") for text in args.only)}
    try:
        missing = next_runs(finished(args.results), only)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(missing)} runs are missing", flush=True)
    if args.list:
        print("\n".join(run.key for run in missing))
        return 0
    from composer_replication.experiments.evidence import run_evidence

    args.results.mkdir(parents=True, exist_ok=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    num_left = len(missing) if args.max_runs is None else args.max_runs
    for run in missing:
        if num_left == 0:
            break
        lock = FileLock(args.runs / f"{run.key}.lock", timeout=0)
        path = args.results / f"{run.key}.json"
        try:
            with lock:
                # Another process may have made it since.
                if path.exists():
                    continue
                print(run.key, flush=True)
                result = run_evidence(run, args.runs, lambda line: print(f"  {line}", flush=True))
                write_text_atomically(path, to_json_text(result) + "\n")
        except Timeout:
            print(f"{run.key} is being made by another process", flush=True)
            continue
        num_left -= 1
        write_page(args.results, ROOT / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
