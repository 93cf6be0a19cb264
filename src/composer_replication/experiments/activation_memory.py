"""`activation_memory`: the founding note's bound on what a step holds beside what stays."""

from composer_replication.experiments.extra_steps import ExtraStep
from composer_replication.planner.model_files import REFERENCE_SPEC, SHAPE_PREFIX
from composer_replication.runs.summary import Check

NAME = "activation_memory"
BOUND_GIB = 16.0
FOUNDING_MODELS = (REFERENCE_SPEC, f"{SHAPE_PREFIX}qwen2.5-0.5b")
FOUNDING_TOKENS = 2 * 1024
"""B = 2 rows of T = 1024 tokens, the note's shape."""


def check_activations(model_spec: str, largest: ExtraStep) -> Check | None:
    """The verdict; None where the model or the shape is another, or nothing was measured.

    Args:
        model_spec: as the configuration names it.
        largest: the step at the largest shape; gradients, which it makes, count too.
    """
    is_founding = largest.num_rows * largest.num_tokens <= FOUNDING_TOKENS
    if model_spec not in FOUNDING_MODELS or not is_founding or largest.activation_gib is None:
        return None
    passed = largest.activation_gib <= BOUND_GIB
    return Check(
        NAME,
        passed=passed,
        value=largest.activation_gib,
        bound=BOUND_GIB,
        cause=None
        if passed
        else (
            f"A step of {largest.num_rows} rows of {largest.num_tokens} tokens holds "
            f"{largest.activation_gib:.2f} GiB beside weights, optimizer and teacher. Some "
            "[tokens, vocabulary] tensor is built in full, or activations outlive their channel."
        ),
    )
