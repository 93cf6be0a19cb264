from pathlib import Path

import pytest

from composer_replication.config.loading import load_config
from composer_replication.planner.hardware import GPUS
from composer_replication.planner.local_machine import LocalCard, LocalMachine
from composer_replication.planner.memory import predict
from composer_replication.planner.plan import PlanRequest, make_plan
from composer_replication.planner.prices import shipped_prices


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No fetched prices of the machine that runs the tests."""
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def planned():
    """`planned(config, machine, **request)`: a plan with the shipped prices on their own day."""

    def plan(config, machine, predictor=predict, **request):
        prices = shipped_prices()
        asked = PlanRequest(config, **request)
        return make_plan(asked, machine, prices=prices, today=prices.as_of, predictor=predictor)

    return plan


@pytest.fixture
def machine():
    """`machine("RTX-5090")`: a computer with those cards and 64 GiB of RAM."""

    def build(*names, memory_gib=64.0):
        cards = tuple(LocalCard(f"NVIDIA {n}", GPUS[n].capacity_gib) for n in names)
        return LocalMachine(cards, 16, frozenset({"avx2"}), memory_gib)

    return build


@pytest.fixture
def note():
    """The founding note's smoke under its own assumptions."""
    return load_config(Path(__file__).parents[3] / "docs" / "note_smoke.toml", [])
