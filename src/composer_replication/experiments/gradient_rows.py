"""`gradient_rows`: SDPO moves the rows that predict an error turn's tokens, and nothing else.

At a few of them the gradient must be that of the divergence from the teacher's row of the same
token, computed anew from the definition.

The rows come from the site's own token ids; the gradient is read at the policy's final hidden
states, in the trainer's own loss. Letters: N hint sites, T tokens of a row, H hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from composer_replication.experiments.channel_probe import (
    Inputs,
    channel_loss,
    policy_of,
    undisturbed,
    with_separate_forwards,
)
from composer_replication.experiments.plain_divergence import TOLERANCE, plain_gradient
from composer_replication.experiments.token_alignment import SiteIds, site_ids
from composer_replication.runs.summary import Check
from composer_replication.step.hidden_states import causal_lm, output_head
from composer_replication.traces.hints import HintSite
from composer_replication.training.trainer import ComposerReplicationTrainer

NAME = "gradient_rows"
MAX_COMPARED = 4
"""Tokens whose gradient is computed anew; each needs its full logits twice."""


@dataclass(slots=True)
class _Scored:
    """The final hidden states of every forward of one loss."""

    student: list[Tensor] = field(default_factory=list[Tensor])
    teacher: list[Tensor] = field(default_factory=list[Tensor])


def check_gradient_rows(
    trainer: ComposerReplicationTrainer, inputs: Inputs, sites: Sequence[HintSite]
) -> Check:
    """SDPO's gradient is non-zero on the hidden rows that predict action tokens and on no other.

    Args:
        trainer: after or before training; its weights, metrics and random states stay.
        inputs: a micro-batch with the tensors of hint sites.
        sites: the records they were made from, in the order of the rows.
    """
    ids = [site_ids(trainer.collator.tokenizer, site) for site in sites]
    expected_NT = _expected_rows(inputs, ids)
    with undisturbed(trainer):
        policy_of(trainer).train()
        with (
            with_separate_forwards(trainer),
            _without_prefix_weight(trainer),
            _watched_decoders(trainer, inputs) as scored,
        ):
            loss = channel_loss(trainer, "sdpo", inputs)
            if loss.requires_grad:
                trainer.accelerator.backward(loss)
        problem = _teacher_problem(trainer, scored) or _student_problem(loss, scored)
        hit, stray = 0, 0
        if not problem:
            gradient = cast(Tensor, scored.student[-1].grad)
            moved_NT = (gradient != 0).any(-1)
            hit = int((moved_NT & expected_NT).sum())
            stray = int((moved_NT & ~expected_NT).sum())
            problem = _row_problem(gradient, moved_NT, expected_NT)
        if not problem:
            problem = _value_problem(trainer, inputs, scored, ids, expected_NT)
    return Check(
        NAME,
        passed=problem is None,
        value=f"{hit} action rows, {stray} other rows",
        bound=f"all {int(expected_NT.sum())} action rows, 0 other rows, nothing in the teacher",
        cause=problem,
    )


def _value_problem(
    trainer: ComposerReplicationTrainer,
    inputs: Inputs,
    scored: _Scored,
    sites: Sequence[SiteIds],
    expected_NT: Bool[Tensor, "N T"],
) -> str | None:
    """Where the gradient at an action token is not that of its divergence from the teacher."""
    settings = trainer.step_settings.sdpo
    if settings.clip == "entry":
        return None
    assert trainer.teacher is not None
    teacher_lengths = inputs["ctx_teacher_attention_mask"].sum(1).tolist()
    teacher_rows = [
        (row, int(length) - len(site.action) - 1 + offset)
        for row, (site, length) in enumerate(zip(sites, teacher_lengths, strict=True))
        for offset in range(len(site.action))
    ]
    num_rows = min(MAX_COMPARED, len(teacher_rows))
    chosen = [index * len(teacher_rows) // num_rows for index in range(num_rows)]
    student_at = expected_NT.nonzero()[chosen].unbind(1)
    teacher_at = torch.tensor(teacher_rows, device=expected_NT.device)[chosen].unbind(1)
    gradient = cast(Tensor, scored.student[-1].grad)[student_at].float()
    with trainer.teacher.open() as model:
        plain = plain_gradient(
            scored.student[-1][student_at],
            output_head(policy_of(trainer)),
            scored.teacher[-1][teacher_at],
            output_head(model),
            settings,
        )
    # Whatever accelerate multiplies a loss with, it multiplies this 1 with.
    unit = torch.ones((), device=gradient.device, requires_grad=True)
    trainer.accelerator.backward(unit * 1.0)
    scale = float(cast(Tensor, unit.grad)) * trainer.accelerator.num_processes
    num_tokens = float(inputs["sdpo_step_count"])
    if trainer.accelerator.num_processes * trainer.args.gradient_accumulation_steps == 1:
        # This batch is the whole step, so its sites say what the count must be.
        num_tokens = float(len(teacher_rows))
    plain = plain * scale / num_tokens
    error = float((gradient - plain).norm() / plain.norm())
    if error <= TOLERANCE:
        return None
    return (
        f"At the action tokens SDPO's gradient is {error:.0%} away from that of the divergence "
        "between the student's row and the teacher's row of the same token. Another row of the "
        "teacher is read, or the divergence or its gradient is not what [sdpo] asks for. Look at "
        "step/separate.py, score_hint_sites, and at losses/divergence.py."
    )


def _expected_rows(inputs: Inputs, sites: Sequence[SiteIds]) -> Bool[Tensor, "N T"]:
    """True at the row before each action token: it is the one that predicts it."""
    attention = inputs["attention_mask"]
    expected = torch.zeros_like(attention, dtype=torch.bool)
    for row, site in enumerate(sites):
        start = _state_length(attention[row], site)
        expected[row, start - 1 : start - 1 + len(site.action)] = True
    return expected


def _state_length(attention_T: Int[Tensor, " T"], site: SiteIds) -> int:
    """The state's own length; where its middle was cut out, what the row leaves for it."""
    return min(len(site.state), int(attention_T.sum()) - len(site.action))


@contextmanager
def _without_prefix_weight(trainer: ComposerReplicationTrainer) -> Iterator[None]:
    """A weight may be 0 by right; what is judged here holds for each token before it is weighed."""
    settings = trainer.step_settings
    trainer.step_settings = replace(settings, sdpo=replace(settings.sdpo, prefix_weight="off"))
    try:
        yield
    finally:
        trainer.step_settings = settings


@contextmanager
def _watched_decoders(trainer: ComposerReplicationTrainer, inputs: Inputs) -> Iterator[_Scored]:
    """Sorts every decoder's output by whose rows it read, and keeps the student's gradient."""
    scored = _Scored()
    decoder = type(causal_lm(policy_of(trainer)).get_decoder())
    student_ids, teacher_ids = inputs["input_ids"], inputs["ctx_teacher_input_ids"]

    def watch(
        module: nn.Module, args: tuple[object, ...], keywords: Mapping[str, object], output: object
    ) -> None:
        if type(module) is not decoder:
            return
        read = cast(Tensor, keywords["input_ids"] if "input_ids" in keywords else args[0])
        hidden = cast(Tensor, output[0])  # pyright: ignore[reportIndexIssue]
        if hidden.requires_grad:
            hidden.retain_grad()
        # Equal rows mean that the hint inserted nothing; then the gradient tells the two apart.
        is_student = torch.equal(read, student_ids) and (
            hidden.requires_grad or not torch.equal(read, teacher_ids)
        )
        (scored.student if is_student else scored.teacher).append(hidden)

    handle = register_module_forward_hook(watch, with_kwargs=True)  # pyright: ignore
    try:
        yield scored
    finally:
        handle.remove()


def _teacher_problem(trainer: ComposerReplicationTrainer, scored: _Scored) -> str | None:
    if not scored.teacher:
        return (
            "No forward read the teacher's rows, so the policy is compared with something else "
            "than its hint-conditioned teacher. Look at step/separate.py, score_hint_sites."
        )
    if any(hidden.requires_grad or hidden.grad is not None for hidden in scored.teacher):
        return (
            "The teacher's hidden states carry a gradient, so SDPO would pull the teacher towards "
            "the policy as well, and hold its activations. Score the teacher under no_grad."
        )
    assert trainer.teacher is not None
    policys = {id(parameter) for parameter in policy_of(trainer).parameters()}
    with trainer.teacher.open() as model:
        foreign = [name for name, p in model.named_parameters() if id(p) not in policys and
                   p.grad is not None]  # fmt: skip
    if foreign:
        return f"The teacher's own parameter {foreign[0]} got a gradient. Detach its head."
    return None


def _student_problem(loss: Tensor, scored: _Scored) -> str | None:
    if not loss.requires_grad or not scored.student:
        return (
            "The SDPO loss has no gradient at all: it is detached from the policy. Look for "
            "detach() or no_grad around the policy's rows."
        )
    if len(scored.student) != 1 or scored.student[0].grad is None:
        return (
            f"{len(scored.student)} forwards read the student's rows and their hidden states got "
            "no gradient: the loss reaches the policy by another way than its own scores."
        )
    return None


def _row_problem(
    gradient: Tensor, moved_NT: Bool[Tensor, "N T"], expected_NT: Bool[Tensor, "N T"]
) -> str | None:
    if not gradient.isfinite().all():
        return "The gradient at the hidden states is not finite. Look for nan in the divergence."
    for kind, wrong in (("stray", moved_NT & ~expected_NT), ("missing", expected_NT & ~moved_NT)):
        if not wrong.any():
            continue
        row, position = wrong.nonzero()[0].tolist()
        first, last = expected_NT[row].nonzero()[[0, -1], 0].tolist()
        place = f"row {row}, position {position} (its action is predicted at {first} to {last})"
        if kind == "stray":
            return (
                f"SDPO moves hidden rows that predict no action token, such as {place}: prompt, "
                "hint or padding tokens are trained on. Look at rows_before and the index lists."
            )
        return (
            f"SDPO leaves action tokens out, such as the one at {place}. Look at rows_before, the "
            "index lists, and clipping by sdpo.clip."
        )
    return None
