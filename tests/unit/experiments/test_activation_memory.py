"""The founding note's bound on activations is judged where it was set, and nowhere else."""

import pytest

from composer_replication.experiments.activation_memory import check_activations
from composer_replication.experiments.extra_steps import ExtraStep

REFERENCE = "Qwen/Qwen2.5-0.5B-Instruct"


def step(activation_gib, *, num_rows=2, num_tokens=1024):
    return ExtraStep(num_rows, num_tokens, 0.1, 20.0, 0.7, activation_gib)


@pytest.mark.parametrize("spec", [REFERENCE, "shape:qwen2.5-0.5b"])
def test_the_bound_is_16_gib_beside_what_stays(spec):
    within, over = check_activations(spec, step(16.0)), check_activations(spec, step(16.1))
    assert within is not None
    assert within.passed
    assert over is not None
    assert not over.passed
    assert "2 rows of 1024 tokens holds 16.10 GiB" in str(over.cause)


@pytest.mark.parametrize(
    ("spec", "measured"),
    [
        ("smollm2-135m", step(1.0)),
        (REFERENCE, step(None)),
        (REFERENCE, step(1.0, num_rows=8)),
        (REFERENCE, step(1.0, num_tokens=4096)),
    ],
)
def test_another_model_or_a_larger_shape_has_no_verdict_and_a_cpu_none_either(spec, measured):
    assert check_activations(spec, measured) is None
