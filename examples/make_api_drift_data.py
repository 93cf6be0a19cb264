"""Make the data of the API-drift task: prompts, hint sites, pairs and episodes. Needs no model.

python examples/make_api_drift_data.py my_data                       # what ships
python examples/make_api_drift_data.py my_data --seed 1 --drift 7    # other tasks, another drift
"""

import argparse
import json
from pathlib import Path

from composer_replication.environments.episode_spec import EpisodeSpec
from composer_replication.experiments.api_drift_data import write_data


def main() -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="which tasks; 0 is what ships")
    parser.add_argument("--drift", type=int, default=0, help="seed of the drift; 0 is what ships")
    parser.add_argument("--drifted-tools", type=int, default=8, help="0 to 8")
    parser.add_argument("--spare-turns", type=int, default=1, help="errors an episode forgives")
    parser.add_argument("--hide-examples", action="store_true", help="errors show no example call")
    args = parser.parse_args()
    spec = EpisodeSpec(
        task_seed=0,
        drift_seed=args.drift,
        num_drifted_tools=args.drifted_tools,
        num_spare_turns=args.spare_turns,
        is_example_shown=not args.hide_examples,
    )
    manifest = write_data(args.folder, args.seed, spec)
    print(f"wrote {args.folder}: {json.dumps(manifest['counts'])}")


if __name__ == "__main__":
    main()
