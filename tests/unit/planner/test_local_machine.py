import json
import sys
from dataclasses import replace

import pytest

from composer_replication.planner.calibration import (
    calibrated,
    device_key,
    factor_from,
    is_same_run,
    measured_runs,
    phases_from,
)
from composer_replication.planner.local_machine import LocalCard, parse_cards, visible_cards
from composer_replication.planner.throughput import Range

TWO = "NVIDIA GeForce RTX 5090, 32607, 480\nNVIDIA A100-SXM4-80GB, 81920, [N/A]\n"


def test_cards_are_read_as_the_driver_reports_them():
    first, second = parse_cards(TWO)
    assert (first.gpu.name, second.gpu.name) == ("RTX-5090", "A100-80GB")
    # Where the driver keeps more for itself than the table knows, the driver is right.
    assert first.capacity_gib == pytest.approx((32607 - 480) / 1024, abs=0.1)
    assert second.capacity_gib == 79.14
    assert parse_cards("NVIDIA L4, 16000, 0")[0].capacity_gib == 15.625


@pytest.mark.parametrize("text", ["", "No devices were found\n", "NVIDIA-SMI has failed, x\n"])
def test_a_driver_without_cards_means_no_card(text):
    assert parse_cards(text) == ()


@pytest.mark.parametrize(
    ("name", "gib", "known"),
    [
        ("Tesla T4", 15, "T4"),
        ("NVIDIA A10G", 22, "A10"),
        ("NVIDIA L40S", 44, "L40S"),
        ("NVIDIA L4", 22, "L4"),
        ("NVIDIA A100-SXM4-40GB", 40, "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", 80, "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", 80, "H100"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95, "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX-4090"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 24, None),
        ("NVIDIA GeForce GTX 1080", 8, None),
    ],
)
def test_a_driver_s_name_is_a_card_of_the_table_or_none(name, gib, known):
    found = LocalCard(name, gib).gpu
    assert (None if found is None else found.name) == known


def test_cuda_visible_devices_hides_cards():
    cards = parse_cards(TWO)
    assert visible_cards(cards, None) == cards
    assert visible_cards(cards, "1") == cards[1:]
    assert visible_cards(cards, "") == ()
    assert visible_cards(cards, "-1") == ()


def test_a_plan_starts_without_torch(monkeypatch):
    import subprocess

    code = (
        "import sys; from composer_replication.cli import main; "
        "main(['plan', '--set', 'model=smollm2-135m', '--json']); "
        "assert not {'torch', 'transformers', 'trl', 'modal'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def written_run(folder, ratio, device="NVIDIA L4", model="m", **summary):
    folder.mkdir(parents=True)
    planned = {
        "verb": "smoke",
        "device": device,
        "model": model,
        "step_s": [1.0, 2.0, 4.0],
        "bare_step_s": 2.0,
        "peak_tensor_gib": 5.0,
        "wall_s": 100.0,
    }
    ended = {"status": "passed", "median_step_s": 2.0 * ratio, "peak_tensor_gib": 5.1}
    ended |= {"phases_s": {"load": 10.0 * ratio, "download": None}}
    (folder / "planned.json").write_text(json.dumps(planned))
    (folder / "summary.json").write_text(json.dumps(ended | {"total_s": 90.0} | summary))


def test_runs_on_a_device_calibrate_its_next_plan(tmp_path):
    written_run(tmp_path / "a", 1.5)
    written_run(tmp_path / "b", 1.7)
    written_run(tmp_path / "c", 9.0, device="2-thread CPU")
    written_run(tmp_path / "d", 1.0, status="stopped")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "planned.json").write_text("{}")
    runs = measured_runs(tmp_path)
    assert sorted(run.run for run in runs) == ["a", "b", "c"]
    assert factor_from(runs, device="L4", model="m") == pytest.approx(1.6)
    assert factor_from(runs, device="cpu", model="other") == pytest.approx(9.0)
    assert factor_from(runs, device="H100", model="m") is None


def test_runs_of_the_same_model_count_before_others(tmp_path):
    written_run(tmp_path / "a", 1.5, model="mine")
    written_run(tmp_path / "b", 3.0, model="other")
    assert factor_from(measured_runs(tmp_path), device="L4", model="mine") == pytest.approx(1.5)


def test_a_probe_of_the_run_counts_alone(tmp_path):
    """Four runs of other lengths would outvote the ten steps that were just asked for."""
    for name, ratio in (("a", 1.5), ("b", 1.6), ("c", 1.7), ("d", 1.8)):
        written_run(tmp_path / name, ratio, model="mine")
    *earlier, last = measured_runs(tmp_path)
    runs = [*earlier, replace(last, is_probe=True)]
    assert factor_from(runs, device="L4", model="mine") == pytest.approx(1.8)
    assert factor_from(runs, device="H100", model="mine") is None


def test_phases_of_the_same_model_on_the_device_replace_guesses(tmp_path):
    written_run(tmp_path / "a", 1.0, model="mine")
    written_run(tmp_path / "b", 3.0, model="mine")
    written_run(tmp_path / "c", 9.0, model="other")
    runs = measured_runs(tmp_path)
    assert phases_from(runs, device="L4", model="mine") == {"load": 20.0}
    assert phases_from(runs, device="H100", model="mine") == {}


def test_a_calibrated_range_is_fifteen_percent_wide():
    assert calibrated(Range(1.0, 2.0, 8.0), 1.5) == pytest.approx((2.55, 3.0, 3.45))


@pytest.mark.parametrize(
    ("label", "key"),
    [("2-thread CPU", "cpu"), ("NVIDIA H100 80GB HBM3", "H100"), ("Fancy card", "Fancy card")],
)
def test_a_summary_s_device_is_a_place_of_the_plan(label, key):
    assert device_key(label) == key


def test_only_passed_runs_of_the_model_narrow_and_local_phases_stay_local(tmp_path):
    written_run(tmp_path / "other", 3.0, model="other")
    written_run(tmp_path / "failed", 9.0, model="mine", status="failed")
    runs = measured_runs(tmp_path)
    assert factor_from(runs, device="L4", model="mine") is not None
    assert not is_same_run(runs, device="L4", model="mine")
    written_run(tmp_path / "passed", 1.5, model="mine")
    written_run(tmp_path / "remote", 1.5, model="mine", cost_usd=0.1)
    runs = measured_runs(tmp_path)
    assert is_same_run(runs, device="L4", model="mine")
    assert factor_from(runs, device="L4", model="mine") == pytest.approx(1.5)
    assert phases_from(runs, device="L4", model="mine", where="modal") == {"load": 15.0}
