"""One packed forward a micro-batch, read by TRL's loss and by every channel of the step."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from composer_replication.batch.collate import StepTensors
from composer_replication.step.channels import CHANNELS
from composer_replication.step.packed import score_packed
from composer_replication.step.packed_support import why_not_packed
from composer_replication.step.scores import Executor, Scores
from composer_replication.step.separate import score_separately
from composer_replication.step.settings import StepSettings, TeacherContext
from composer_replication.step.tree_forward import TreeOptions
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.trl_hooks import GRPOTrainer
from composer_replication.training.whole_groups import MicroBatches, PromptIds, WholeGroups

ROLLOUTS = frozenset({"rollouts"})

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    """Scores of a micro-batch while its losses are computed."""

    needs: frozenset[str]
    scores: Scores
    tool_mask: Tensor | None
    """[rollouts, tokens], 0 where an environment wrote."""
    old_logp: Tensor | None
    """Of the policy that sampled; None: it is this one."""


class Packing:
    """The trainer's executor: `score_packed` where `tree` and the model allow it.

    Attributes:
        reason: why every role has a forward of its own; None: packed.
    """

    def __init__(self, reason: str | None, settings: StepSettings, options: TreeOptions) -> None:
        """Keep what scoring needs; `for_trainer` decides."""
        self.reason = reason
        self._settings = settings
        self._score: Executor = (
            partial(score_packed, options=options) if reason is None else score_separately
        )
        self._groups = WholeGroups()
        self._held: _Held | None = None

    @classmethod
    def for_trainer(
        cls, trainer: GRPOTrainer, settings: StepSettings, channels: Collection[str]
    ) -> "Packing":
        """Packed, unless `tree` is off or the model's own forwards would not be reproduced.

        Args:
            trainer: with its model, not yet wrapped for several processes.
            settings: of every channel.
            channels: the extra channels that are on; without any, and unless `tree` is
                `always`, the step is TRL's, bit for bit.
        """
        args = cast(ComposerConfig, trainer.args)
        options = TreeOptions(max_tokens=args.tree_max_tokens)
        if args.tree == "off":
            return cls("tree is off", settings, options)
        if not channels and args.tree != "always":
            return cls("no extra channel is on, so the step is TRL's own", settings, options)
        reason = why_not_packed(cast(nn.Module, trainer.model))
        if trainer.aux_loss_enabled:
            reason = "TRL adds a router's loss over all tokens, and a tree holds shared ones once"
        if reason is not None:
            _logger.warning("Every role has a forward of its own: %s.", reason)
        return cls(reason, settings, options)

    @property
    def label(self) -> str:
        """For a run's summary: the executor, and why it is not the packed one."""
        return "packed" if self.reason is None else f"separate: {self.reason}"

    def off(self) -> "Packing":
        """The same trainer's with a forward for each role."""
        return Packing("tree is off", self._settings, TreeOptions())

    def __str__(self) -> str:
        """The executor, for cache keys."""
        return "packed" if self.is_on else "separate"

    @property
    def is_on(self) -> bool:
        """Whether one forward serves all."""
        return self.reason is None

    def __call__(
        self,
        model: nn.Module,
        tensors: StepTensors,
        needs: frozenset[str],
        settings: StepSettings,
        teacher: TeacherContext | None,
    ) -> Scores:
        """The scores of the forward that is held, or of one for these needs alone."""
        if self._held is not None and needs <= self._held.needs:
            return self._held.scores
        return self._score(model, tensors, needs, settings, teacher)

    def note_groups(
        self, output: Mapping[str, Tensor], num_rows: int
    ) -> list[frozenset[PromptIds]] | None:
        """Before TRL splits a generation: the prompts of each of `whole_groups`' micro-batches.

        Args:
            output: this rank's rollouts, as they were sampled.
            num_rows: of a micro-batch.

        Returns:
            None where nothing is packed, and TRL's own micro-batches stay.
        """
        return self._groups.note(output, num_rows) if self.is_on else None

    def whole_groups(self, micro_batches: MicroBatches) -> MicroBatches:
        """TRL's shuffled micro-batches with each noted group in one of them."""
        return self._groups.regroup(micro_batches)

    @contextmanager
    def shared(
        self,
        model: nn.Module,
        inputs: StepTensors,
        channels: Iterable[str],
        teacher: TeacherContext | None,
    ) -> Iterator[None]:
        """Hold one forward for TRL's loss and these channels, if packed."""
        if not self.is_on:
            yield
            return
        tensors = {"tool_mask": torch.ones_like(inputs["completion_mask"]), **inputs}
        live = {CHANNELS[name].data for name in channels if CHANNELS[name].count(tensors) > 0}
        needs = ROLLOUTS | live
        scores = self._score(model, tensors, needs, self._settings, teacher)
        old_logp = inputs.get("old_per_token_logps")
        self._held = _Held(needs, scores, inputs.get("tool_mask"), old_logp)
        try:
            yield
        finally:
            self._held = None

    def rollout_scores(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of TRL's completions: the held ones, or those of this model."""
        scores = None if self._held is None else self._held.scores
        if scores is None:
            tensors = {
                "prompt_ids": input_ids[:, :-logits_to_keep],
                "prompt_mask": attention_mask[:, :-logits_to_keep],
                "completion_ids": input_ids[:, -logits_to_keep:],
                "completion_mask": attention_mask[:, -logits_to_keep:],
            }
            tensors["tool_mask"] = torch.ones_like(tensors["completion_mask"])
            scores = self._score(model, tensors, ROLLOUTS, self._settings, None)
        assert scores.policy_logp is not None
        assert scores.entropy is not None
        return self._with_ratio_1(scores.policy_logp), scores.entropy

    def _with_ratio_1(self, policy_logp: Tensor) -> Tensor:
        """The old log-probs at tool tokens, which the step does not score.

        TRL takes the ratio of every token before it masks: of an unlikely one exp(0 - old) is inf,
        and inf times a mask of 0 is nan.
        """
        held = self._held
        if held is None or held.tool_mask is None or held.old_logp is None:
            return policy_logp
        return policy_logp.where(held.tool_mask.bool(), held.old_logp)
