"""What a reader of a plan has to know beside its figures, a sentence each."""

from collections.abc import Sequence
from datetime import date

from composer_replication.planner.candidate import Candidate
from composer_replication.planner.cost import MAX_TIMEOUT_S, volume_usd, whole_cents
from composer_replication.planner.duration_text import duration
from composer_replication.planner.forwards import dear_cut
from composer_replication.planner.layer_memory import BF16
from composer_replication.planner.local_machine import LocalMachine
from composer_replication.planner.memory import checkpoint_bytes, trained_bytes
from composer_replication.planner.model_files import EMBEDDED_SPEC, REFERENCE_SPEC
from composer_replication.planner.model_shape import model_shape
from composer_replication.planner.plan_request import PlanRequest
from composer_replication.planner.prices import PriceTable
from composer_replication.units import gib

_MONTH_DAYS = 30.0


def plan_warnings(
    request: PlanRequest,
    candidates: Sequence[Candidate],
    chosen: Candidate | None,
    machine: LocalMachine,
    prices: PriceTable,
    today: date,
) -> list[str]:
    """The sentences, the gravest first.

    Args:
        request: what was planned.
        candidates: every place.
        chosen: of them; None: none.
        machine: this one.
        prices: of Modal.
        today: to judge the age of the prices.
    """
    found = [warning] if (warning := prices.age_warning(today)) is not None else []
    found += [] if chosen is None else _time_out(chosen)
    found += _dear_cut(chosen or candidates[-1])
    found += _cards(request, candidates, machine)
    if request.config.model is None:
        specs = sorted({_spec(candidate) for candidate in candidates})
        found.append(f"No model is named: planned with {' and '.join(specs)}.")
    if request.config.smoke.fixed_shapes is None:
        found.append("Row lengths are estimated from the data's characters.")
    if not any(candidate.is_calibrated for candidate in candidates):
        found.append(
            "Seconds are uncalibrated: a run on the device narrows them, or --probe for ten steps."
            if request.evaluation is None
            else "Seconds are uncalibrated: runs/ holds no evaluation of a model of this size on "
            "these cards. The first one there narrows the next."
        )
    if any(candidate.place.where == "modal" for candidate in candidates):
        found.append(_credit_and_files(chosen or candidates[-1], prices))
    return found


def _time_out(chosen: Candidate) -> list[str]:
    """What a run that does not end within its time-out needs."""
    if chosen.ends_in_one_call:
        return []
    assert chosen.calls.num_calls is not None, "what never ends is not chosen"
    more = chosen.calls.num_calls - 1
    calls = f"{more} call{'s' * (more != 1)} of `runs resume`"
    text = (
        f"The run takes about {duration(chosen.clock.total_s.expected)} and this call ends "
        f"unfinished at its time-out of {duration(chosen.call_s)}. To its end it needs {calls} "
        f"more, {duration(chosen.wall_s)} and {chosen.expected_usd:.2f} USD in all: each starts "
        "again and goes on from the newest checkpoint. The worst case of "
        f"{chosen.worst_usd:.2f} USD is that of one call; a cap on all of them must be "
        f"{whole_cents(chosen.holding_usd):.2f} USD or more."
    )
    if chosen.timeout_s < MAX_TIMEOUT_S:
        text += f" Or raise modal.timeout_s, which is at most {MAX_TIMEOUT_S:.0f}."
    return [text]


def _dear_cut(candidate: Candidate) -> list[str]:
    """That a budget of the tree costs more than doing without one."""
    dear = dear_cut(candidate.shape.case)
    if dear is None:
        return []
    computed, alone = dear
    return [
        f"batch.tree_max_tokens = {candidate.shape.case.tree_max_tokens} cuts the tree into parts "
        f"that compute {computed:,} tokens a step, where its sequences one by one have {alone:,}: "
        "raise it, or set tree = 'off'."
    ]


def _cards(
    request: PlanRequest, candidates: Sequence[Candidate], machine: LocalMachine
) -> list[str]:
    """What is odd about places of the table."""
    found: list[str] = []
    unknown = [card.name for card in machine.cards if card.gpu is None]
    if unknown and request.on != "modal":
        found.append(f"{unknown[0]} is not in the table of cards, so it is left out.")
    without_bf16 = [c.place.label for c in candidates if c.obstacle == "no bf16"]
    if without_bf16:
        found.append(
            f"{without_bf16[0]} has no bf16, in which this run computes: it is not taken, and its "
            "row says what emulation at the speed of fp32 would need."
        )
    found += [
        f"{candidate.place.label} is not in this machine; its table entry is planned with."
        for candidate in candidates
        if candidate.place.is_assumed
    ]
    if any(c.shape.vllm is not None for c in candidates):
        found.append(
            "vLLM samples: its share of the card is counted and was never measured, its seconds "
            "are guessed, and of a server's card nothing is planned. Modal's image has no vLLM."
        )
    sharded = [candidate.place.label for candidate in candidates if candidate.is_sharded]
    if sharded:
        found.append(
            f"{', '.join(sharded)}: sharded over the cards (FSDP), by formula alone. train and "
            "smoke hold the whole step on each card and cannot run these rows."
        )
    if any(c.place.num_gpus > 1 and not c.is_sharded for c in candidates):
        found.append(
            "Several cards hold the whole step each (DDP), so a step has that many times the "
            "rollouts; no such run was measured."
        )
    return found


def _credit_and_files(candidate: Candidate, prices: PriceTable) -> str:
    """The plan without a fee, and what the weights and checkpoints in its volume cost to keep."""
    shape = candidate.shape
    downloaded = BF16 * model_shape(shape.case.model).num_parameters
    kept = shape.num_kept_checkpoints
    stored_gib = gib(downloaded + trained_bytes(shape.case) + kept * checkpoint_bytes(shape.case))
    what = "weights" + (f" and {kept} checkpoint{'s' * (kept != 1)}" if kept else "")
    text = (
        f"Modal credits {prices.monthly_credit_usd:g} USD a month. About {stored_gib:.1f} GiB of "
        f"{what} stay in its volume, {volume_usd(stored_gib, _MONTH_DAYS, prices):.2f} USD a "
        f"month: {prices.volume_free_gib:g} GiB are free."
    )
    if stored_gib > prices.volume_free_gib and kept > 1:
        text += " grpo.save_total_limit keeps fewer."
    return text


def _spec(candidate: Candidate) -> str:
    return EMBEDDED_SPEC if candidate.place.gpu is None else REFERENCE_SPEC
