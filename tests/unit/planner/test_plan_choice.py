"""What may be chosen: what `train` can run there, whole and to its end."""

import json
import re

import pytest

from composer_replication.config.loading import load_config
from composer_replication.errors import ConfigError
from composer_replication.planner.hardware import parse_gpu
from composer_replication.planner.memory import (
    checkpoint_bytes,
    persistent_bytes,
    predict,
    trained_bytes,
)
from composer_replication.planner.model_files import model_settings
from composer_replication.planner.model_shape import model_shape
from composer_replication.planner.plan_json import plan_json
from composer_replication.planner.run_memory import run_memory
from composer_replication.units import gib

FULL_7B = ["model=shape:qwen2.5-7b", "teacher=live", "grpo.max_steps=200",
           "grpo.max_completion_length=256", "grpo.gradient_checkpointing=true"]  # fmt: skip
LORA_7B = [*FULL_7B, "lora.r=32", "teacher=frozen"]
HALF_B = ["model=shape:qwen2.5-0.5b", "smoke.fixed_shapes=[8, 512]", "grpo.max_steps=50"]


def one(plan, label):
    return next(c for c in plan.candidates if c.place.label == label)


@pytest.mark.parametrize("verb", [None, "train"])
def test_cards_that_hold_only_a_share_of_the_step_are_never_chosen(verb, planned, machine):
    """`train` starts plain DDP: each card holds the whole step, or runs out of memory."""
    asked = parse_gpu("A100-80GB:2")
    plan = planned(load_config(None, FULL_7B), machine(), on="modal", gpu=asked, verb=verb)
    (row,) = plan.candidates
    assert row.fits
    assert row.whole_gib > row.place.capacity_gib
    assert (plan.chosen, plan.exit_code) == (None, 1)
    assert "training here does not shard: each card holds the whole step" in plan.decision.reason
    assert "H200 holds it on one card" in plan.cheaper_fit
    answer = json.loads(plan_json(plan, []))
    assert (answer["candidates"][0]["fits"], answer["candidates"][0]["obstacle"]) == (
        True,
        "FSDP only",
    )
    (warning,) = [text for text in answer["warnings"] if "FSDP" in text]
    assert "train and smoke hold the whole step on each card and cannot run these rows" in warning


def test_without_a_count_a_larger_card_is_taken_before_several(planned, machine):
    plan = planned(load_config(None, FULL_7B), machine(), on="modal")
    assert plan.chosen.place.num_gpus == 1
    assert plan.chosen.is_launchable


def test_several_cards_that_each_hold_the_step_are_launchable_with_their_buckets(planned, machine):
    config = load_config(None, LORA_7B)
    plan = planned(config, machine(), on="modal", gpu=parse_gpu("A100-80GB:2"), verb="train")
    assert plan.chosen.place.label == "A100-80GB:2"
    assert not plan.chosen.is_sharded
    # DDP sums gradients in buckets of their size, beside the gradients themselves.
    shape = plan.chosen.shape
    buckets_gib = gib(trained_bytes(shape.case))
    assert plan.chosen.memory.terms_gib["gradient_buckets"] == pytest.approx(buckets_gib)
    alone = run_memory(shape, 1).peak_tensor_gib
    assert plan.chosen.memory.peak_tensor_gib == pytest.approx(alone + buckets_gib)
    assert any("(DDP)" in warning for warning in plan.warnings)


def test_a_run_over_its_timeout_is_priced_to_its_end(planned, machine):
    config = load_config(None, [*LORA_7B, "modal.timeout_s=600", "grpo.save_steps=10"])
    card = parse_gpu("L40S")
    free = planned(load_config(None, LORA_7B), machine(), on="modal", gpu=card).chosen
    plan = planned(config, machine(), on="modal", gpu=card)
    # Two calls to their time-out and the rest, each of which starts and loads again.
    rest_s = plan.chosen.wall_s - 2 * 600
    assert plan.chosen.stretch.again_s < rest_s < 600
    per_s = free.expected_usd / free.wall_s
    assert plan.chosen.expected_usd == pytest.approx(plan.chosen.wall_s * per_s)
    assert plan.chosen.expected_usd > free.expected_usd + 2 * plan.chosen.stretch.again_s * per_s
    assert plan.chosen.worst_usd < plan.chosen.expected_usd
    (warning,) = [text for text in plan.warnings if "ends unfinished" in text]
    assert "ends unfinished at its time-out of 10 min. " in warning
    assert f"The worst case of {plan.chosen.worst_usd:.2f} USD is that of one call" in warning
    assert "raise modal.timeout_s" in warning


def test_retries_are_no_time_to_compute_in(planned, machine):
    """An attempt that reaches its time-out has ended: the platform retries what died."""
    overrides = [*HALF_B, "grpo.max_steps=300000", "modal.retries=5"]
    plan = planned(load_config(None, overrides), machine(), on="modal", gpu=parse_gpu("L4"))
    assert 86_400 < plan.chosen.wall_s < 6 * 86_400
    assert not plan.chosen.ends_in_one_call
    assert plan.chosen.call_usd == pytest.approx(24 * plan.chosen.usd_per_hour)
    assert plan.chosen.worst_usd == pytest.approx(6 * plan.chosen.call_usd)
    assert any("ends unfinished at its time-out of 24.0 h" in text for text in plan.warnings)


def test_a_run_that_ends_in_the_seconds_kept_for_its_summary_is_cut(planned, machine):
    """An attempt is asked to end before its time-out, so that its last commit has time."""
    config = load_config(None, [*LORA_7B, "grpo.save_steps=10"])
    card = parse_gpu("L40S")
    wall_s = planned(config, machine(), on="modal", gpu=card).chosen.wall_s
    for seconds, ends in ((wall_s + 29, False), (wall_s + 31, True)):
        limits = [f"modal.timeout_s={seconds}", "grpo.save_steps=10"]
        limited = load_config(None, [*LORA_7B, *limits])
        chosen = planned(limited, machine(), on="modal", gpu=card).chosen
        assert chosen.ends_in_one_call is ends


ENDLESS = [*HALF_B, "modal.timeout_s=60"]


def test_a_place_that_reaches_no_checkpoint_within_its_timeout_is_not_chosen(planned, machine):
    """What a call has not saved when its time-out comes is lost, and the next begins anew."""
    plan = planned(load_config(None, ENDLESS), machine(), on="modal", gpu=parse_gpu("L4"))
    (row,) = plan.candidates
    assert (row.fits, row.obstacle, plan.chosen, plan.exit_code) == (True, "time-out", None, 1)
    assert plan.cheaper_fit is None
    assert plan.decision.reason.startswith("L4: a call of 60 s ends before it has kept anything")
    said = re.search(r"Set (modal.timeout_s) = (\d+)\.", plan.decision.reason)
    long_enough = load_config(None, [*HALF_B, f"modal.timeout_s={said[2]}"])
    enough = planned(long_enough, machine(), on="modal", gpu=parse_gpu("L4"))
    assert enough.chosen.ends_in_one_call
    too_short = load_config(None, [*HALF_B, f"modal.timeout_s={int(said[2]) - 2}"])
    assert planned(too_short, machine(), on="modal", gpu=parse_gpu("L4")).chosen is None


def test_more_checkpoints_are_the_other_way_to_an_end(planned, machine):
    overrides = [*LORA_7B, "modal.timeout_s=600"]
    card = parse_gpu("L40S")
    plan = planned(load_config(None, overrides), machine(), on="modal", gpu=card)
    said = re.search(r" or grpo.save_steps = (\d+)\.", plan.decision.reason)
    most = int(said[1])
    for every, is_taken in ((most, True), (most + 1, False)):
        saving = load_config(None, [*overrides, f"grpo.save_steps={every}"])
        chosen = planned(saving, machine(), on="modal", gpu=card).chosen
        assert (chosen is not None) is is_taken


def test_a_smoke_over_its_timeout_is_never_resumed(planned, machine):
    config = load_config(None, ["model=shape:qwen2.5-0.5b", "modal.timeout_s=100",
                                "smoke.fixed_shapes=[8, 512]", "grpo.save_steps=1"])  # fmt: skip
    plan = planned(config, machine(), on="modal", gpu=parse_gpu("L4"))
    assert plan.candidates[0].obstacle == "time-out"
    assert "first kept at its end" in plan.decision.reason


def test_a_local_run_has_no_timeout_and_says_why_no_other_place_is_taken(planned, machine):
    plan = planned(load_config(None, ENDLESS), machine("RTX-4090"))
    assert (plan.chosen.place.where, plan.chosen.calls.num_calls) == ("local", 1)
    assert "so the run would never end" in plan.decision.reason


@pytest.mark.parametrize(
    ("saving", "steps"),
    [
        ([], 500),
        (["grpo.save_steps=50"], 50),
        (["grpo.save_steps=0.1"], 100),
        (["grpo.save_strategy=no"], 1000),
        (["grpo.max_steps=40"], 40),
    ],
)
def test_checkpoints_come_as_often_as_trl_writes_them(saving, steps, planned, machine):
    config = load_config(None, [*HALF_B, "grpo.max_steps=1000", *saving])
    plan = planned(config, machine(), on="modal", gpu=parse_gpu("L4"))
    assert plan.chosen.stretch.steps_a_checkpoint == steps


def test_a_run_of_days_says_how_many_calls_it_needs(planned, machine):
    config = load_config(None, [*HALF_B, "grpo.max_steps=1000000", "modal.retries=0"])
    plan = planned(config, machine(), on="modal", gpu=parse_gpu("L4"))
    days = plan.chosen.wall_s / 86_400
    assert days > 4
    (warning,) = [text for text in plan.warnings if "ends unfinished" in text]
    assert f"{int(days)} calls of `runs resume` more" in warning
    per_day = plan.chosen.usd_per_hour * 24
    assert plan.chosen.expected_usd == pytest.approx(per_day * days)


def test_what_ends_within_its_timeout_is_taken_before_what_is_cheaper(planned, machine):
    config = load_config(None, LORA_7B)
    cheapest = planned(config, machine(), on="modal").chosen
    capped = load_config(None, [*LORA_7B, f"modal.timeout_s={0.95 * cheapest.wall_s:.0f}"])
    plan = planned(capped, machine(), on="modal")
    assert not one(plan, cheapest.place.label).ends_in_one_call
    assert plan.chosen.ends_in_one_call
    assert "the time-out binds: " in plan.decision.reason


def test_checkpoints_take_time_dollars_and_room(planned, machine):
    """By hand: 16 bytes a weight (itself, two moments, the teacher) at 400 MB/s and a second."""
    full = ["model=shape:qwen2.5-1.5b", "teacher=frozen", "grpo.max_steps=200"]
    weights = model_shape(model_settings("shape:qwen2.5-1.5b")).num_parameters
    one_s = 16 * weights / 400e6 + 1.0

    def plan_of(*settings):
        config = load_config(None, [*full, *settings])
        return planned(config, machine(), on="modal", gpu=parse_gpu("H100"))

    none, last = plan_of("grpo.save_strategy='no'"), plan_of()
    often = plan_of("grpo.save_steps=10", "grpo.save_total_limit=3")
    assert last.chosen.wall_s - none.chosen.wall_s == pytest.approx(one_s)
    assert often.chosen.wall_s - none.chosen.wall_s == pytest.approx(20 * one_s)
    per_s = often.chosen.usd_per_hour / 3600
    assert often.chosen.expected_usd - none.chosen.expected_usd == pytest.approx(20 * one_s * per_s)
    stored_gib = gib((2 + 4 + 3 * 16) * weights)
    assert any(
        f"About {stored_gib:.1f} GiB of weights and 3 checkpoints stay" in text
        for text in often.warnings
    )


@pytest.mark.parametrize(
    ("settings", "num_train", "num_teacher"),
    [
        (["diagnostics.gradients_every=1"], 200 * 3 * 2 / 3, 0),
        (["diagnostics.gradients_every=50"], 4 * 3 * 2 / 3, 0),
        (["diagnostics.gradients_every=50", "beta_replay=0"], 4 * 2 * 2 / 3, 0),
        (["diagnostics.credit_every=20"], 10 / 3, 10),
        (["diagnostics.gradients_every=201", "diagnostics.credit_every=0"], 0, 0),
    ],
)
def test_diagnostics_take_time(settings, num_train, num_teacher, planned, machine):
    """A backward is 2/3 of a forward and its backward; three channels have one each."""
    wall_s = {}
    for name, more in (("plain", settings[1:]), ("measured", settings)):
        config = load_config(None, [*FULL_7B, "teacher=frozen", "lora.r=16", *more])
        chosen = planned(config, machine(), on="modal", gpu=parse_gpu("H100")).chosen
        wall_s[name] = chosen.clock.total_s.expected
    terms = chosen.terms_s
    wanted = num_train * terms["train"].expected + num_teacher * terms["teacher"].expected
    assert wall_s["measured"] - wall_s["plain"] == pytest.approx(wanted, abs=1e-6)


def test_an_adapters_checkpoint_is_that_of_the_adapter(planned, machine):
    config = load_config(None, LORA_7B)
    shape = planned(config, machine(), on="modal", gpu=parse_gpu("H100")).chosen.shape
    adapter = trained_bytes(shape.case)
    assert checkpoint_bytes(shape.case) == 3 * adapter
    assert adapter < 0.03 * persistent_bytes(shape.case)["weights"]
    assert (shape.num_checkpoints, shape.num_kept_checkpoints) == (1, 1)
    smoke = planned(load_config(None, [*LORA_7B[:1], "smoke.steps=20"]), machine(), verb="smoke")
    assert smoke.candidates[0].shape.num_checkpoints == 0


def test_a_t4_is_never_taken_for_bf16(note, planned, machine):
    plan = planned(note, machine(), on="modal", budget_usd=1.0)
    assert one(plan, "T4").worst_usd < 1.0
    assert (plan.chosen, plan.exit_code) == (None, 2)
    # Without a flash kernel each layer keeps the softmax of every row.
    assert one(plan, "T4").memory.peak_gib > one(plan, "L4").memory.peak_gib + 2
    alone = planned(note, machine(), on="modal", gpu=parse_gpu("T4"))
    assert (alone.chosen, alone.exit_code) == (None, 1)
    assert alone.decision.reason.startswith("T4 has no bf16, which this run computes in.")
    assert any("it is not taken" in warning for warning in alone.warnings)


def test_only_places_that_can_be_taken_are_predicted_anew(note, planned, machine):
    """A simulation takes seconds, and a card without flash attention would need one of its own."""
    asked = []

    def predictor(case):
        asked.append(case)
        return predict(case)

    plan = planned(note, machine(), on="modal", predictor=predictor)
    assert "T4" in {candidate.place.label for candidate in plan.candidates}
    assert len(asked) == len(plan.candidates) - 1
    assert all(case.has_flash for case in asked)


def test_bf16_that_a_card_lacks_is_refused_as_a_launch_refuses_it(planned, machine):
    config = load_config(None, [*HALF_B, "grpo.bf16=true"])
    with pytest.raises(ConfigError, match=r"grpo\.bf16 is true and T4 has no bf16"):
        planned(config, machine(), on="modal", gpu=parse_gpu("T4"))


@pytest.mark.parametrize("precision", ["grpo.bf16=false", "grpo.fp16=true"])
def test_a_t4_computes_fp32_and_fp16_like_any_card(precision, planned, machine):
    config = load_config(None, [*HALF_B, precision, "smoke.fixed_shapes=[2, 64]"])
    plan = planned(config, machine(), on="modal", gpu=parse_gpu("T4"))
    assert plan.chosen.place.label == "T4"
    assert not any("bf16" in warning for warning in plan.warnings)


def test_memory_binds_where_the_whole_run_would_cost_less(planned, machine):
    """An hour of an A10 is cheaper than one of an L40S, and its run dearer."""
    rows = ["grpo.per_device_train_batch_size=8", "grpo.gradient_accumulation_steps=4"]
    config = load_config(None, [*LORA_7B, *rows, "batch.max_context_tokens=4096",
                                "grpo.max_completion_length=768"])  # fmt: skip
    plan = planned(config, machine(), on="modal")
    cheaper = [c for c in plan.candidates if c.expected_usd < plan.chosen.expected_usd]
    assert any(c.usd_per_hour < plan.chosen.usd_per_hour for c in plan.candidates)
    assert cheaper == []
    assert "binds" not in plan.decision.reason
    assert plan.cheaper_fit is None


def test_the_cap_is_named_where_the_cap_binds(planned, machine):
    config = load_config(None, [*LORA_7B, "lora.r=8"])
    free = planned(config, machine(), on="modal")
    least = min((c for c in free.candidates if c.is_launchable), key=lambda c: c.worst_usd)
    assert least.place.label != free.chosen.place.label
    plan = planned(config, machine(), on="modal", budget_usd=least.worst_usd)
    assert plan.chosen.place.label == least.place.label
    assert f"the cap of {least.worst_usd:g} USD binds: {free.chosen.place.label} would take " in (
        plan.decision.reason
    )


@pytest.mark.parametrize(("num_steps", "num_calls"), [(1000, 1), (200_000, 3)])
def test_the_cap_that_a_refusal_names_holds_every_call(num_steps, num_calls, planned, machine):
    config, card = load_config(None, [*HALF_B, f"grpo.max_steps={num_steps}"]), parse_gpu("L4")
    refused = planned(config, machine(), on="modal", gpu=card, budget_usd=0.1)
    assert refused.exit_code == 2
    (named,) = re.findall(r"a cap of ([\d.]+) USD would hold ", refused.decision.reason)
    plan = planned(config, machine(), on="modal", gpu=card, budget_usd=float(named))
    assert plan.chosen.calls.num_calls == num_calls
    # The ledger sets the worst case of each call aside beside what those before it cost.
    at_the_last_usd = (num_calls - 1) * plan.chosen.call_usd + plan.chosen.worst_usd
    assert 0 <= float(named) - at_the_last_usd < 0.01
    told = any(f"a cap on all of them must be {named} USD" in text for text in plan.warnings)
    assert told is (num_calls > 1)


def test_the_timeout_that_a_refusal_names_is_taken_and_ends_the_run(planned, machine):
    config = load_config(None, [*HALF_B, "grpo.max_steps=2000"])
    card = parse_gpu("L4")
    expected_usd = planned(config, machine(), on="modal", gpu=card).chosen.expected_usd
    for budget_usd, retries in ((2.2 * expected_usd, 1), (1.2 * expected_usd, 0)):
        refused = planned(config, machine(), on="modal", gpu=card, budget_usd=budget_usd)
        (named,) = re.findall(r"A time-out of (\d+) s", refused.decision.reason)
        limits = [f"modal.timeout_s={named}", f"modal.retries={retries}", "grpo.max_steps=2000"]
        taken = load_config(None, [*HALF_B, *limits])
        plan = planned(taken, machine(), on="modal", gpu=card, budget_usd=budget_usd)
        assert plan.chosen.ends_in_one_call
        assert ("with modal.retries = 0" in refused.decision.reason) is (retries == 0)


def test_where_nothing_fits_the_change_is_named_for_the_cheapest_card_that_it_opens(
    planned, machine
):
    """The change opens a B300 too, which costs a multiple of what the run then needs."""
    long = ["model=shape:qwen2.5-1.5b", "grpo.max_steps=200", "grpo.max_completion_length=16384",
            "tree=off"]  # fmt: skip
    plan = planned(load_config(None, long), machine(), on="modal")
    assert plan.chosen is None
    label, setting = re.match(r"(\S+) would fit with (.+?) \(", plan.cheaper_fit).groups()
    changed = planned(load_config(None, [*long, setting.replace(" ", "")]), machine(), on="modal")
    assert one(changed, "B300").is_launchable
    assert changed.chosen.place.label == label != "B300"


def test_a_lower_budget_of_one_forward_is_named_where_it_lets_a_run_fit(planned, machine):
    """Checkpointing is on; a card holds a part of the step's tree and not the whole of it."""
    long = ["model=shape:qwen2.5-1.5b", "lora.r=8", "grpo.max_steps=200",
            "grpo.max_completion_length=4096", "grpo.gradient_checkpointing=true",
            "grpo.num_generations=16", "grpo.per_device_train_batch_size=16"]  # fmt: skip
    card = parse_gpu("L4")
    plan = planned(load_config(None, long), machine(), on="modal", gpu=card)
    assert not one(plan, "L4").fits
    label, key, tokens = re.match(
        r"(\S+) would fit with (batch\.tree_max_tokens) = (\d+) \(", plan.cheaper_fit
    ).groups()
    changed = load_config(None, [*long, f"{key}={tokens}"])
    again = planned(changed, machine(), on="modal", gpu=card)
    assert one(again, label).fits
    # Parts are computed again when their gradient is due, and longer ones take no more time.
    larger = load_config(None, [*long, f"{key}={2 * int(tokens)}"])
    assert not one(planned(larger, machine(), on="modal", gpu=card), label).fits
    whole_s, cut_s = (one(each, label).terms_s["train"].expected for each in (plan, again))
    assert 1.1 * whole_s < cut_s < 1.4 * whole_s


def test_a_budget_of_the_tree_that_costs_more_than_none_is_told(planned, machine):
    def told(*settings):
        config = load_config(None, ["model=shape:qwen2.5-0.5b", *settings])
        plan = planned(config, machine(), on="modal")
        return [text for text in plan.warnings if text.startswith("batch.tree_max_tokens = ")]

    (text,) = told("batch.tree_max_tokens=300")
    computed, alone = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) ?(?:tokens|:)", text))
    assert computed > alone > 300
    assert told() == told("batch.tree_max_tokens=300", "tree=off") == []
    assert told("batch.tree_max_tokens=1000000") == []


def test_an_adapter_as_the_change_keeps_the_teacher_or_says_otherwise(planned, machine):
    plan = planned(load_config(None, FULL_7B), machine(), on="modal", gpu=parse_gpu("A100-80GB"))
    assert plan.cheaper_fit.startswith("A100-80GB would fit with lora.r = 16 (")
    changed = load_config(None, [*FULL_7B, "lora.r=16"])
    assert changed.teacher == "live"
    again = planned(changed, machine(), on="modal", gpu=parse_gpu("A100-80GB"))
    assert f"({again.chosen.memory.peak_gib:.1f} of" in plan.cheaper_fit


@pytest.mark.parametrize(("hours", "retries"), [(1, 0), (100, 0), (100, 2)])
def test_a_call_is_never_expected_to_cost_more_than_its_worst(hours, retries, planned, machine):
    """A run of 100 hours ends no call of a day: what is asked about is that call."""
    config = load_config(None, ["model=shape:qwen2.5-0.5b", f"grpo.max_steps={hours * 1000}",
                                f"modal.retries={retries}"])  # fmt: skip
    for candidate in planned(config, machine(), on="modal").candidates:
        assert 0 < candidate.call_usd <= candidate.worst_usd
        if candidate.ends_in_one_call:
            assert candidate.call_usd == pytest.approx(candidate.expected_usd)


def test_ram_is_asked_for_each_cards_weights_and_never_more_than_modal_gives(planned, machine):
    def asked(*overrides, gpu="H100"):
        config = load_config(None, ["model=shape:qwen2.5-7b", "lora.r=8", *overrides])
        plan = planned(config, machine(), on="modal", gpu=parse_gpu(gpu))
        return plan.candidates[0].memory_request_gib

    assert asked() == pytest.approx(1.5 * 14.2, rel=0.02)
    assert asked(gpu="H100:4") == pytest.approx(4 * asked())
    assert asked("grpo.model_init_kwargs={dtype='float32'}", gpu="H100:8") == 336
    assert asked("modal.memory_gib=20") == 20


@pytest.mark.parametrize(
    ("rows", "group", "num_cards", "places", "problem"),
    [
        (6, 9, 3, {3}, "RTX-5090 is left out: grpo.per_device_train_batch_size 6 x "),
        (8, 8, 3, {1, 3}, None),
        (4, 4, 1, {1}, None),
    ],
)
def test_cards_on_which_a_step_would_cut_a_group_are_left_out(
    rows, group, num_cards, places, problem, planned, machine
):
    config = load_config(None, ["model=shape:qwen2.5-0.5b", f"grpo.num_generations={group}",
                                f"grpo.per_device_train_batch_size={rows}"])  # fmt: skip
    plan = planned(config, machine(*["RTX-5090"] * num_cards), on="local")
    assert {candidate.place.num_gpus for candidate in plan.candidates} == places
    told = [warning for warning in plan.warnings if "is left out" in warning]
    assert [warning.startswith(problem) for warning in told] == ([] if problem is None else [True])


def test_groups_that_every_number_of_cards_would_cut_are_refused(planned, machine):
    config = load_config(None, ["grpo.num_generations=7", "grpo.per_device_train_batch_size=4"])
    with pytest.raises(ConfigError, match=r"Set grpo.per_device_train_batch_size = 7, or make"):
        planned(config, machine("RTX-5090", "RTX-5090"), on="local")
