"""Every rollout as a readable row: people read samples before curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_replication.runs.rollout_files import write_rollouts
from composer_replication.traces.hints import HintSite
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.trl_hooks import GRPOTrainer


class RolloutRow(TypedDict):
    """One line of `rollouts/step_000001.jsonl`."""

    prompt: object
    turns: list[dict[str, str]]
    rewards: dict[str, float | None]
    advantage: float
    errors: list[dict[str, str]]
    failure: str
    """Why its environment gave no reward; empty where it gave one."""
    num_sampled_tokens: int
    schema: int


def rollout_rows(
    inputs: Sequence[Mapping[str, object]],
    output: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> list[RolloutRow]:
    """This rank's rollouts, rewards still to be filled in.

    Args:
        inputs: the rows TRL generated for, with what the rollout loop added.
        output: what TRL made of them, in the same order.
        tokenizer: decodes completions where no rollout loop kept their turns.
    """
    mask = output["completion_mask"]
    sampled = mask * output["tool_mask"] if "tool_mask" in output else mask
    rows: list[RolloutRow] = []
    for index, row in enumerate(inputs):
        turns = cast(list[dict[str, str]] | None, row.get("turns"))
        if turns is None:
            ids = output["completion_ids"][index][mask[index].bool()]
            text = cast(str, tokenizer.decode(ids, skip_special_tokens=True))
            turns = [{"role": "assistant", "content": text}]
        sites = cast(list[HintSite], row.get("rollout_hint_sites") or [])
        rows.append(
            {
                "prompt": row.get("prompt"),
                "turns": turns,
                "rewards": {},
                "advantage": float(output["advantages"][index].float().mean()),
                "errors": [
                    {"kind": s.error_kind, "action": s.action, "hint": s.hint} for s in sites
                ],
                "failure": cast(str, row.get("environment_failure") or ""),
                "num_sampled_tokens": int(sampled[index].sum()),
                "schema": 1,
            }
        )
    return rows


def write_step_rollouts(
    trainer: GRPOTrainer, inputs: Sequence[Mapping[str, object]], output: Mapping[str, Tensor]
) -> None:
    """Write the rollouts of every rank for the step that comes; all ranks call it together."""
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    rows: list[RolloutRow] = gather_object(rollout_rows(inputs, output, tokenizer))
    if not trainer.accelerator.is_main_process:
        return
    for name, rewards in trainer._logs["rewards"].items():
        for row, reward in zip(rows, list(rewards)[-len(rows) :], strict=True):
            row["rewards"][name] = reward
    args = cast(ComposerConfig, trainer.args)
    folder = Path(args.rollouts_dir or Path(str(args.output_dir)) / "rollouts")
    write_rollouts(folder, trainer.state.global_step + 1, rows)
