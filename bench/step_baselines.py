"""The baselines that `bench/step.py` compares with: naive, good, and TRL's GRPO alone.

Each gives the loss of a micro-batch, already divided by the counts of the whole step, and says
what its forwards compute. Losses on log-probs are the package's own: what differs is how the rows
get their log-probs.

Letters: B sequences, T tokens, M rows that a head scores.
"""

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from step_flops import Forward, padded_forward
from step_workload import Ids, Workload, made_once, padded, rows_of, step_tensors
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from composer_replication.losses.dpo import dpo_loss
from composer_replication.losses.grpo import grpo_loss
from composer_replication.step.hidden_states import output_head
from composer_replication.step.separate import live_teacher
from composer_replication.step.settings import GRPOSettings, StepSettings, TeacherContext

WEIGHTS = {"grpo": 1.0, "sdpo": 0.1, "dpo": 0.05}
"""Those of a run that sets none."""

CHANNELS = tuple(WEIGHTS)


@dataclass(frozen=True)
class Setting:
    """What every step shares: weights, settings of the losses, and counts of the whole step."""

    model: PreTrainedModel
    own_teacher: TeacherContext | None
    """Opens a teacher with weights of its own; None: the live policy."""
    max_completion_length: int
    counts: dict[str, float]

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.device

    def teacher(self) -> AbstractContextManager[nn.Module]:
        """The teacher's model in eval mode."""
        return (self.own_teacher or live_teacher(self.model))()

    def step_settings(self) -> StepSettings:
        """The package's settings, equal to what the baselines compute."""
        return StepSettings(grpo=GRPOSettings(max_completion_length=self.max_completion_length))


class Step(Protocol):
    """One way to compute the step."""

    name: str
    channels: tuple[str, ...]

    def loss(self, part: Workload) -> Tensor:
        """The part's share of the step's loss, with its graph."""
        ...

    def work(self, part: Workload) -> list[Forward]:
        """What computing it takes."""
        ...


class NaiveStep:
    """As the founding note describes: a forward for each role, padded, full logits."""

    name = "naive"
    channels = CHANNELS

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def loss(self, part: Workload) -> Tensor:
        """GRPO, the student again, the teacher, chosen, rejected."""
        setting = self._setting
        losses: list[Tensor] = []
        if part.rollouts:
            ids, attention, _ = rows_of(rollout_rows(part))
            logits = self._logits(ids, attention)
            losses.append(_grpo(setting, part, _token_logp(logits, ids.to(setting.device))))
        if part.sites:
            losses.append(self._sdpo(part))
        if part.pairs:
            sums = []
            for side in ("chosen", "rejected"):
                ids, attention, scored = rows_of(pair_rows(part, side))
                logp = _token_logp(self._logits(ids, attention), ids.to(setting.device))
                sums.append((logp * scored[:, 1:].to(setting.device)).sum(-1))
            losses.append(_dpo(setting, part, *sums))
        return torch.stack(losses).sum()

    def _logits(self, ids: Tensor, attention: Tensor, model: nn.Module | None = None) -> Tensor:
        device = self._setting.device
        model = model or self._setting.model
        output = model(input_ids=ids.to(device), attention_mask=attention.to(device))
        return output.logits.float()

    def _sdpo(self, part: Workload) -> Tensor:
        ids, attention, scored = rows_of([(site.context, site.action) for site in part.sites])
        policy = self._logits(ids, attention)[_before(scored)].log_softmax(-1)
        ids, attention, scored = rows_of([(site.hinted, site.action) for site in part.sites])
        with torch.no_grad(), self._setting.teacher() as teacher_model:
            logits = self._logits(ids, attention, teacher_model)
            teacher = logits[_before(scored)].log_softmax(-1)
        half = torch.tensor(0.5, device=policy.device).log()
        mixture = torch.logaddexp(policy + half, teacher + half)
        kl = functools.partial(functional.kl_div, mixture, reduction="sum", log_target=True)
        divergence = 0.5 * kl(policy) + 0.5 * kl(teacher)
        return WEIGHTS["sdpo"] * divergence / self._setting.counts["sdpo"]

    def work(self, part: Workload) -> list[Forward]:
        """Full logits at every padded token."""
        work = [padded_forward(map(_length, rollout_rows(part)))] if part.rollouts else []
        if part.sites:
            work.append(padded_forward(len(s.context) + len(s.action) for s in part.sites))
            hinted = (len(s.hinted) + len(s.action) for s in part.sites)
            work.append(padded_forward(hinted, is_trained=False))
        if part.pairs:
            work += [padded_forward(map(_length, pair_rows(part, s))) for s in SIDES]
        return work


class GoodStep:
    """What a careful peer does: one student forward for GRPO and SDPO, TRL 1.16's chunked heads."""

    name = "good"
    channels = CHANNELS

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def loss(self, part: Workload) -> Tensor:
        """Student (shared), teacher, and chosen with rejected in one padded forward."""
        setting = self._setting
        losses: list[Tensor] = []
        student_rows = rollout_rows(part) + _own_student_rows(part)
        hidden = self._hidden(student_rows) if student_rows else None
        if part.rollouts:
            assert hidden is not None
            ids, _, _ = rows_of(student_rows)
            scored = sampled_tokens(part, ids.shape[1])
            logp = self._logp(hidden[: len(scored)], ids[: len(scored)], scored)
            losses.append(_grpo(setting, part, logp))
        if part.sites:
            assert hidden is not None
            losses.append(self._sdpo(part, hidden))
        if part.pairs:
            rows = pair_rows(part, "chosen") + pair_rows(part, "rejected")
            ids, _, scored = rows_of(rows)
            sums = self._logp(self._hidden(rows), ids, scored).sum(-1)
            losses.append(_dpo(setting, part, *sums.chunk(2)))
        return torch.stack(losses).sum()

    def _hidden(
        self, rows: Sequence[tuple[Ids, Ids]], model: PreTrainedModel | None = None
    ) -> Tensor:
        ids, attention, _ = rows_of(rows)
        device = self._setting.device
        decoder = (model or self._setting.model).get_decoder()
        output = decoder(
            input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False
        )
        return output.last_hidden_state

    def _logp(self, hidden: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        head = output_head(self._setting.model)
        rows = _before(scored)
        logp = ChunkedLogProbFunction.apply(
            hidden[rows],
            head.weight,
            head.bias,
            ids[:, 1:][rows].to(hidden.device),
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            head.softcap,
            head.logit_scale,
            ("entropy",),
        )[0]
        return logp.new_zeros(len(ids), ids.shape[1] - 1).index_put(rows, logp)

    def _sdpo(self, part: Workload, hidden: Tensor) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        policy = torch.cat(
            [
                hidden[row, len(site.context) - 1 :][: len(site.action)]
                for row, site in zip(_student_row_of_sites(part), part.sites, strict=True)
            ]
        )
        with torch.no_grad(), self._setting.teacher() as teacher_model:
            assert isinstance(teacher_model, PreTrainedModel)
            rows = [(site.hinted, site.action) for site in part.sites]
            teacher = self._hidden(rows, teacher_model)[_before(rows_of(rows)[2])]
            teacher_head = output_head(teacher_model)
        head = output_head(self._setting.model)
        divergence = ChunkedDivergenceFunction.apply(
            policy,
            head.weight,
            head.bias,
            teacher,
            teacher_head.weight.detach(),
            teacher_head.bias,
            0.5,
            1.0,
            head.logit_scale,
            head.softcap,
            teacher_head.logit_scale,
            teacher_head.softcap,
        )[0]
        return WEIGHTS["sdpo"] * divergence.sum() / self._setting.counts["sdpo"]

    def work(self, part: Workload) -> list[Forward]:
        """Heads on scored rows only; the divergence projects the student's rows once more."""
        work: list[Forward] = []
        student_rows = rollout_rows(part) + _own_student_rows(part)
        num_hinted = sum(len(site.action) for site in part.sites)
        if student_rows:
            rows = sum(sum(rollout.action_mask) for rollout in part.rollouts) + num_hinted
            work.append(padded_forward(map(_length, student_rows), head_rows=rows))
        if part.sites:
            hinted = (len(s.hinted) + len(s.action) for s in part.sites)
            work.append(padded_forward(hinted, head_rows=num_hinted, is_trained=False))
        if part.pairs:
            rows = [row for side in SIDES for row in pair_rows(part, side)]
            num_scored = sum(len(action) for _, action in rows)
            work.append(padded_forward(map(_length, rows), head_rows=num_scored))
        return work


class TRLStep:
    """TRL's own GRPO loss on the same rollouts, from a real `GRPOTrainer` on the same model."""

    name = "grpo_trl"
    channels = ("grpo",)

    def __init__(
        self, setting: Setting, tokenizer: PreTrainedTokenizerBase, num_rollouts: int, *, bf16: bool
    ) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self._setting = setting
        self._num_rollouts = num_rollouts
        # Nothing is trained or saved by it, so its folder may go at once.
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=num_rollouts,
                num_generations=num_rollouts,
                max_completion_length=setting.max_completion_length,
                loss_type="dr_grpo",
                scale_rewards="none",
                gradient_checkpointing=False,
                use_cpu=setting.device.type == "cpu",
                bf16=bf16,
                report_to=[],
            )
            self._trainer = GRPOTrainer(
                model=setting.model,
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=config,
                train_dataset=Dataset.from_dict({"prompt": ["none"] * num_rollouts}),
                processing_class=tokenizer,
            )
        # Its training loop sets this; here every part is divided by the whole step.
        self._trainer.current_gradient_accumulation_steps = 1

    def loss(self, part: Workload) -> Tensor:
        """TRL's mean over the part's rows, as a share of the whole step's."""
        inputs = step_tensors(part, self._setting.device)
        loss = self._trainer._compute_loss(self._setting.model, inputs)
        return loss * len(part.rollouts) / self._num_rollouts

    def work(self, part: Workload) -> list[Forward]:
        """See `trl_forwards`."""
        return trl_forwards(part, is_cpu=self._setting.device.type == "cpu")


def trl_forwards(part: Workload, *, is_cpu: bool) -> list[Forward]:
    """TRL's GRPO: on a CPU its head scores every position, prompts and padding too."""
    rows = rollout_rows(part)
    num_scored = sum(len(completion) for _, completion in rows)
    if is_cpu:
        num_scored = len(rows) * (max(map(_length, rows)) - 1)
    return [padded_forward(map(_length, rows), head_rows=num_scored)]


SIDES = ("chosen", "rejected")


def rollout_rows(part: Workload) -> list[tuple[Ids, Ids]]:
    """Prompt and completion of each rollout."""
    return [(rollout.prompt_ids, rollout.completion_ids) for rollout in part.rollouts]


def pair_rows(part: Workload, side: str) -> list[tuple[Ids, Ids]]:
    """State and chosen (or rejected) action of each pair."""
    return [(pair.context, getattr(pair, side)) for pair in part.pairs]


@made_once
def sampled_tokens(part: Workload, width: int) -> Tensor:
    """`[B, T]` of right-padded rollouts: True where the policy sampled the token; made once."""
    rows = [(*[0] * len(r.prompt_ids), *map(int, r.action_mask)) for r in part.rollouts]
    mask = padded(rows).bool()
    return functional.pad(mask, (0, width - mask.shape[1]))


def _own_student_rows(part: Workload) -> list[tuple[Ids, Ids]]:
    return [(site.context, site.action) for site in part.sites if site.rollout is None]


def _student_row_of_sites(part: Workload) -> Iterator[int]:
    own_row = len(part.rollouts)
    for site in part.sites:
        yield own_row if site.rollout is None else site.rollout
        own_row += site.rollout is None


def _length(row: tuple[Ids, Ids]) -> int:
    return len(row[0]) + len(row[1])


def _before(scored: Tensor) -> tuple[Tensor, ...]:
    """Where the positions are whose output predicts the tokens of a `[B, T]` mask."""
    return scored[:, 1:].nonzero(as_tuple=True)


def _token_logp(logits: Tensor, ids: Tensor) -> Tensor:
    """`[B, T - 1]` log-probs of each next token."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def _grpo(setting: Setting, part: Workload, logp: Tensor) -> Tensor:
    """The clipped objective from `[B, T - 1]` log-probs of right-padded rows."""
    starts = [len(rollout.prompt_ids) - 1 for rollout in part.rollouts]
    completions = [
        logp[row, start : start + len(rollout.completion_ids)]
        for row, (start, rollout) in enumerate(zip(starts, part.rollouts, strict=True))
    ]
    masks = padded([[int(m) for m in rollout.action_mask] for rollout in part.rollouts])
    old_logp = [torch.tensor(rollout.old_logp) for rollout in part.rollouts]
    loss = grpo_loss(
        pad_sequence(completions, batch_first=True),
        pad_sequence(old_logp, batch_first=True).to(logp.device),
        torch.tensor([rollout.advantage for rollout in part.rollouts], device=logp.device),
        masks.bool().to(logp.device),
        max_completion_length=setting.max_completion_length,
    )
    return WEIGHTS["grpo"] * loss.loss_sum / setting.counts["grpo"]


def _dpo(setting: Setting, part: Workload, chosen: Tensor, rejected: Tensor) -> Tensor:
    device = chosen.device
    loss = dpo_loss(
        chosen,
        rejected,
        torch.tensor([pair.ref_chosen_logp for pair in part.pairs], device=device),
        torch.tensor([pair.ref_rejected_logp for pair in part.pairs], device=device),
    )
    return WEIGHTS["dpo"] * loss.loss_sum / setting.counts["dpo"]
