from composer_replication.runs.step_rows import without_measurements


def test_what_a_run_repeats_has_no_seconds_memory_or_dollars():
    row = {"step": 3, "loss": 0.5, "tokens/sdpo": 7, "grad_norm": 1.0}
    measured = {"step_s": 1.0, "rollout_s": 1.0, "step_time": 1.0, "peak_gib": 2.0, "cost_usd": 0.1}
    assert without_measurements(row | measured) == row
