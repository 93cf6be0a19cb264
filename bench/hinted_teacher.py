"""How often a hinted model gives today's call of the API-drift task: what SDPO can teach at most.

python bench/hinted_teacher.py --drifts 0,1,4,7 --tasks 4

For each tool of the evidence under each drift: the probability of the whole right call at the
evidence's temperature, and whether it is the greedy answer, at training prompts where the old call
failed. Rows differ in how many of the prompt's requests the hint answers (`num_hint_demos`).
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_replication.batch.render import render_action, render_state, with_hint
from composer_replication.environments.api_drift_rules import TOOL_KEYS, drift_from_seed
from composer_replication.environments.api_drift_tasks import NUM_DEMOS
from composer_replication.environments.episode_spec import EpisodeSpec
from composer_replication.experiments.api_drift_data import hint_site, scripted_episode
from composer_replication.experiments.evidence import drifted_tools
from composer_replication.experiments.evidence_arms import SETTINGS, sampling_temperature
from composer_replication.training.model_source import load_model

TASK = SETTINGS["api_drift"]


@torch.no_grad()
def right_call(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: EpisodeSpec
) -> tuple[float, bool]:
    """(probability of the right call, whether it is the greedy one) of the hinted model."""
    episode = scripted_episode(spec, index=0)
    site = hint_site(episode)
    assert site is not None
    hinted = render_state(tokenizer, with_hint(site.state, site.hint, "demonstrate"))
    action = render_action(tokenizer, site.state, episode.turns[0].chosen)
    ids = torch.tensor([hinted + list(action)])
    logits = model(ids).logits[0, len(hinted) - 1 : -1].double()
    target = torch.tensor(action)
    logps = torch.log_softmax(logits / sampling_temperature(TASK), dim=-1)
    return (
        float(logps.gather(1, target[:, None]).sum().exp()),
        bool((logits.argmax(-1) == target).all()),
    )


def measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drifts: Sequence[int],
    num_tasks: int,
) -> dict[int, dict[str, list[tuple[float, bool]]]]:
    """By number of demonstrations and kind of rule: `right_call` of every prompt."""
    found: dict[int, dict[str, list[tuple[float, bool]]]] = {}
    for num_shown in range(NUM_DEMOS + 1):
        by_kind: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        for drift_seed in drifts:
            tools = drifted_tools(drift_seed, TASK.num_tools)
            for rule in drift_from_seed(drift_seed).rules:
                if rule.tool not in tools:
                    continue
                first = list(TOOL_KEYS).index(rule.tool)
                seeds = range(first, num_tasks * len(TOOL_KEYS), len(TOOL_KEYS))
                for seed in seeds:
                    spec = EpisodeSpec(seed, drift_seed=drift_seed, num_hint_demos=num_shown)
                    by_kind[rule.kind].append(right_call(model, tokenizer, spec))
        found[num_shown] = by_kind
    return found


def main() -> None:
    """Print a row for each number of demonstrations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--drifts", default="0,1,4,7")
    parser.add_argument("--tasks", type=int, default=4, help="prompts a tool")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m")
    drifts = [int(seed) for seed in args.drifts.split(",")]
    found = measured(loaded.model.eval(), loaded.tokenizer, drifts, args.tasks)
    kinds = sorted(found[0])
    print("P(right call) / greedy\n| demonstrations | all | " + " | ".join(kinds) + " |")
    for num_shown, by_kind in found.items():
        rows = [[row for kind in kinds for row in by_kind[kind]], *(by_kind[k] for k in kinds)]
        cells = [
            f"{sum(p for p, _ in row) / len(row):.2f} / {sum(hit for _, hit in row) / len(row):.2f}"
            for row in rows
        ]
        print(f"| {num_shown} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
