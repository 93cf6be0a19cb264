"""Log-probs of preference pairs under the frozen reference, scored once and kept on disk.

The reference is the policy before its first step (under LoRA: its base model). The cache key holds
everything the numbers depend on, so a changed model, template, limit or precision scores anew.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
import xxhash
from accelerate import Accelerator
from torch import nn

from composer_replication.batch.collate import ComposerDataCollator
from composer_replication.errors import DataError
from composer_replication.runs.atomic_files import write_text_atomically
from composer_replication.step.hidden_states import causal_lm
from composer_replication.step.scores import Executor
from composer_replication.step.separate import score_separately
from composer_replication.step.settings import StepSettings
from composer_replication.traces.pairs import PreferencePair
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.packing import Packing
from composer_replication.training.teacher import PolicyTeacher

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class ReferenceScores:
    """Reference sums of both actions of each pair, in nats."""

    chosen: list[float]
    rejected: list[float]


def references_for_run(
    pairs: Sequence[PreferencePair],
    args: ComposerConfig,
    policy: nn.Module,
    accelerator: Accelerator,
    collator: ComposerDataCollator,
    executor: Packing,
) -> list[PreferencePair]:
    """The pairs with the sums under a run's starting weights, by the kernels it trains with."""
    cache = args.reference_cache_dir or str(Path(str(args.output_dir)) / "reference_logps")
    without_adapters = hasattr(policy, "disable_adapter")
    scored, _ = with_references(
        pairs,
        PolicyTeacher(policy, lambda: accelerator.autocast(), without_adapters=without_adapters),
        policy,
        collator,
        precision=f"{accelerator.mixed_precision}/{policy.dtype}/{executor}",
        # Same rows at a time as in training: a batch of another size moves the last digits.
        batch_size=args.pairs_per_step,
        cache_dir=Path(cache),
        executor=executor,
    )
    return scored


def with_references(
    pairs: Sequence[PreferencePair],
    reference: PolicyTeacher,
    policy: nn.Module,
    collator: ComposerDataCollator,
    *,
    precision: str,
    batch_size: int,
    cache_dir: Path,
    executor: Executor = score_separately,
) -> tuple[list[PreferencePair], bool]:
    """The pairs with both reference sums filled in, and whether the cache had them.

    Args:
        pairs: any; a pair that carries both sums already keeps them.
        reference: opens the reference's weights.
        policy: the same weights, for the key.
        collator: renders the pairs; its settings are in the key through the token ids.
        precision: of the forward, such as `bf16`; part of the key.
        batch_size: pairs scored at a time; part of the key, since padding moves the last digits.
        cache_dir: one JSON file for each key.
        executor: of the training, so that both sides of a ratio come from the same kernels; what
            tells it from others belongs into `precision`.
    """
    key = reference_key(pairs, policy, collator, precision=precision, batch_size=batch_size)
    cache_file = cache_dir / f"{key}.json"
    is_cached = cache_file.is_file()
    if is_cached:
        scores = _read(cache_file, len(pairs))
    else:
        scores = score_references(
            pairs, reference, collator, batch_size=batch_size, executor=executor
        )
        cache_dir.mkdir(parents=True, exist_ok=True)
        payload = {"schema": SCHEMA, "chosen": scores.chosen, "rejected": scores.rejected}
        write_text_atomically(cache_file, json.dumps(payload))
    return fill_references(pairs, scores), is_cached


def fill_references(
    pairs: Sequence[PreferencePair], scores: ReferenceScores
) -> list[PreferencePair]:
    """The pairs with their reference sums; a pair that carries both already keeps them."""
    return [
        pair
        if pair.ref_chosen_logp is not None and pair.ref_rejected_logp is not None
        else replace(pair, ref_chosen_logp=chosen, ref_rejected_logp=rejected)
        for pair, chosen, rejected in zip(pairs, scores.chosen, scores.rejected, strict=True)
    ]


@torch.no_grad()
def score_references(
    pairs: Sequence[PreferencePair],
    reference: PolicyTeacher,
    collator: ComposerDataCollator,
    *,
    batch_size: int,
    executor: Executor = score_separately,
) -> ReferenceScores:
    """Score both actions of every pair under the reference's weights."""
    chosen: list[float] = []
    rejected: list[float] = []
    with reference.open() as model:
        device = next(model.parameters()).device
        for start in range(0, len(pairs), batch_size):
            tensors, _ = collator.collate_pairs(pairs[start : start + batch_size])
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            scores = executor(model, tensors, frozenset({"pairs"}), StepSettings(), None)
            assert scores.chosen_logp is not None
            assert scores.rejected_logp is not None
            chosen += scores.chosen_logp.tolist()
            rejected += scores.rejected_logp.tolist()
    return ReferenceScores(chosen, rejected)


def reference_key(
    pairs: Sequence[PreferencePair],
    policy: nn.Module,
    collator: ComposerDataCollator,
    *,
    precision: str,
    batch_size: int,
) -> str:
    """A hash of weights, architecture, token ids of every row, precision, kernels and versions."""
    lm = causal_lm(policy)
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(policy.state_dict().items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy())
    facts = {
        "config": lm.config.to_diff_dict(),
        "attention": lm.config._attn_implementation,
        "precision": precision,
        "batch_size": batch_size,
        "device": next(lm.parameters()).device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "schema": SCHEMA,
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for pair in pairs:
        chosen, rejected, _ = collator.pair_rows(pair)
        rows = [chosen.context_ids, chosen.action_ids, rejected.action_ids]
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def _read(cache_file: Path, num_pairs: int) -> ReferenceScores:
    try:
        payload = json.loads(cache_file.read_text())
        chosen, rejected = list(payload["chosen"]), list(payload["rejected"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The reference cache {cache_file} is not readable ({error}). Delete the file; it is "
            "scored again at the next start."
        ) from error
    if not len(chosen) == len(rejected) == num_pairs:
        raise DataError(
            f"The reference cache {cache_file} holds {len(chosen)} pairs and {num_pairs} are "
            "needed. Delete the file; it is scored again at the next start."
        )
    return ReferenceScores(chosen, rejected)
