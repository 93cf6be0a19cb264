import json
import os
from datetime import date, timedelta

import pytest

from composer_replication.errors import ConfigError, MissingDependencyError
from composer_replication.planner.cost import estimate
from composer_replication.planner.hardware import GPUS
from composer_replication.planner.prices import (
    current_prices,
    fetched_prices_path,
    parse_rates,
    refresh_prices,
    shipped_prices,
    with_rates,
)

TODAY = date(2026, 11, 26)
RATES = '{"gpu_hour_cost_l4": "0.75", "gpu_hour_cost_rtx6000": "3.50", "cpu_hour_cost": "0.05"}'


def install_modal(folder, monkeypatch, body):
    """A program that stands where Modal's own client would."""
    (folder / "modal").mkdir()
    (folder / "modal" / "__init__.py").touch()
    (folder / "modal" / "__main__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def test_every_rented_card_has_a_price_and_no_local_one():
    priced = set(shipped_prices().gpu_usd_per_hour)
    assert priced == {gpu.name for gpu in GPUS.values() if gpu.is_on_modal}


def test_hourly_prices_are_the_notes_prices_by_the_second():
    notes = {"T4": 164, "L4": 222, "A10": 306, "L40S": 542, "A100-40GB": 583, "A100-80GB": 694}
    for name, millionths in (notes | {"H100": 1097}).items():
        assert shipped_prices().gpu_usd_per_hour[name] / 3600 == pytest.approx(
            millionths * 1e-6, abs=0.6e-6
        )


def test_a_table_says_when_it_is_too_old():
    table = shipped_prices()
    assert table.age_warning(table.as_of + timedelta(days=90)) is None
    warning = table.age_warning(table.as_of + timedelta(days=91))
    assert warning is not None
    assert "91 days old" in warning
    assert "plan --refresh" in warning


def test_fetched_rates_replace_their_own_and_leave_the_rest():
    table = with_rates(shipped_prices(), parse_rates(RATES), TODAY)
    assert table.gpu_usd_per_hour["L4"] == 0.75
    assert table.gpu_usd_per_hour["RTX-PRO-6000"] == 3.5
    assert table.gpu_usd_per_hour["H100"] == 3.95
    assert table.cpu_core_usd_per_hour == 0.05
    assert table.memory_gib_usd_per_hour == 0.008
    assert table.as_of == TODAY


def test_an_answer_without_a_known_rate_changes_nothing():
    with pytest.raises(ConfigError, match="names no GPU rate"):
        with_rates(shipped_prices(), parse_rates('{"gpu_hour_cost_l4": "0"}'), TODAY)
    with pytest.raises(ConfigError, match="holds no rates"):
        parse_rates("<html>")
    with pytest.raises(ConfigError, match="holds no rates"):
        parse_rates("[1]")


def test_refreshed_prices_are_used_from_then_on(tmp_path, monkeypatch):
    install_modal(tmp_path, monkeypatch, f"print('''{RATES}''')")
    assert refresh_prices(TODAY).gpu_usd_per_hour["L4"] == 0.75
    assert current_prices().as_of == TODAY
    cost = estimate("L4", 1, 3600, cpu_cores=0, memory_gib=0)
    assert (cost.usd, cost.prices_as_of) == (0.75, "2026-11-26")


def test_a_refusal_of_modal_is_told_and_keeps_the_table(tmp_path, monkeypatch):
    install_modal(tmp_path, monkeypatch, "raise SystemExit('Token missing.')")
    with pytest.raises(ConfigError, match=r"Token missing\. Set it up with `modal setup`"):
        refresh_prices(TODAY)
    assert current_prices() == shipped_prices()


def test_without_the_modal_package_the_remedy_is_named(tmp_path, monkeypatch):
    body = "import sys; sys.exit('No module named modal')"
    install_modal(tmp_path, monkeypatch, body)
    with pytest.raises(MissingDependencyError, match="pip install modal"):
        refresh_prices(TODAY)


def test_fetched_prices_older_than_the_shipped_ones_are_passed_over(own_cache):
    path = fetched_prices_path()
    assert path.parent == own_cache
    path.parent.mkdir(parents=True)
    old = shipped_prices().model_copy(update={"as_of": date(2026, 1, 1)})
    path.write_text(old.model_dump_json(by_alias=True))
    assert current_prices() == shipped_prices()


def test_a_damaged_price_file_is_named(own_cache):
    fetched_prices_path().parent.mkdir(parents=True)
    fetched_prices_path().write_text('{"schema": 1, "gpu')
    with pytest.raises(ConfigError, match=r"modal_prices\.json does not hold a price table"):
        current_prices()


@pytest.mark.parametrize(
    ("change", "text"),
    [({"T4": None}, "no price of T4"), ({"L4": -0.8}, "greater than or equal to 0")],
)
def test_a_table_without_a_card_or_below_zero_is_refused(change, text, own_cache):
    table = shipped_prices()
    rates = {k: v for k, v in (table.gpu_usd_per_hour | change).items() if v is not None}
    payload = json.loads(table.model_dump_json(by_alias=True)) | {"gpu_usd_per_hour": rates}
    own_cache.mkdir()
    (own_cache / "modal_prices.json").write_text(json.dumps(payload | {"as_of": "2099-01-01"}))
    with pytest.raises(ConfigError, match=text):
        current_prices()
