"""The fast executor: one forward of the prefix tree of all sequences, one pass of the output head.

Rollouts, hint sites and both sides of every pair are merged by common prefix (`trie.py`), attend to
each other along the tree (`tree_attention.py`), and only rows that predict a scored token meet the
head (`losses/head_pass.py`). A live teacher's rows ride in the policy's tree, detached, where they
share enough of it; they, and another teacher's weights, otherwise walk a tree of their own without
gradient.

Letters: B rollouts, C completion tokens, M action tokens, P pairs, N scored tokens, R hidden rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from composer_replication.batch.collate import StepTensors
from composer_replication.losses.divergence import DivergenceOptions
from composer_replication.losses.head_pass import (
    ComparedTokens,
    ScoredTokens,
    head_pass,
    take_rows,
)
from composer_replication.step.hidden_states import output_head
from composer_replication.step.scores import Scores
from composer_replication.step.separate import acceptance_weights, live_teacher
from composer_replication.step.settings import StepSettings, TeacherContext
from composer_replication.step.tree_forward import (
    RowsAsked,
    TreeOptions,
    forward_trees,
    head_tile_rows,
)
from composer_replication.step.trie import num_unique_tokens


@dataclass(frozen=True, slots=True)
class _Role:
    """Sequences of one kind, and which of their tokens are scored, as (sequence, position)."""

    ids: Int[Tensor, "B T"]
    is_real: Int[Tensor, "B T"]
    """1 on tokens, 0 on padding of either side."""
    index: Int[Tensor, "N 2"]

    def targets(self) -> Int[Tensor, " N"]:
        """The scored tokens' ids."""
        return self.ids[self.index[:, 0], self.index[:, 1]]

    def asked(self) -> RowsAsked:
        """The sequences without padding and the positions in them of the scored tokens."""
        position = self.is_real.cumsum(-1) - 1
        lines = self.ids.cpu(), self.is_real.bool().cpu()
        sequences = [ids[is_real].numpy() for ids, is_real in zip(*lines, strict=True)]
        places = torch.stack([self.index[:, 0], position[self.index[:, 0], self.index[:, 1]]], 1)
        return RowsAsked(sequences, places.cpu().numpy())


def score_packed(
    model: nn.Module,
    tensors: StepTensors,
    needs: frozenset[str],
    settings: StepSettings,
    teacher: TeacherContext | None = None,
    *,
    options: TreeOptions | None = None,
) -> Scores:
    """Score every role in one forward of the policy; the numbers are those of `separate`.

    Args:
        model: the policy, wrapped or not.
        tensors: what `ComposerDataCollator` returned, on the model's device.
        needs: any of `rollouts`, `hint_sites`, `pairs`; a part without data is left None.
        settings: temperatures and the divergence.
        teacher: opens the teacher's weights; None: the live policy, in the same forward where
            that is cheaper.
        options: budgets of tokens and of head memory; None: the defaults.

    Raises:
        DataError: a token to score that has no context.
    """
    options = options or TreeOptions()
    roles = _roles(tensors, needs)
    asked = {name: role.asked() for name, role in roles.items()}
    teacher_hidden = teacher_head = None
    if "teacher" in roles and not (teacher is None and _rides(asked)):
        with torch.no_grad(), (teacher or live_teacher(model))() as teacher_model:
            of_teacher = {"teacher": asked.pop("teacher")}
            hidden, rows = forward_trees(teacher_model, of_teacher, options)
            teacher_hidden = take_rows(hidden, rows["teacher"])
            teacher_head = output_head(teacher_model)
    hidden, rows = forward_trees(model, asked, options)
    head = output_head(model)
    if "teacher" in rows:
        teacher_hidden, teacher_head = take_rows(hidden, rows.pop("teacher")).detach(), head
        hidden, rows = _only(hidden, rows)
    compared = None
    if teacher_hidden is not None and teacher_head is not None:
        options_of = (field.name for field in fields(DivergenceOptions))
        sdpo = DivergenceOptions(**{name: getattr(settings.sdpo, name) for name in options_of})
        compared = ComparedTokens(rows["student"], teacher_hidden, teacher_head, sdpo)
    temperature = {"rollouts": settings.grpo.temperature, "chosen": 1.0, "rejected": 1.0}
    names = [name for name in temperature if name in roles]
    scored = [
        ScoredTokens(
            rows[name], roles[name].targets(), temperature[name], with_entropy=name == "rollouts"
        )
        for name in names
    ]
    tile_rows = head_tile_rows(head, hidden.device, options)
    values = head_pass(hidden, head, scored, compared, tile_rows=tile_rows)
    scores = Scores(divergence=values.divergence)
    if compared is not None and settings.sdpo.prefix_weight == "acceptance":
        assert scores.divergence is not None, "asked for above"
        student = roles["student"]
        scores.divergence = scores.divergence * acceptance_weights(
            (take_rows(hidden, compared.rows), head),
            (compared.teacher_hidden, compared.teacher_head),
            student.targets(),
            student.index[:, 0],
            settings.sdpo.temperature,
            tile_rows=tile_rows,
        )
    for name, logp, entropy in zip(names, values.logp, values.entropy, strict=True):
        index = roles[name].index
        if name == "rollouts":
            empty = logp.new_zeros(tensors["completion_ids"].shape)
            at = (index[:, 0], index[:, 1] - tensors["prompt_ids"].shape[1])
            scores.policy_logp = empty.index_put(at, logp)
            assert entropy is not None, "asked for above"
            scores.entropy = empty.index_put(at, entropy)
        else:
            # One after another in fp32, 64 tokens of 14 nats are off by 1e-4 nats.
            zeros = logp.new_zeros(len(roles[name].ids), dtype=torch.float64)
            sums = zeros.index_add(0, index[:, 0], logp.double())
            setattr(scores, f"{name}_logp", sums.to(logp.dtype))
    return scores


def _roles(tensors: StepTensors, needs: frozenset[str]) -> dict[str, _Role]:
    roles: dict[str, _Role] = {}
    if "rollouts" in needs and "completion_ids" in tensors:
        prompt, completion = tensors["prompt_mask"], tensors["completion_mask"]
        mask = torch.cat([torch.zeros_like(prompt), completion * tensors["tool_mask"]], 1)
        ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1)
        roles["rollouts"] = _Role(ids, torch.cat([prompt, completion], 1), mask.nonzero())
    if "hint_sites" in needs and "sdpo_student_index" in tensors:
        for name, prefix in (("student", ""), ("teacher", "ctx_teacher_")):
            ids, is_real = tensors[f"{prefix}input_ids"], tensors[f"{prefix}attention_mask"]
            roles[name] = _Role(ids, is_real, tensors[f"sdpo_{name}_index"])
    if "pairs" in needs and "dpo_chosen_input_ids" in tensors:
        for name in ("chosen", "rejected"):
            side = f"dpo_{name}"
            ids, is_real = tensors[f"{side}_input_ids"], tensors[f"{side}_attention_mask"]
            roles[name] = _Role(ids, is_real, tensors[f"{side}_response_mask"].nonzero())
    return roles


def is_riding_cheaper(num_tokens: int, num_own: int) -> bool:
    """Whether a live teacher costs less in the policy's tree than in one of its own.

    In the policy's, each row that it alone has goes through a backward that brings nothing, twice
    the work of a forward. In its own, each row that it shares with the policy is computed again.

    Args:
        num_tokens: rows of the teacher's own tree.
        num_own: of them, those that the policy's tree does not have.
    """
    return num_tokens - num_own > 2 * num_own


def _rides(asked: Mapping[str, RowsAsked]) -> bool:
    """Whether a live teacher rides in the policy's tree."""
    policy = [ids for name, each in asked.items() if name != "teacher" for ids in each.sequences]
    teacher = list(asked["teacher"].sequences)
    num_own = num_unique_tokens(policy + teacher) - num_unique_tokens(policy)
    return is_riding_cheaper(num_unique_tokens(teacher), num_own)


def _only(
    hidden: Float[Tensor, "R H"], rows: dict[str, Tensor]
) -> tuple[Float[Tensor, "R2 H"], dict[str, Tensor]]:
    """The hidden rows that someone reads, and where each reader finds its own."""
    kept, places = torch.cat(list(rows.values())).unique(return_inverse=True)
    parts = places.split([len(part) for part in rows.values()])
    return take_rows(hidden, kept), dict(zip(rows, parts, strict=True))
