"""How often a hinted model gives the right call of an evidence task: what SDPO can teach at most.

python bench/hinted_teacher.py --drifts 0,1,4,7 --prompts 4
python bench/hinted_teacher.py --task call_format --prompts 9

The probability of the whole right call at the evidence's temperature, and whether it is the greedy
answer, at training prompts where a call failed: the old one of task A, by kind of rule for each
tool of the evidence under each drift, or a script's slip of task B, by tool. Rows differ in how
many requests the hint answers (`num_hint_demos`).
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_replication.batch.render import render_action, render_state, with_hint
from composer_replication.environments.api_drift_rules import TOOL_KEYS, drift_from_seed
from composer_replication.environments.api_drift_tasks import NUM_DEMOS
from composer_replication.environments.call_format_tasks import CALL_KEYS
from composer_replication.environments.episode_spec import EpisodeSpec
from composer_replication.experiments.api_drift_data import hint_site, scripted_episode
from composer_replication.experiments.evidence import drifted_tools
from composer_replication.experiments.evidence_arms import SETTINGS, sampling_temperature
from composer_replication.experiments.task_registry import task_rows
from composer_replication.traces.hints import HintSite
from composer_replication.training.model_source import load_model

Case = tuple[str, HintSite, str]
"""What it is counted under, the error turn with its hint, and the right call."""


@torch.no_grad()
def right_call(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, site: HintSite, call: str
) -> tuple[float, bool]:
    """(probability of the right call, whether it is the greedy one) of the hinted model."""
    hinted = render_state(tokenizer, with_hint(site.state, site.hint, "demonstrate"))
    action = render_action(tokenizer, site.state, call)
    ids = torch.tensor([hinted + list(action)])
    logits = model(ids).logits[0, len(hinted) - 1 : -1].double()
    target = torch.tensor(action)
    logps = torch.log_softmax(logits / sampling_temperature(SETTINGS["api_drift"]), dim=-1)
    return (
        float(logps.gather(1, target[:, None]).sum().exp()),
        bool((logits.argmax(-1) == target).all()),
    )


def drift_cases(num_shown: int, drifts: Sequence[int], num_prompts: int) -> Iterator[Case]:
    """So many prompts of each tool of task A under each drift, by kind of rule."""
    for drift_seed in drifts:
        tools = drifted_tools(drift_seed, SETTINGS["api_drift"].num_tools)
        for rule in drift_from_seed(drift_seed).rules:
            if rule.tool not in tools:
                continue
            first = list(TOOL_KEYS).index(rule.tool)
            for seed in range(first, num_prompts * len(TOOL_KEYS), len(TOOL_KEYS)):
                spec = EpisodeSpec(seed, drift_seed=drift_seed, num_hint_demos=num_shown)
                episode = scripted_episode(spec, index=0)
                site = hint_site(episode)
                assert site is not None
                yield rule.kind, site, episode.turns[0].chosen


def format_cases(num_shown: int, num_prompts: int) -> Iterator[Case]:
    """So many prompts of each tool of task B."""
    knobs = {**SETTINGS["call_format"].knobs, "num_hint_demos": num_shown}
    num_episodes = num_prompts * len(CALL_KEYS)
    rows = task_rows("call_format", "train", num_episodes=num_episodes, **knobs)
    for site, pair in zip(rows.hint_sites, rows.pairs, strict=True):
        yield json.loads(pair.chosen)["tool"], site, pair.chosen


def main() -> None:
    """Print a row for each number of demonstrations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--task", choices=["api_drift", "call_format"], default="api_drift")
    parser.add_argument("--drifts", default="0,1,4,7")
    parser.add_argument("--prompts", type=int, default=4, help="of each tool")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m")
    model = loaded.model.eval()
    drifts = [int(seed) for seed in args.drifts.split(",")]
    for num_shown in range(NUM_DEMOS + 1):
        cases = (
            drift_cases(num_shown, drifts, args.prompts)
            if args.task == "api_drift"
            else format_cases(num_shown, args.prompts)
        )
        by_kind: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        for kind, site, call in cases:
            by_kind[kind].append(right_call(model, loaded.tokenizer, site, call))
        kinds = sorted(by_kind)
        if num_shown == 0:
            print("P(right call) / greedy\n| demonstrations | all | " + " | ".join(kinds) + " |")
        rows = [[row for kind in kinds for row in by_kind[kind]], *(by_kind[k] for k in kinds)]
        cells = [
            f"{sum(p for p, _ in row) / len(row):.2f} / {sum(hit for _, hit in row) / len(row):.2f}"
            for row in rows
        ]
        print(f"| {num_shown} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
