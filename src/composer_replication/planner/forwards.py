"""The forwards of one step: how many tokens each reads, and how many rows meet the head."""

from dataclasses import dataclass

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


def _tree_forward(case: StepCase) -> Forward:
    """One forward of the tree: each shared prefix once."""
    prompts = case.num_prompts if case.num_rollouts else 0
    tokens = prompts * case.prompt_tokens + case.num_rollouts * case.completion_tokens
    num_given = case.num_sites - case.num_rollout_sites
    tokens += num_given * (case.state_tokens + case.action_tokens)
    tokens += case.num_pairs * (case.pair_state_tokens + 2 * case.pair_action_tokens)
    teacher_rows = case.num_sites * (case.hint_tokens + case.action_tokens)
    teacher_tokens = 0
    if case.teacher == "live":
        tokens += teacher_rows
    else:
        teacher_tokens = case.num_sites * case.state_tokens + teacher_rows
        teacher_tokens -= max(case.num_rollout_sites - prompts, 0) * case.prompt_tokens
    parts = (
        (case.num_rollouts * case.completion_tokens, False),
        (case.num_sites * case.action_tokens, True),
        (case.num_pairs * case.pair_action_tokens, False),
        (case.num_pairs * case.pair_action_tokens, False),
    )
    scored = sum(rows for rows, _ in parts)
    return Forward(tokens, scored, case.num_sites > 0, teacher_tokens, tree_parts=parts)
