"""Ten steps of the tiny model at fixed shapes, against stored figures.

Nothing is sampled, so the figures depend on the arithmetic alone. The test leaves what it saw in
its run directory as `golden_run.json` and names it when it fails; copy that over the stored file
only with the reason in the commit.
"""

import json
from pathlib import Path

import pytest

from composer_replication.cli import main

GOLDEN = Path(__file__).with_name("golden_run.json")
FIGURES = ("loss/sdpo", "loss/dpo", "loss/grpo", "grad_norm", "reward", "entropy")


def test_ten_steps_give_the_stored_figures(tiny_model_dir, tmp_path):
    out = tmp_path / "run"
    code = main(
        [
            "smoke", "--model", str(tiny_model_dir), "--out", str(out), "--steps", "10",
            "--fixed-shapes", "4,96",
            "--set", "grpo.num_generations=4",
            "--set", "grpo.per_device_train_batch_size=4",
            "--set", "grpo.max_completion_length=24",
            "--set", "grpo.learning_rate=1e-3",
            "--set", "grpo.bf16=false",
        ]
    )  # fmt: skip
    assert code == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = [{name: row[name] for name in FIGURES} for row in rows]
    (out / "golden_run.json").write_text(json.dumps(seen, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(seen) == len(golden) == 10
    for step, (row, stored) in enumerate(zip(seen, golden, strict=True), 1):
        for name in FIGURES:
            # Other CPUs sum in another order; loss/grpo is a difference of equal sums.
            expected = pytest.approx(stored[name], rel=2e-3, abs=1e-5)
            assert row[name] == expected, (step, name, str(out / "golden_run.json"))
