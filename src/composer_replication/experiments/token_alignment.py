"""`token_alignment`: student and teacher score the error turn's own tokens, each at its place.

Where an action is comes from the site alone: the number of its state's and its action's token ids.
The collator's index lists, which training uses, are what is checked against it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.render import render_action, render_state
from composer_replication.experiments.channel_probe import Inputs
from composer_replication.runs.summary import Check
from composer_replication.traces.hints import HintSite
from composer_replication.training.trainer import ComposerReplicationTrainer

NAME = "token_alignment"


@dataclass(frozen=True, slots=True)
class SiteIds:
    """A site's token ids, as its sampler saw them where it was sampled."""

    source: str
    state: tuple[int, ...]
    action: tuple[int, ...]
    text: str


def check_token_alignment(
    trainer: ComposerReplicationTrainer, inputs: Inputs, sites: Sequence[HintSite]
) -> Check:
    """Student and teacher rows hold the site's own action ids at the paired positions.

    Args:
        trainer: for its tokenizer.
        inputs: a micro-batch with the tensors of hint sites.
        sites: the records they were made from, in the order of the rows.
    """
    tokenizer = trainer.collator.tokenizer
    ids = [site_ids(tokenizer, site) for site in sites]
    problem = next((p for p in _alignment_problems(tokenizer, inputs, ids) if p), None)
    num_actions = sum(len(site.action) for site in ids)
    return Check(
        NAME,
        passed=problem is None,
        value=int(_num_equal(inputs, ids)),
        bound=f"all {num_actions} action tokens of {len(sites)} sites",
        cause=problem,
    )


def site_ids(tokenizer: PreTrainedTokenizerBase, site: HintSite) -> SiteIds:
    """A site as token ids; rendered where it was recorded as text."""
    state = site.state_ids or render_state(tokenizer, site.state)
    action = site.action_ids or render_action(tokenizer, site.state, site.action)
    return SiteIds(site.source, tuple(state), tuple(action), site.action)


def _alignment_problems(
    tokenizer: PreTrainedTokenizerBase, inputs: Inputs, sites: Sequence[SiteIds]
) -> Iterator[str | None]:
    for role, ids, attention, index in _roles(inputs):
        yield _count_problem(role, ids, index, sites)
        for row, site in enumerate(sites):
            num_real = int(attention[row].sum())
            yield _row_alignment_problem(role, ids[row], index[index[:, 0] == row], num_real, site)
    for row, site in enumerate(sites):
        yield _context_problem(inputs, row, site)
        decoded = str(tokenizer.decode(list(site.action), skip_special_tokens=True))
        if decoded.strip() != site.text.strip():
            yield (
                f"The action of site {site.source!r} is {site.text[:60]!r} and its token ids "
                f"decode to {decoded[:60]!r}. Sites need the text that their ids stand for."
            )


def _roles(inputs: Inputs) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    return [
        (
            "student",
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["sdpo_student_index"],
        ),
        (
            "teacher",
            inputs["ctx_teacher_input_ids"],
            inputs["ctx_teacher_attention_mask"],
            inputs["sdpo_teacher_index"],
        ),
    ]


def _count_problem(role: str, ids: Tensor, index: Tensor, sites: Sequence[SiteIds]) -> str | None:
    num_actions = sum(len(site.action) for site in sites)
    if len(index) == num_actions and len(ids) == len(sites):
        return None
    return (
        f"The {role}'s rows score {len(index)} tokens in {len(ids)} rows, and {len(sites)} hint "
        f"sites have {num_actions} action tokens. Look at the collator's sdpo_{role}_index."
    )


def _row_alignment_problem(
    role: str, ids_T: Tensor, index: Tensor, num_real: int, site: SiteIds
) -> str | None:
    positions = index[:, 1].tolist()
    wanted = list(range(num_real - len(site.action), num_real))
    tokens = ids_T[index[:, 1]].tolist()
    if positions == wanted and tokens == list(site.action):
        return None
    pairs = zip(positions, tokens, wanted, site.action, strict=False)
    at = next((i for i, (p, t, w, a) in enumerate(pairs) if p != w or t != a), 0)
    found = f"token {tokens[at]} at position {positions[at]}" if positions else "no token"
    return (
        f"Site {site.source!r}: the {role} scores {found} as action token {at}, and the site's "
        f"record has token {site.action[at]} at position {wanted[at]}. The divergence would be "
        "taken at other tokens than the error turn's. Look at the collator's index lists."
    )


def _context_problem(inputs: Inputs, row: int, site: SiteIds) -> str | None:
    """The student must act on the state that was sampled from, not on an edited one."""
    num_state = int(inputs["attention_mask"][row].sum()) - len(site.action)
    context = tuple(inputs["input_ids"][row, :num_state].tolist())
    if context == site.state or _is_middle_cut(context, site.state):
        return None
    return (
        f"Site {site.source!r}: the student's context has {num_state} tokens and is not the "
        f"{len(site.state)} tokens of the site's state. The student must see the original context "
        "without the hint. Look at the collator's student rows."
    )


def _is_middle_cut(context: Sequence[int], state: Sequence[int]) -> bool:
    """Whether `context` is `state` with one stretch left out."""
    if len(context) >= len(state):
        return False
    starts = range(len(context) + 1)
    return any(
        context[:n] == state[:n] and context[n:] == state[len(state) - (len(context) - n) :]
        for n in starts
    )


def _num_equal(inputs: Inputs, sites: Sequence[SiteIds]) -> int:
    """Action tokens that student, teacher and record agree on."""
    recorded = [token for site in sites for token in site.action]
    columns = [ids[index[:, 0], index[:, 1]].tolist() for _, ids, _, index in _roles(inputs)]
    return sum(a == b == c for a, b, c in zip(*columns, recorded, strict=False))
