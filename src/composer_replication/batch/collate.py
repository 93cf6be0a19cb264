"""A step batch to tensors, under the names of the founding note and of TRL.

Letters: N hint sites, P pairs, B rollouts, T tokens of a padded row, M action tokens over all
hint sites. Rows are padded on the right, except prompts, which TRL pads on the left. A position in
a row is that of the token itself; its log-prob is read one position earlier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_replication.batch.batches import Rollout, StepBatch
from composer_replication.batch.render import (
    HintPlacement,
    common_prefix_length,
    insert_hint,
    render_action,
    render_state,
    system_prefix_length,
)
from composer_replication.errors import AlignmentError, DataError, RecordTooLongError
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair
from composer_replication.traces.trace import Message

Truncation = Literal["refuse", "middle"]
StepTensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ActionRow:
    """One sequence to score: a context and the action tokens that follow it."""

    context_ids: list[int]
    action_ids: list[int]

    @property
    def token_ids(self) -> list[int]:
        """Context and action together."""
        return [*self.context_ids, *self.action_ids]


class ComposerDataCollator:
    """Turns a `StepBatch` into the tensors that the step and the trainer read.

    Keys, each present only where its channel has data:

    - rollouts, as TRL names them: `prompt_ids`, `prompt_mask` `[B, T]` (left-padded),
      `completion_ids`, `completion_mask`, `tool_mask` `[B, T]` (1 where the policy sampled),
      `advantages` `[B]` and, where every rollout has them, `old_per_token_logps` `[B, T]`.
    - hint sites: student rows `input_ids`, `attention_mask`, `sdpo_loss_mask` `[N, T]`; teacher
      rows `ctx_teacher_input_ids`, `ctx_teacher_attention_mask` `[N, T']`; and
      `sdpo_student_index`, `sdpo_teacher_index` `[M, 2]`: the (row, position) of every action
      token in both, where the token ids are equal.
    - pairs: `dpo_chosen_input_ids`, `dpo_chosen_attention_mask`, `dpo_chosen_response_mask`
      `[P, T]`, `dpo_chosen_ref_logprobs` `[P]` (sums, nats), the `dpo_rejected_*` twins, and
      `dpo_pair_weights` `[P]`.
    - `num_truncated_rows` `[]`, always.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        hint_placement: HintPlacement = "append",
        max_length: int | None = None,
        truncation: Truncation = "refuse",
        vocab_size: int | None = None,
    ) -> None:
        """Keep what rendering needs.

        Args:
            tokenizer: of the policy, with a chat template.
            hint_placement: `append` to the state's last message, `restate` it after the hint, a
                `user_turn` of its own, or `demonstrate` the hint's example before that message.
            max_length: tokens that the longest row of a hint site or a pair may have; None: no
                limit.
            truncation: over `max_length`, `refuse`, or cut the `middle` of the state, keeping the
                system prompt, the end of the state and the whole action; cuts are counted.
            vocab_size: rows of the model's embedding, to which exact ids are held; None: not known
                (the tokenizer's own size is less where the embedding is padded).
        """
        self.tokenizer = tokenizer
        self.hint_placement: HintPlacement = hint_placement
        self.max_length = max_length
        self.truncation: Truncation = truncation
        self.vocab_size = vocab_size
        # Padding is masked everywhere, so any id serves; some tokenizers have no padding token.
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if isinstance(pad, int) else 0

    def __call__(self, batch: StepBatch) -> StepTensors:
        """The tensors of one step batch.

        Raises:
            AlignmentError: student and teacher rows do not hold the same action tokens.
            DataError: a row that cannot be rendered, has ids outside the vocabulary, is over
                `max_length` under `refuse`, or a pair without reference log-probs.
        """
        tensors: StepTensors = {}
        num_truncated = 0
        if batch.rollouts:
            tensors |= self._collate_rollouts(batch.rollouts)
        if batch.hint_sites:
            site_tensors, num_cut = self._collate_sites(batch.hint_sites)
            tensors |= site_tensors
            num_truncated += num_cut
        if batch.pairs:
            pair_tensors, num_cut = self.collate_pairs(batch.pairs)
            tensors |= pair_tensors | _reference_sums(batch.pairs)
            num_truncated += num_cut
        tensors["num_truncated_rows"] = torch.tensor(num_truncated)
        return tensors

    def site_rows(self, site: HintSite) -> tuple[ActionRow, ActionRow, bool]:
        """The student's row and the teacher's, and whether their state was cut."""
        self._check_exact_ids(site)
        state_ids = list(site.state_ids or render_state(self.tokenizer, site.state))
        action_ids = list(site.action_ids or render_action(self.tokenizer, site.state, site.action))
        hinted_ids = insert_hint(self.tokenizer, site, state_ids, self.hint_placement)
        cut = self._cut(
            site.state,
            state_ids,
            longest=len(hinted_ids) + len(action_ids),
            fixed_from=common_prefix_length(state_ids, hinted_ids),
            what=f"Hint site {site.source!r}",
        )
        student, teacher = _without(state_ids, cut), _without(hinted_ids, cut)
        return ActionRow(student, action_ids), ActionRow(teacher, action_ids), len(cut) > 0

    def pair_rows(self, pair: PreferencePair) -> tuple[ActionRow, ActionRow, bool]:
        """The row of the chosen action, that of the rejected one, and whether they were cut."""
        state_ids = render_state(self.tokenizer, pair.state)
        chosen_ids = render_action(self.tokenizer, pair.state, pair.chosen)
        rejected_ids = render_action(self.tokenizer, pair.state, pair.rejected)
        if chosen_ids == rejected_ids:
            raise DataError(
                f"Pair {pair.source!r}: the chat template renders both actions as the same tokens "
                f"({pair.chosen[:60]!r}): no gradient can come of it. Drop pairs whose actions "
                "differ only in what the template strips."
            )
        cut = self._cut(
            pair.state,
            state_ids,
            longest=len(state_ids) + max(len(chosen_ids), len(rejected_ids)),
            fixed_from=len(state_ids),
            what=f"Pair {pair.source!r}",
        )
        state_ids = _without(state_ids, cut)
        return ActionRow(state_ids, chosen_ids), ActionRow(state_ids, rejected_ids), len(cut) > 0

    def collate_pairs(self, pairs: Sequence[PreferencePair]) -> tuple[StepTensors, int]:
        """The tensors of pairs without their reference sums, and how many rows were cut."""
        chosen, rejected, cuts = zip(*(self.pair_rows(pair) for pair in pairs), strict=True)
        tensors: StepTensors = {"dpo_pair_weights": torch.tensor([pair.weight for pair in pairs])}
        for side, rows in (("chosen", chosen), ("rejected", rejected)):
            ids, attention, action = self._pad_rows(rows)
            tensors[f"dpo_{side}_input_ids"] = ids
            tensors[f"dpo_{side}_attention_mask"] = attention
            tensors[f"dpo_{side}_response_mask"] = action
        return tensors, 2 * sum(cuts)

    def _check_exact_ids(self, site: HintSite) -> None:
        for name, ids in (("state_ids", site.state_ids), ("action_ids", site.action_ids)):
            vocab_size = self.vocab_size
            outside = [token for token in ids or () if vocab_size and not 0 <= token < vocab_size]
            if outside:
                raise DataError(
                    f"Hint site {site.source!r}: {name} holds {outside[0]}, and the model's "
                    f"vocabulary has {vocab_size} tokens, so that id has no embedding. "
                    "Give the ids of this model's tokenizer, or leave them out to have the text "
                    "rendered."
                )
        if not (site.action and site.action_ids):
            return
        decoded = cast(str, self.tokenizer.decode(list(site.action_ids), skip_special_tokens=True))
        if decoded.strip() != site.action.strip():
            raise AlignmentError(
                f"Hint site {site.source!r}: its action is {site.action[:60]!r} and its action_ids "
                f"say {decoded[:60]!r}. Student and teacher must score one action. Give the text "
                "that the ids decode to, or leave the ids out."
            )

    def _collate_sites(self, sites: Sequence[HintSite]) -> tuple[StepTensors, int]:
        rows = [self.site_rows(site) for site in sites]
        student_ids, student_attention, student_mask = self._pad_rows([row[0] for row in rows])
        teacher_ids, teacher_attention, teacher_mask = self._pad_rows([row[1] for row in rows])
        student_index, teacher_index = student_mask.nonzero(), teacher_mask.nonzero()
        check_alignment(student_ids, student_index, teacher_ids, teacher_index)
        tensors = {
            "input_ids": student_ids,
            "attention_mask": student_attention,
            "sdpo_loss_mask": student_mask,
            "ctx_teacher_input_ids": teacher_ids,
            "ctx_teacher_attention_mask": teacher_attention,
            "sdpo_student_index": student_index,
            "sdpo_teacher_index": teacher_index,
        }
        return tensors, 2 * sum(row[2] for row in rows)

    def _collate_rollouts(self, rollouts: Sequence[Rollout]) -> StepTensors:
        prompts = [list(rollout.prompt_ids) for rollout in rollouts]
        completions = [list(rollout.completion_ids) for rollout in rollouts]
        tensors = {
            "prompt_ids": _pad(prompts, self.pad_id, side="left"),
            "prompt_mask": _pad([[1] * len(ids) for ids in prompts], 0, side="left"),
            "completion_ids": _pad(completions, self.pad_id),
            "completion_mask": _pad([[1] * len(ids) for ids in completions], 0),
            "tool_mask": _pad([[int(m) for m in r.action_mask] for r in rollouts], 0),
            "advantages": torch.tensor([rollout.advantage for rollout in rollouts]),
        }
        old_logp = [rollout.old_logp for rollout in rollouts if rollout.old_logp is not None]
        if len(old_logp) == len(rollouts):
            tensors["old_per_token_logps"] = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(logp) for logp in old_logp], batch_first=True
            )
        return tensors

    def _pad_rows(
        self, rows: Sequence[ActionRow]
    ) -> tuple[Int[Tensor, "N T"], Int[Tensor, "N T"], Bool[Tensor, "N T"]]:
        ids = _pad([row.token_ids for row in rows], self.pad_id)
        attention = _pad([[1] * len(row.token_ids) for row in rows], 0)
        action = _pad([[0] * len(row.context_ids) + [1] * len(row.action_ids) for row in rows], 0)
        return ids, attention, action.bool()

    def _cut(
        self,
        state: Sequence[Message],
        state_ids: Sequence[int],
        *,
        longest: int,
        fixed_from: int,
        what: str,
    ) -> range:
        """The token positions of the state to leave out so that the longest row fits."""
        if self.max_length is None or longest <= self.max_length:
            return range(0)
        start = system_prefix_length(self.tokenizer, state, state_ids)
        stop = start + longest - self.max_length
        if self.truncation == "refuse":
            raise RecordTooLongError(
                f"{what} needs {longest} tokens and max_length is {self.max_length}. "
                "Raise batch.max_context_tokens, or set batch.truncation = 'middle' to cut the "
                "middle of the state.",
                longest,
            )
        if stop > fixed_from:
            raise RecordTooLongError(
                f"{what} needs {longest} tokens; even without its whole middle it is over "
                f"max_length {self.max_length}, since system prompt, hint and action are kept. "
                "Raise batch.max_context_tokens or drop the record.",
                longest,
            )
        return range(start, stop)


def check_alignment(
    student_ids: Int[Tensor, "N T"],
    student_index: Int[Tensor, "M 2"],
    teacher_ids: Int[Tensor, "N U"],
    teacher_index: Int[Tensor, "K 2"],
) -> None:
    """Refuse index lists whose token ids differ: equal shapes prove nothing.

    Raises:
        AlignmentError: unequal numbers of action tokens, or unequal ids at a paired position.
    """
    if len(student_index) != len(teacher_index):
        raise AlignmentError(
            f"Students have {len(student_index)} action tokens and teachers {len(teacher_index)}; "
            "both must score the same action. Build both rows from one hint site."
        )
    student_tokens = student_ids[student_index[:, 0], student_index[:, 1]]
    teacher_tokens = teacher_ids[teacher_index[:, 0], teacher_index[:, 1]]
    differs = (student_tokens != teacher_tokens).nonzero()
    if len(differs):
        at = int(differs[0])
        row, position = student_index[at].tolist()
        raise AlignmentError(
            f"Action token {at} is {int(student_tokens[at])} for the student (row {row}, position "
            f"{position}) and {int(teacher_tokens[at])} for the teacher. The divergence would "
            "compare different tokens. Build both rows from one hint site."
        )


def _reference_sums(pairs: Sequence[PreferencePair]) -> StepTensors:
    chosen = [pair.ref_chosen_logp for pair in pairs]
    rejected = [pair.ref_rejected_logp for pair in pairs]
    missing = [p.source for p in pairs if p.ref_chosen_logp is None or p.ref_rejected_logp is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(pairs)} pairs have no reference log-probs (first: "
            f"{missing[0]!r}). DPO compares with a frozen reference and a placeholder would train "
            "on noise. Score them first: training.references.score_references."
        )
    return {
        "dpo_chosen_ref_logprobs": torch.tensor(chosen, dtype=torch.float32),
        "dpo_rejected_ref_logprobs": torch.tensor(rejected, dtype=torch.float32),
    }


def _pad(
    rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"] = "right"
) -> Int[Tensor, "N T"]:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows],
        batch_first=True,
        padding_value=value,
        padding_side=side,
    )


def _without(ids: Sequence[int], cut: range) -> list[int]:
    return [*ids[: cut.start], *ids[cut.stop :]] if len(cut) else list(ids)
