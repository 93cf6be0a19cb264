"""`hint_effect`: the teacher differs from the student by the hint and by nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from composer_replication.errors import DataError
from composer_replication.experiments.channel_probe import (
    Inputs,
    channel_loss,
    computes_in_fp32,
    policy_of,
    record_inputs,
)
from composer_replication.runs.summary import Check
from composer_replication.step.channels import CHANNELS
from composer_replication.step.hidden_states import in_eval_mode
from composer_replication.traces.hints import HintSite
from composer_replication.training.trainer import ComposerReplicationTrainer

NAME = "hint_effect"
FP32_BOUND = 1e-5
NOISES = 10
"""How many times the measured noise a hint must move the divergence, and an empty one may."""
LEAST_NOISE = 1e-11
"""Nats a token: two evaluations of the same tokens may agree by chance to more."""
RELATIVE_NOISE = 1e-5
"""Two hints whose divergences agree to this share did the same."""
MAX_OTHERS = 3
"""Other hints tried before two are said to do the same: a coincidence is possible."""


@dataclass(frozen=True, slots=True)
class _Divergences:
    """At one site, in nats a token."""

    empty: float
    noise: float
    """Of the empty hint, with teacher rows in another padding than the student's."""
    own: float
    others: tuple[float, ...]


def distinct_hints(sites: Sequence[HintSite]) -> list[HintSite]:
    """The first site of each hint that is not empty, in order."""
    first: dict[str, HintSite] = {}
    for site in sites:
        if site.hint.strip():
            first.setdefault(site.hint, site)
    return list(first.values())


def require_two_hints(sites: Sequence[HintSite], where: str) -> list[HintSite]:
    """`distinct_hints`, at least two of them.

    Raises:
        DataError: with one hint for all it cannot be told whether its words matter.
    """
    distinct = distinct_hints(sites)
    if len(distinct) < 2:
        raise DataError(
            f"{where} has {len(sites)} hint sites with {len(distinct)} different hints. The smoke "
            "shows that another hint moves the teacher differently, so it needs at least 2. Add "
            "sites with other hints, or set alpha_sdpo = 0."
        )
    return distinct


@torch.no_grad()
def check_hint_effect(trainer: ComposerReplicationTrainer, sites: Sequence[HintSite]) -> Check:
    """The verdict at one site, before the first optimizer step; leaves the trainer's traces.

    Args:
        trainer: its teacher still equals the policy.
        sites: with different hints, two at least.
    """
    # A site takes the hints of the others; the one with the longest hint has room for them.
    tokenize = trainer.collator.tokenizer
    ordered = sorted(sites, key=lambda site: len(tokenize(site.hint)["input_ids"]), reverse=True)
    site, others = ordered[0], ordered[1 : 1 + MAX_OTHERS]
    if CHANNELS["sdpo"].count(record_inputs(trainer, [site])) == 0:
        cause = f"The collator gives no action token for hint site {site.source!r}."
        return Check(NAME, passed=False, value=0, bound="> 0", cause=cause)
    with in_eval_mode(policy_of(trainer)):
        problem = _row_problem(trainer, site, others[0].hint)
        found = _divergences(trainer, site, [other.hint for other in others])
    bound = FP32_BOUND
    if not computes_in_fp32(trainer):
        bound = max(bound, NOISES * found.noise)
    least = NOISES * max(found.noise, LEAST_NOISE)
    problem = problem or _problem(found, bound, least)
    apart = max((abs(other - found.own) for other in found.others), default=0.0)
    return Check(
        NAME,
        passed=problem is None,
        value=f"empty hint {found.empty:.3g}, its own {found.own:.4g}, another's {apart:.3g} apart",
        bound=f"empty <= {bound:.3g}, own > {least:.3g}, apart > {RELATIVE_NOISE:g} of own",
        cause=problem,
    )


def _divergences(
    trainer: ComposerReplicationTrainer, site: HintSite, other_hints: Sequence[str]
) -> _Divergences:
    empty = replace(site, hint="")
    own = _divergence(trainer, record_inputs(trainer, [site]))
    others: list[float] = []
    for hint in other_hints:
        others.append(_divergence(trainer, record_inputs(trainer, [replace(site, hint=hint)])))
        if _differ(own, others[-1]):
            break
    return _Divergences(
        empty=_divergence(trainer, record_inputs(trainer, [empty])),
        # Beside the hinted row the unhinted one is padded in the teacher's batch alone.
        noise=abs(_divergence(trainer, _first_row_only(record_inputs(trainer, [empty, site])))),
        own=own,
        others=tuple(others),
    )


def _divergence(trainer: ComposerReplicationTrainer, inputs: Inputs) -> float:
    return float(channel_loss(trainer, "sdpo", inputs))


def _first_row_only(inputs: Inputs) -> Inputs:
    """The same rows with the action of the first alone."""
    is_first = inputs["sdpo_student_index"][:, 0] == 0
    kept = {f"sdpo_{side}_index": inputs[f"sdpo_{side}_index"] for side in ("student", "teacher")}
    kept = {name: index[is_first] for name, index in kept.items()}
    return {**inputs, **kept, "sdpo_step_count": is_first.sum()}


def _differ(own: float, other: float) -> bool:
    return abs(own - other) > RELATIVE_NOISE * max(abs(own), abs(other))


def _row_problem(
    trainer: ComposerReplicationTrainer, site: HintSite, other_hint: str
) -> str | None:
    """What is wrong with the token ids, before any forward."""
    students: dict[str, list[int]] = {}
    rows: dict[str, list[int]] = {}
    for kind, hint in (("empty", ""), ("own", site.hint), ("other", other_hint)):
        inputs = record_inputs(trainer, [replace(site, hint=hint)])
        students[kind] = inputs["input_ids"][0].tolist()
        rows[kind] = inputs["ctx_teacher_input_ids"][0].tolist()
    if rows["empty"] != students["empty"]:
        return (
            f"With an empty hint the teacher reads {len(rows['empty'])} tokens and the student "
            f"{len(students['empty'])}, or other ones: something besides the hint is inserted. "
            "Look at batch/render.py, with_hint and insert_hint."
        )
    if rows["own"] == students["own"]:
        return (
            f"The hint {site.hint[:60]!r} is not in the teacher's row: its tokens are the "
            "student's. The teacher would distil nothing. Look at sdpo.hint_placement and at what "
            "the chat template drops."
        )
    tokenizer = trainer.collator.tokenizer
    # Encoded and decoded like the row, since some tokenizers normalise what they read.
    plain = tokenizer.decode(tokenizer(site.hint, add_special_tokens=False)["input_ids"])
    if _letters(plain) not in _letters(tokenizer.decode(rows["own"])):
        return (
            f"The teacher's row differs from the student's, but does not hold the words of the "
            f"hint {site.hint[:60]!r}. Look at what the chat template does to the hinted message."
        )
    if rows["own"] == rows["other"]:
        return (
            f"The teacher's row is the same for the hint {site.hint[:60]!r} and for "
            f"{other_hint[:60]!r}: the site's own hint is not what is inserted."
        )
    return None


def _letters(text: object) -> str:
    """The text without white space, which decoding may change."""
    return "".join(str(text).split())


def _problem(found: _Divergences, bound: float, least: float) -> str | None:
    if not abs(found.empty) <= bound:
        return (
            f"With an empty hint the teacher reads the student's own tokens and is still "
            f"{found.empty:.3g} nats away. Before the first step its weights are the policy's, so "
            "it is opened with other weights, another mode or another precision, or its rows are "
            "not the student's."
        )
    if not abs(found.own) > least:
        return (
            f"The hint is in the teacher's row and moves the divergence by {found.own:.3g} nats, "
            "no more than rounding does. SDPO has nothing to distil: the teacher does not see the "
            "hint (its attention mask), or its scores are not what is compared."
        )
    if not any(_differ(found.own, other) for other in found.others):
        return (
            f"Another site's hint gives the same divergence, {found.own:.6g} nats: what the hint "
            "says does not matter. The teacher's rows are not what is scored."
        )
    return None
