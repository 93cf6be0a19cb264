"""Make the data folder of a shipped task: prompts, hint sites and pairs. Needs no model.

python examples/make_task_data.py api_drift my_data                          # what ships
python examples/make_task_data.py api_drift my_data --seed 1 --set drift_seed=7
python examples/make_task_data.py call_format my_data --set num_matching_demos=0
"""

import argparse
import json
import sys
from pathlib import Path

from composer_replication.errors import InputError
from composer_replication.experiments.task_registry import TASKS, find_task, write_task


def main() -> int:
    """Parse the command line and write the folder; returns 2 where the input cannot be used."""
    knobs = "\n".join(f"{name}: {task.knobs()}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nknobs and their defaults\n{knobs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="which episodes")
    parser.add_argument("--episodes", type=int, help="of the training split")
    parser.add_argument("--heldout-episodes", type=int)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KNOB=JSON", dest="knobs", type=knob
    )
    args = parser.parse_args()
    given = {"train": args.episodes, "heldout": args.heldout_episodes}
    numbers = {**find_task(args.task).num_episodes, **{k: v for k, v in given.items() if v}}
    knobs = dict(args.knobs)
    try:
        find_task(args.task).check_knobs(knobs)
        manifest = write_task(args.folder, args.task, seed=args.seed, num_episodes=numbers, **knobs)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {args.folder}: {json.dumps(manifest['counts'])}")
    return 0


def knob(text: str) -> tuple[str, object]:
    """One `KNOB=JSON`; what is no JSON is text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
