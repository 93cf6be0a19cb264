"""Make the data folder of a shipped task: prompts, hint sites and pairs. Needs no model.

python examples/make_task_data.py api_drift my_data                          # what ships
python examples/make_task_data.py api_drift my_data --seed 1 --set drift_seed=7
python examples/make_task_data.py call_format my_data --set num_matching_demos=0
"""

import argparse
import json
from pathlib import Path

from composer_replication.experiments.task_registry import TASKS, find_task, write_task


def main() -> None:
    """Parse the command line and write the folder."""
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
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=JSON", dest="knobs")
    args = parser.parse_args()
    given = {"train": args.episodes, "heldout": args.heldout_episodes}
    numbers = {**find_task(args.task).num_episodes, **{k: v for k, v in given.items() if v}}
    knobs = {
        key: json.loads(value) for key, _, value in (text.partition("=") for text in args.knobs)
    }
    manifest = write_task(args.folder, args.task, seed=args.seed, num_episodes=numbers, **knobs)
    print(f"wrote {args.folder}: {json.dumps(manifest['counts'])}")


if __name__ == "__main__":
    main()
