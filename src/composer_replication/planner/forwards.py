"""The forwards of one step: how many tokens each reads, and how many rows meet the head."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from composer_replication.planner.step_case import StepCase


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of the step: its tokens, the rows that meet the head, and how."""

    num_tokens: int
    num_scored: int
    is_divergence: bool = False
    num_teacher_tokens: int = 0
    """Of the teacher's forward that goes before it."""
    row_tokens: int = 0
    """Of each row that attends to itself alone; 0: a tree."""
    tree_parts: tuple[tuple[int, bool], ...] = ()
    """Of a tree: the scored rows of rollouts, hint sites, chosen and rejected actions in their
    order, and whether each is compared with a teacher."""
    cuts: tuple[int, ...] = ()
    """Of a tree over its budget: the most tokens of each part of it. A part keeps nothing but its
    scored rows and is computed again when its gradient is due."""
    teacher_cuts: tuple[int, ...] = ()
    """The same of the teacher's tree."""

    @property
    def pieces(self) -> list["Forward"]:
        """Its parts, each as a forward of its own; itself where it is not cut."""
        return [replace(self, num_tokens=tokens, cuts=()) for tokens in self.cuts] or [self]

    @property
    def output_tokens(self) -> int:
        """Whose hidden states leave the model: all, or of a cut tree the rows that are scored."""
        return self.num_tokens if not self.cuts else self.num_scored + self.num_compared

    @property
    def teacher_output_tokens(self) -> int:
        """The same of the teacher."""
        return self.num_compared if self.teacher_cuts else self.num_teacher_tokens

    @property
    def num_compared(self) -> int:
        """Scored rows of a tree that a teacher is compared at."""
        return sum(rows for rows, is_compared in self.tree_parts if is_compared)


def forwards_of(case: StepCase) -> list[Forward]:
    """The forwards with gradient of a step, in their order."""
    if case.executor == "packed":
        return [_tree_forward(case)]
    found: list[Forward] = []
    if case.num_rollouts:
        row = case.prompt_tokens + case.completion_tokens
        scored = case.num_rollouts * case.completion_tokens
        found.append(Forward(case.num_rollouts * row, scored, row_tokens=row))
    if case.num_sites:
        row = case.state_tokens + case.action_tokens
        found.append(
            Forward(
                case.num_sites * row,
                case.num_sites * case.action_tokens,
                is_divergence=True,
                num_teacher_tokens=case.num_sites * (row + case.hint_tokens),
                row_tokens=row,
            )
        )
    if case.num_pairs:
        row = case.pair_state_tokens + case.pair_action_tokens
        scored = case.num_pairs * case.pair_action_tokens
        pair = Forward(case.num_pairs * row, scored, row_tokens=row)
        found += [pair, pair]
    return found


def dear_cut(case: StepCase) -> tuple[int, int] | None:
    """Tokens that a cut tree computes, and those of its sequences one by one, which are fewer.

    None where the tree is not cut, or its parts cost less. `step.tree_forward` warns of the same.
    """
    rows = list(_tree_rows(case))
    computed, cuts = _cut(rows, case.tree_max_tokens)
    alone, whole = sum(n for n, _ in rows), sum(n - shared for n, shared in rows)
    is_dear = case.executor == "packed" and bool(cuts) and 2 * computed > alone
    return (2 * computed, alone) if is_dear and computed > whole else None


def _tree_forward(case: StepCase) -> Forward:
    """One forward of the tree: each shared prefix once, and once more in a part that needs it."""
    tokens, cuts = _cut(_tree_rows(case), case.tree_max_tokens)
    own_rows = () if case.teacher == "live" else _teacher_rows(case)
    teacher_tokens, teacher_cuts = _cut(own_rows, case.tree_max_tokens)
    parts = (
        (case.num_rollouts * case.completion_tokens, False),
        (case.num_sites * case.action_tokens, True),
        (case.num_pairs * case.pair_action_tokens, False),
        (case.num_pairs * case.pair_action_tokens, False),
    )
    return Forward(
        tokens,
        sum(rows for rows, _ in parts),
        is_divergence=case.num_sites > 0,
        num_teacher_tokens=teacher_tokens,
        tree_parts=parts,
        cuts=cuts,
        teacher_cuts=teacher_cuts,
    )


_Row = tuple[int, int]
"""Tokens of a row of a tree, and those of them that it shares with the row before it."""


def _tree_rows(case: StepCase) -> Iterator[_Row]:
    """The rows of the policy's tree, depth first; a live teacher's are among them."""
    site = case.state_tokens + case.action_tokens
    hinted = site + case.hint_tokens
    row = case.prompt_tokens + case.completion_tokens
    is_live = case.teacher == "live"
    groups = [i * case.num_prompts // case.num_rollouts for i in range(case.num_rollouts)]
    sites = [i * case.num_rollouts // case.num_rollout_sites for i in range(case.num_rollout_sites)]
    for index, group in enumerate(groups):
        shares_prompt = index > 0 and groups[index - 1] == group
        shared = case.prompt_tokens if shares_prompt else 0
        # Its sites end within it, and of a hinted one only the hint and the action are new.
        for _ in range(sites.count(index)):
            yield site, shared
            shared = site
        yield row, shared
        for _ in range(sites.count(index) * is_live):
            yield hinted, case.state_tokens
    for _ in range(case.num_sites - case.num_rollout_sites):
        yield site, 0
        if is_live:
            yield hinted, case.state_tokens
    for _ in range(case.num_pairs):
        pair = case.pair_state_tokens + case.pair_action_tokens
        yield pair, 0
        yield pair, case.pair_state_tokens


def _teacher_rows(case: StepCase) -> Iterator[_Row]:
    """The rows of another teacher's own tree: sites of one prompt share it."""
    hinted = case.state_tokens + case.hint_tokens + case.action_tokens
    prompts = case.num_prompts if case.num_rollouts else 0
    for index in range(case.num_sites):
        shares_prompt = prompts <= index < case.num_rollout_sites
        yield hinted, case.prompt_tokens if shares_prompt else 0


def _cut(rows: Iterable[_Row], max_tokens: int | None) -> tuple[int, tuple[int, ...]]:
    """Tokens of all parts, as `step.trie.split_at_nodes` cuts, and the most of each; () if whole.

    A part's first row is whole. Which rows meet in a part depends on their ids: where that matters,
    the part whose gradient comes last, beside all others, is taken to fill the budget.
    """
    parts: list[int] = []
    roots: list[list[_Row]] = []
    for tokens, shared in rows:
        new = tokens - shared
        if not roots or shared == 0:
            roots.append([])
        roots[-1].append((tokens, shared))
        if not parts or (max_tokens is not None and parts[-1] + new > max_tokens):
            parts.append(tokens)
        else:
            parts[-1] += new
    if max_tokens is None or len(parts) < 2:
        return sum(parts), ()
    are_alike = all(root == roots[0] for root in roots) and len(set(roots[0][1:])) < 2
    return sum(parts), (parts[0] if are_alike else max(*parts, max_tokens), *parts[1:])
