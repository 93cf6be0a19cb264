import math

import pytest

from composer_replication.errors import BudgetError, ConfigError
from composer_replication.planner.cost import (
    affordable_s,
    check_budget,
    check_cap,
    estimate,
    timeout_s,
    volume_usd,
)
from composer_replication.planner.prices import shipped_prices


def test_a_bill_is_cards_and_cores_and_memory_by_the_second():
    cost = estimate("H100", 2, 1800, cpu_cores=8, memory_gib=64)
    assert cost.gpu_usd == pytest.approx(2 * 3.95 / 2)
    assert cost.cpu_usd == pytest.approx(8 * 0.0473 / 2)
    assert cost.memory_usd == pytest.approx(64 * 0.008 / 2)
    assert cost.usd == pytest.approx(3.95 + 0.1892 + 0.256)
    assert cost.usd_per_hour == pytest.approx(2 * cost.usd)


@pytest.mark.parametrize(("seconds", "gpu_usd", "usd"), [(180, 0.040, 0.056), (420, 0.093, 0.130)])
def test_the_notes_smoke_on_an_l4_costs_what_its_own_inputs_give(seconds, gpu_usd, usd):
    cost = estimate("L4", 1, seconds, cpu_cores=4, memory_gib=16)
    assert cost.gpu_usd == pytest.approx(gpu_usd, abs=0.0005)
    assert cost.usd == pytest.approx(usd, abs=0.0005)


def test_retries_add_whole_attempts():
    once = estimate("L4", 1, 1800, cpu_cores=4, memory_gib=16)
    thrice = estimate("L4", 1, 1800, cpu_cores=4, memory_gib=16, retries=2)
    assert once.worst_usd == once.usd == thrice.usd
    assert thrice.retries_usd == pytest.approx(2 * once.usd)
    assert thrice.worst_usd == pytest.approx(3 * once.usd)


@pytest.mark.parametrize(
    ("region", "factor"), [(None, 1), ("eu", 1.15), ("us-east", 1.75), ("us-ashburn-1", 1.75)]
)
def test_a_region_multiplies_every_rate(region, factor):
    anywhere = estimate("A10", 1, 600, cpu_cores=2, memory_gib=8)
    there = estimate("A10", 1, 600, cpu_cores=2, memory_gib=8, region=region)
    assert there.gpu_usd == pytest.approx(factor * anywhere.gpu_usd)
    assert there.cpu_usd == pytest.approx(factor * anywhere.cpu_usd)
    assert there.memory_usd == pytest.approx(factor * anywhere.memory_usd)


def test_a_card_of_ones_own_costs_nothing():
    cost = estimate("RTX-5090", 1, 36000, cpu_cores=16, memory_gib=64, retries=3)
    assert (cost.usd, cost.worst_usd, cost.usd_per_hour) == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gpu": "L44"}, "no GPU 'L44'"),
        ({"num_gpus": 9}, "9 x L4 is not one machine"),
        ({"seconds": -1}, "seconds is -1"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"memory_gib": math.inf}, "memory_gib is inf"),
        ({"retries": -1}, "retries is -1"),
        ({"num_gpus": 1.5}, "num_gpus is 1.5; a bill needs a finite whole number"),
        ({"num_gpus": True}, "num_gpus is True"),
        ({"retries": 1.5}, "retries is 1.5"),
        ({"seconds": "60"}, "seconds is '60'"),
        ({"cpu_cores": None}, "cpu_cores is None"),
        ({"gpu": 4}, "gpu is 4"),
        ({"region": "us-moon"}, "region is 'us-moon'"),
        ({"region": "us-"}, "region is 'us-'"),
        ({"region": 3}, "region is 3"),
        ({"region": "mars"}, "region is 'mars'"),
        ({"region": "moon-east"}, "region is 'moon-east'"),
    ],
)
def test_a_bill_that_cannot_be_written_is_refused(change, text):
    arguments = {"gpu": "L4", "num_gpus": 1, "seconds": 60, "cpu_cores": 4, "memory_gib": 16}
    with pytest.raises(ConfigError, match=text):
        estimate(**arguments | change)


def test_the_timeout_is_twice_the_high_estimate_and_at_most_a_day():
    assert timeout_s(400.2) == 801
    assert timeout_s(80_000) == 86_400


def test_the_cap_refuses_the_worst_case_and_names_what_fits():
    cost = estimate("H100", 1, 7200, cpu_cores=0, memory_gib=0, retries=1)
    with pytest.raises(BudgetError) as refusal:
        check_cap(
            cost.worst_usd, 5.0, cost.usd_per_hour, retries=1, timeout_s=7200, expected_s=2000
        )
    assert str(refusal.value) == (
        "The worst case is 15.80 USD (3.95 USD an hour x 2 attempts x a time-out of 7200 s), over "
        "the cap of 5 USD. A time-out of 2278 s would fit under it; a cap of 15.80 USD would hold "
        "this run."
    )
    fitting = estimate("H100", 1, 2278, cpu_cores=0, memory_gib=0, retries=1)
    check_cap(
        fitting.worst_usd, 5.0, fitting.usd_per_hour, retries=1, timeout_s=2278, expected_s=2000
    )


@pytest.mark.parametrize(
    ("expected_s", "text"),
    [
        (2000, "A time-out of 2278 s would fit under it; a cap of 15.80 USD would hold this run."),
        (3000, "A time-out of 4556 s with modal.retries = 0 would fit under it; a cap of"),
        # 30 s of a time-out are the summary's.
        (4540, "No time-out under it holds the run in one call: it is expected to take 4540 s; a"),
    ],
)
def test_no_timeout_is_named_that_would_cut_the_run(expected_s, text):
    with pytest.raises(BudgetError) as refusal:
        check_cap(15.8, 5.0, 3.95, retries=1, timeout_s=7200, expected_s=expected_s)
    assert text in str(refusal.value)


def test_no_timeout_is_named_that_modal_refuses():
    """100 USD buy 158,786 s of this container, and a call has a day."""
    limits = {"retries": 1, "timeout_s": 86_400, "expected_s": 147_589}
    with pytest.raises(BudgetError) as refusal:
        check_cap(108.83, 100.0, 2.2672, **limits, holding_usd=163.24, num_calls=2)
    assert str(refusal.value).endswith(
        "No time-out under it holds the run in one call: it is expected to take 147589 s; a cap "
        "of 163.24 USD would hold the 2 calls of this run."
    )


def test_the_longest_affordable_timeout_uses_the_whole_cap():
    rate = estimate("L40S", 2, 0, cpu_cores=4, memory_gib=32).usd_per_hour
    seconds = affordable_s(5.0, rate, retries=2)
    worst = estimate("L40S", 2, seconds, cpu_cores=4, memory_gib=32, retries=2).worst_usd
    assert worst == pytest.approx(5.0)
    assert affordable_s(5.0, 0.0) == math.inf


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (0, "0 or less"),
        (-1, "0 or less"),
        (math.nan, "must be a finite number"),
        (math.inf, "must be a finite number"),
    ],
)
def test_a_cap_that_nothing_could_stay_under_is_refused(budget, text):
    with pytest.raises(ConfigError, match=f"--budget is {budget:g} USD.*{text}"):
        check_budget(budget)
    assert check_budget(0.01) == 0.01


def test_a_volume_costs_only_beyond_its_free_part():
    assert volume_usd(1024, 30) == 0
    assert volume_usd(1124, 30) == pytest.approx(9.0)
    assert volume_usd(1124, 15) == pytest.approx(4.5)


def test_the_smoke_is_free_within_the_monthly_credit():
    cost = estimate("L4", 1, 420, cpu_cores=4, memory_gib=16)
    assert shipped_prices().monthly_credit_usd // cost.usd > 200
