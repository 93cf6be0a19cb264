"""Each error of Modal's own classes, as a user reads it."""

import modal.exception
import pytest

from composer_replication.errors import InputError, LaunchError, UnreachableError
from composer_replication.launch.modal_errors import explain_modal_error

CASES = [
    (modal.exception.AuthError("Token missing."), InputError, "Run `modal setup` once"),
    (modal.exception.ConnectionError("no route"), LaunchError, "Modal cannot be reached"),
    (modal.exception.FunctionTimeoutError("t"), LaunchError, "was ended at its time-out"),
    (
        modal.exception.ResourceExhaustedError("workspace budget reached"),
        LaunchError,
        "budget, credit or number of containers is used up",
    ),
    (
        modal.exception.ResourceExhaustedError("GPU limit reached: 10 concurrent GPUs"),
        LaunchError,
        "budget, credit or number of containers is used up",
    ),
    (
        modal.exception.InvalidError("memory limit is 336 GiB"),
        LaunchError,
        "Modal refused to run it: memory limit is 336 GiB",
    ),
    (modal.exception.ServiceError("unavailable"), UnreachableError, "Modal cannot be reached"),
    (modal.exception.InvalidError("gpu 'Z9'"), InputError, "does not know that GPU"),
    (modal.exception.NotFoundError("Secret 'x' not found"), InputError, "modal secret create"),
    (
        modal.exception.RemoteError("container killed: out of memory"),
        LaunchError,
        "--set modal.memory_gib=GIB",
    ),
    (modal.exception.RemoteError("boom"), LaunchError, "Modal ended the run: RemoteError: boom"),
]


@pytest.mark.parametrize(("error", "kind", "text"), CASES)
def test_an_error_of_modals_says_what_to_do(error, kind, text):
    ours = explain_modal_error(error)
    assert isinstance(ours, kind)
    assert text in str(ours)


def test_an_error_that_is_not_modals_is_left_alone():
    assert explain_modal_error(ValueError("limit")) is None
