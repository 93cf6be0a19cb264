"""The step batches that `bench/step.py` measures: made of token ids, so that lengths are exact.

Letters: B rollouts, P pairs, M action tokens over all hint sites, T tokens of a padded row.
"""

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from composer_replication.batch.batches import Rollout
from composer_replication.batch.collate import StepTensors

P = ParamSpec("P")
R = TypeVar("R")
Ids = tuple[int, ...]

GENERATION_PROMPT_TOKENS = 4
"""A hint enters a state before its generation prompt, so the teacher reads these tokens again."""

_MOST_KEPT = 256
"""Layouts of a step's parts: data arrives laid out, for the baselines as for ours."""


_layouts: list[Callable[[], None]] = []


def made_once(make: Callable[P, R]) -> Callable[P, R]:
    """Keep what a function of hashable arguments lays out, until `forget_layouts`."""
    kept = functools.lru_cache(maxsize=_MOST_KEPT)(make)
    _layouts.append(kept.cache_clear)
    return cast("Callable[P, R]", kept)


def forget_layouts() -> None:
    """Make every layout anew: its tensors may be of a mode that has ended."""
    for clear in _layouts:
        clear()


@dataclass(frozen=True, slots=True)
class Site:
    """A hint site: the student reads `context`, the teacher `hinted`; both score `action`."""

    context: Ids
    hinted: Ids
    action: Ids
    rollout: int | None
    """Index of the rollout whose row begins with `context` and `action`; None: no such row."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair with the reference's log-probs, in nats."""

    context: Ids
    chosen: Ids
    rejected: Ids
    ref_chosen_logp: float = 0.0
    ref_rejected_logp: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What one step trains on, or one micro-batch of it."""

    rollouts: tuple[Rollout, ...]
    sites: tuple[Site, ...]
    pairs: tuple[Pair, ...]

    @property
    def max_completion_length(self) -> int:
        """The constant that dr_grpo divides by; 1 without rollouts."""
        return max((len(rollout.completion_ids) for rollout in self.rollouts), default=1)

    def counts(self) -> dict[str, float]:
        """What each channel's sum is divided by."""
        return {
            "grpo": len(self.rollouts) * self.max_completion_length,
            "sdpo": sum(len(site.action) for site in self.sites),
            "dpo": len(self.pairs),
        }

    def parts(self, max_rows: int | None) -> Iterator["Workload"]:
        """Micro-batches of one role each with at most `max_rows` rows in a forward.

        None: the whole step at once. A site stays with the rollout that its student row is in.
        """
        if max_rows is None:
            yield self
            return
        for start in range(0, len(self.rollouts), max_rows):
            rollouts = self.rollouts[start : start + max_rows]
            inside = range(start, start + len(rollouts))
            sites = tuple(
                replace(site, rollout=site.rollout - start)
                for site in self.sites
                if site.rollout in inside
            )
            yield Workload(rollouts, sites, ())
        alone = tuple(site for site in self.sites if site.rollout is None)
        for start in range(0, len(alone), max_rows):
            yield Workload((), alone[start : start + max_rows], ())
        # Chosen and rejected go through one forward in `good`: two rows a pair.
        num_pairs = max(1, max_rows // 2)
        for start in range(0, len(self.pairs), num_pairs):
            yield Workload((), (), self.pairs[start : start + num_pairs])


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a workload is, in tokens and rows.

    Example: `Sizes(prefix=1024, rollouts=4, action=64, hint=48, pairs=1)`.
    """

    prefix: int
    rollouts: int
    action: int
    hint: int
    pairs: int
    turns: int = 8
    """Of each trajectory: an action, then an observation of the same length."""


class Draw:
    """Seeded random token ids."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._vocab_size = vocab_size

    def ids(self, num_tokens: int) -> Ids:
        """So many ids."""
        return tuple(self._random.choices(range(self._vocab_size), k=num_tokens))

    def advantages(self, num_rollouts: int) -> list[float]:
        """Of one group: centred, as rewards without scaling give them."""
        rewards = [self._random.random() for _ in range(num_rollouts)]
        mean = sum(rewards) / num_rollouts
        return [reward - mean for reward in rewards]


def one_state(sizes: Sizes, draw: Draw) -> Workload:
    """G actions sampled at one state, a hint site on the first of them, pairs at the same state."""
    state = draw.ids(sizes.prefix)
    # Lengths differ a little, as sampled actions do: padding is part of what is compared.
    actions = [draw.ids(sizes.action + 3 * index) for index in range(sizes.rollouts)]
    rollouts = tuple(
        Rollout(state, action, (True,) * len(action), advantage)
        for action, advantage in zip(actions, draw.advantages(sizes.rollouts), strict=True)
    )
    site = Site(state, _with_hint(state, draw.ids(sizes.hint)), actions[0], rollout=0)
    return Workload(rollouts, (site,), _pairs_at(state, sizes, draw, sizes.pairs))


def trajectories(sizes: Sizes, draw: Draw) -> Workload:
    """G whole episodes that share only the task prompt; each has a site and pairs at mid-trace."""
    prompt = draw.ids(sizes.prefix)
    rollouts: list[Rollout] = []
    sites: list[Site] = []
    pairs: list[Pair] = []
    middle = sizes.turns // 2
    for index, advantage in enumerate(draw.advantages(sizes.rollouts)):
        turns = [(draw.ids(sizes.action), draw.ids(sizes.action)) for _ in range(sizes.turns)]
        # The last action ends the episode: nothing is observed after it.
        turns[-1] = (turns[-1][0], ())
        completion = tuple(token for action, seen in turns for token in (*action, *seen))
        mask = tuple(
            is_action
            for action, seen in turns
            for is_action in (*[True] * len(action), *[False] * len(seen))
        )
        rollouts.append(Rollout(prompt, completion, mask, advantage))
        before = tuple(token for turn in turns[:middle] for part in turn for token in part)
        state = (*prompt, *before)
        hinted = _with_hint(state, draw.ids(sizes.hint))
        sites.append(Site(state, hinted, turns[middle][0], rollout=index))
        pairs += _pairs_at(state, sizes, draw, sizes.pairs)
    return Workload(tuple(rollouts), tuple(sites), tuple(pairs))


def disjoint(sizes: Sizes, draw: Draw) -> Workload:
    """No two rows share a first token: the worst case of a step that merges prefixes."""
    starts = iter(range(2 * (sizes.rollouts + sizes.pairs + 1)))
    rollouts = tuple(
        Rollout((next(starts), *draw.ids(sizes.prefix - 1)), action, (True,) * len(action), each)
        for action, each in (
            (draw.ids(sizes.action), each) for each in draw.advantages(sizes.rollouts)
        )
    )
    context = draw.ids(sizes.prefix - 1)
    site = Site(
        (next(starts), *context),
        (next(starts), *draw.ids(sizes.hint - 1), *context),
        draw.ids(sizes.action),
        rollout=None,
    )
    pairs = tuple(
        # A pair has one state; several pairs here have states of their own.
        Pair((next(starts), *draw.ids(sizes.prefix - 1)), *_two_actions(sizes, draw))
        for _ in range(sizes.pairs)
    )
    return Workload(rollouts, (site,), pairs)


def step_tensors(workload: Workload, device: torch.device) -> StepTensors:
    """The workload as `ComposerDataCollator` lays a step batch out; made once, so never timed."""
    return dict(_step_tensors(workload, device))


@made_once
def _step_tensors(workload: Workload, device: torch.device) -> StepTensors:
    tensors: StepTensors = {"num_truncated_rows": torch.tensor(0)}
    if workload.rollouts:
        tensors |= _rollout_tensors(workload.rollouts)
    if workload.sites:
        student = [(site.context, site.action) for site in workload.sites]
        teacher = [(site.hinted, site.action) for site in workload.sites]
        ids, attention, action = rows_of(student)
        teacher_ids, teacher_attention, teacher_action = rows_of(teacher)
        tensors |= {
            "input_ids": ids,
            "attention_mask": attention,
            "sdpo_loss_mask": action,
            "ctx_teacher_input_ids": teacher_ids,
            "ctx_teacher_attention_mask": teacher_attention,
            "sdpo_student_index": action.nonzero(),
            "sdpo_teacher_index": teacher_action.nonzero(),
        }
    if workload.pairs:
        tensors["dpo_pair_weights"] = torch.ones(len(workload.pairs))
        for side in ("chosen", "rejected"):
            rows = [(pair.context, getattr(pair, side)) for pair in workload.pairs]
            ids, attention, action = rows_of(rows)
            tensors[f"dpo_{side}_input_ids"] = ids
            tensors[f"dpo_{side}_attention_mask"] = attention
            tensors[f"dpo_{side}_response_mask"] = action
            tensors[f"dpo_{side}_ref_logprobs"] = torch.tensor(
                [getattr(pair, f"ref_{side}_logp") for pair in workload.pairs]
            )
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def rows_of(rows: Sequence[tuple[Ids, Ids]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and action mask `[N, T]` of (context, action) rows, padded right.

    Made once, so never timed.
    """
    return _rows_of(tuple(rows))


@made_once
def _rows_of(rows: tuple[tuple[Ids, Ids], ...]) -> tuple[Tensor, Tensor, Tensor]:
    ids = padded([(*context, *action) for context, action in rows])
    attention = padded([(1,) * (len(context) + len(action)) for context, action in rows])
    scored = padded([(0,) * len(context) + (1,) * len(action) for context, action in rows])
    return ids, attention, scored.bool()


def padded(rows: Sequence[Sequence[int]], side: str = "right") -> Tensor:
    """Rows of ids as one tensor; 0 pads."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_side=side
    )


def unique_tokens(rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many tokens the merged prefixes of these rows have, and the sum of their positions + 1.

    Found with plain dictionaries, so that it checks the step's own trie.
    """
    root: dict[int, dict] = {}
    num_tokens = num_pairs = 0
    for row in rows:
        node = root
        for position, token in enumerate(row):
            if token not in node:
                node[token] = {}
                num_tokens += 1
                num_pairs += position + 1
            node = node[token]
    return num_tokens, num_pairs


def _rollout_tensors(rollouts: Sequence[Rollout]) -> StepTensors:
    completions = [rollout.completion_ids for rollout in rollouts]
    prompts = [rollout.prompt_ids for rollout in rollouts]
    tensors = {
        "prompt_ids": padded(prompts, side="left"),
        "prompt_mask": padded([(1,) * len(ids) for ids in prompts], side="left"),
        "completion_ids": padded(completions),
        "completion_mask": padded([(1,) * len(ids) for ids in completions]),
        "tool_mask": padded([[int(m) for m in rollout.action_mask] for rollout in rollouts]),
        "advantages": torch.tensor([rollout.advantage for rollout in rollouts]),
    }
    old_logp = [rollout.old_logp for rollout in rollouts if rollout.old_logp is not None]
    if len(old_logp) == len(rollouts):
        tensors["old_per_token_logps"] = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(logp) for logp in old_logp], batch_first=True
        )
    return tensors


def _with_hint(state: Ids, hint: Ids) -> Ids:
    at = max(len(state) - GENERATION_PROMPT_TOKENS, 0)
    return (*state[:at], *hint, *state[at:])


def _pairs_at(state: Ids, sizes: Sizes, draw: Draw, num_pairs: int) -> tuple[Pair, ...]:
    return tuple(Pair(state, *_two_actions(sizes, draw)) for _ in range(num_pairs))


def _two_actions(sizes: Sizes, draw: Draw) -> tuple[Ids, Ids]:
    return draw.ids(sizes.action), draw.ids(sizes.action + math.ceil(sizes.action / 16))
