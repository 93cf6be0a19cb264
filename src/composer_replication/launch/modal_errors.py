"""What Modal's errors mean for the user, and what to do about each.

They are told apart by name, so that this module starts without Modal's client.
"""

import re

from composer_replication.errors import (
    CallCancelledError,
    ComposerError,
    InputError,
    LaunchError,
    UnreachableError,
)

SETUP_REMEDY = (
    "Run `modal setup` once, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET. "
    "--dry-run and `composer-replication plan` need neither."
)

_LIMIT_WORDS = re.compile(r"limit|budget|spend|quota|exceed|credit|payment|billing", re.IGNORECASE)
_MEMORY_WORDS = re.compile(r"out.of.memory|\boom\b|memory limit", re.IGNORECASE)
_NO_ANSWER = {"ConnectionError", "ServiceError", "InternalError"}
_REFUSALS = (
    *("ResourceExhaustedError", "ConflictError", "PermissionDeniedError", "InvalidError"),
    *("ExecutionError", "ServerWarning"),
)


def explain_modal_error(error: Exception) -> ComposerError | None:
    """The same as one of our errors, with the remedy; None for what is not Modal's."""
    names = {cls.__name__ for cls in type(error).__mro__ if cls.__module__.startswith("modal")}
    if not names:
        return None
    said = " ".join(str(error).split()) or type(error).__name__
    if "AuthError" in names:
        return InputError(f"Modal does not accept the credentials: {said[:200]} {SETUP_REMEDY}")
    if names & _NO_ANSWER:
        return unreachable(said[:200])
    if "FunctionTimeoutError" in names:
        return LaunchError(
            "The remote run was ended at its time-out. What it had committed is kept: it goes on "
            "with `composer-replication runs resume ID`, and for longer with "
            "`--set modal.timeout_s=SECONDS` after that."
        )
    if names & {"InputCancellation", "FunctionCallCancelled"} or "cancel" in said.lower():
        return CallCancelledError("The remote run was cancelled. What it had committed is kept.")
    if "RemoteError" in names and _MEMORY_WORDS.search(said):
        return out_of_memory()
    is_limit = _LIMIT_WORDS.search(said) is not None
    # A limit on the number of cards speaks of them too.
    if (
        names & set(_REFUSALS)
        and "gpu" in said.lower()
        and not ("ResourceExhaustedError" in names and is_limit)
    ):
        return InputError(
            f"Modal does not know that GPU, or not in that number: {said[:200]} "
            "`composer-replication plan CONFIG.toml --on modal` lists what it has."
        )
    if names & set(_REFUSALS) and is_limit:
        return LaunchError(
            f"Modal refused to run it: {said[:200]} A workspace's budget, credit or number of "
            "containers is used up: raise it at modal.com/settings, wait for other runs, or take a "
            "cheaper card with --gpu."
        )
    if "NotFoundError" in names:
        return InputError(
            f"Modal does not find what the run names: {said[:200]} Create a missing secret with "
            "`modal secret create NAME HF_TOKEN=...`, or leave --hub-secret out."
        )
    return LaunchError(f"Modal ended the run: {type(error).__name__}: {said[:400]}")


def unreachable(where: str) -> ComposerError:
    """Nothing answers at Modal's address, or not as it should."""
    return UnreachableError(
        f"Modal cannot be reached ({where}). Check the network and proxy, then try again, or run "
        "it here with --on local."
    )


def silent(seconds: float) -> ComposerError:
    """Nothing has answered for that long, while a call was waited for."""
    return UnreachableError(
        f"Modal has not answered for {seconds:.0f} s. The run there may go on, so what it may cost "
        "stays set aside. When the network is back: `composer-replication runs fetch ID`."
    )


def out_of_memory() -> ComposerError:
    """The container's RAM was not enough."""
    return LaunchError(
        "The remote run was killed because it needed more RAM than the container has. It goes on "
        "with more by `composer-replication runs resume ID --set modal.memory_gib=GIB`."
    )
