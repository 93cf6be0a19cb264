"""Full-length rows that nothing sampled: for `--fixed-shapes` and the step at the largest shape."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.render import render_action, render_state
from composer_replication.errors import ConfigError
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair
from composer_replication.traces.trace import Message
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.trl_hooks import GRPOTrainer

HINT = "Hint: the last call used a key that the tool does not have."
CHOSEN = '{"tool": "read", "file": "/src/app.py"}'
REJECTED = '{"tool": "read", "path": "/src/app.py"}'


class FixedShapeRollouts:
    """A `rollout_func` that returns rows of exactly `num_tokens` tokens without sampling."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, args: ComposerConfig
    ) -> None:
        """Split a row into prompt and completion.

        Args:
            tokenizer: of the policy; its vocabulary bounds the filler ids.
            num_tokens: of each row.
            args: `max_completion_length` is the completion's share, half of the row at most.
        """
        self._tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.num_completion_tokens = min(int(args.max_completion_length or 1), num_tokens // 2)
        self._seed = args.seed
        # The loaders own their order; two of each keep hints and pairs distinct.
        self._num_records = 2 * max(args.hint_sites_per_step, args.pairs_per_step)

    def __call__(
        self, prompts: Sequence[object], trainer: GRPOTrainer
    ) -> Mapping[str, list[list[int]] | None]:
        """A row for each prompt; their tokens differ, so their synthetic rewards do too.

        They follow from the seed and the trainer's place alone, so a resumed run gets the same.
        """
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + trainer._step)
        shape = (len(prompts), self.num_tokens)
        rows = torch.randint(len(self._tokenizer), shape, generator=generator).tolist()
        cut = self.num_tokens - self.num_completion_tokens
        return {
            "prompt_ids": [row[:cut] for row in rows],
            "completion_ids": [row[cut:] for row in rows],
            "logprobs": None,
        }

    def hint_sites(self) -> list[HintSite]:
        """Sites whose teacher rows have `num_tokens` tokens."""
        return full_length_sites(self._tokenizer, self.num_tokens, self._num_records)

    def pairs(self) -> list[PreferencePair]:
        """Pairs whose longer row has `num_tokens` tokens."""
        return full_length_pairs(self._tokenizer, self.num_tokens, self._num_records)


def shortest_full_row(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the shortest row that `full_length_sites` and `full_length_pairs` can fill."""
    lengths = []
    for extra, action in ((f"\n\n{HINT} (0)", REJECTED), ("", CHOSEN)):
        state = (Message("user", f"Read the{extra}"),)
        rows = render_state(tokenizer, state), render_action(tokenizer, state, action)
        lengths.append(sum(map(len, rows)))
    return max(lengths)


def full_length_sites(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_sites: int
) -> list[HintSite]:
    """Hint sites whose teacher row, hint included, has `num_tokens` tokens."""
    state = _filled_state(tokenizer, num_tokens, f"\n\n{HINT} (0)", REJECTED)
    return [
        HintSite(
            state=state,
            hint=f"{HINT} ({index % 10})",
            action=REJECTED,
            is_on_policy=False,
            source=f"fixed:{index}",
        )
        for index in range(num_sites)
    ]


def full_length_pairs(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_pairs: int
) -> list[PreferencePair]:
    """Pairs whose rows have `num_tokens` tokens, up to the difference of the two actions."""
    state = _filled_state(tokenizer, num_tokens, "", CHOSEN)
    return [
        PreferencePair(state=state, chosen=CHOSEN, rejected=REJECTED, source=f"fixed:{index}")
        for index in range(num_pairs)
    ]


def full_length_rollouts(
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    num_prompt_tokens: int,
    num_completion_tokens: int,
) -> dict[str, Tensor]:
    """TRL's micro-batch of rollouts at their largest shape, with advantages that cancel."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, num_prompt_tokens + num_completion_tokens)
    ids = torch.randint(len(tokenizer), shape, generator=generator)
    prompt_ids, completion_ids = ids.split([num_prompt_tokens, num_completion_tokens], dim=1)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "advantages": torch.linspace(-1.0, 1.0, num_rows),
        "num_items_in_batch": torch.tensor(num_rows * num_completion_tokens),
    }


def _filled_state(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, extra: str, action: str
) -> tuple[Message, ...]:
    """A one-message state that with `extra` and the action comes to `num_tokens` tokens."""
    num_words, content = num_tokens, ""
    for _ in range(8):
        content = "Read" + " the" * num_words
        state = (Message("user", content + extra),)
        length = len(render_state(tokenizer, state)) + len(render_action(tokenizer, state, action))
        if length == num_tokens:
            return (Message("user", content),)
        num_words -= length - num_tokens
        if num_words < 1:
            raise ConfigError(
                f"A row of {num_tokens} tokens cannot hold this model's chat template, a hint and "
                f"an action: they take {num_tokens - num_words} tokens. Use longer rows."
            )
    return (Message("user", content),)
