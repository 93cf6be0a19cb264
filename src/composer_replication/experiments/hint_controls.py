"""Hints that should not teach: what an SDPO arm must lose with, if the hint is what teaches.

Each control keeps the sites, their tokens and the teacher, and changes nothing but the hint.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from composer_replication.traces.hints import HintSite, demonstrations_in, hint_from_error
from composer_replication.traces.trace import TurnError
from composer_replication.training.trainer import ComposerReplicationTrainer

HintControl = Callable[[Sequence[HintSite]], list[HintSite]]

_TOOL = re.compile(r'"tool": "(\w+)"')
WRONG_KEYS = ("uri", "handle", "subject")
"""Keys that no convention of a shipped task knows."""


def shuffled(hints: Sequence[str], seed: int) -> HintControl:
    """Give each site the hint of another tool: right words, for another turn.

    Args:
        hints: to draw from, such as those of the recorded hint sites.
        seed: of the drawing.
    """
    rng = random.Random(f"shuffled-hints:{seed}")

    def control(sites: Sequence[HintSite]) -> list[HintSite]:
        return [replace(site, hint=rng.choice(_of_other_tools(hints, site))) for site in sites]

    return control


def _of_other_tools(hints: Sequence[str], site: HintSite) -> list[str]:
    own = {*_TOOL.findall(site.hint), *_TOOL.findall(_last_shown_call(site))}
    shown = {hint: {*_TOOL.findall(hint)} for hint in hints}
    return [hint for hint in hints if shown[hint] and not own & shown[hint]]


def _last_shown_call(site: HintSite) -> str:
    """The call of the last demonstration, which is of the tool that the request asks for."""
    return next((m.content for m in reversed(site.state) if m.role == "assistant"), "")


def wrong(sites: Sequence[HintSite]) -> list[HintSite]:
    """Give each site a hint of the same form that shows nothing of today's API.

    Its examples are calls that the prompt demonstrates, so of the old convention, under a key
    which no tool has. A later turn's state still holds what the environment said before it.

    Example: `Hint: Use the key "uri". Example of a correct call: {"tool": "read", "uri": ...}`.
    """
    return [replace(site, hint=_wrong_hint(site)) for site in sites]


def _wrong_hint(site: HintSite) -> str:
    turns = zip(site.state, site.state[1:], strict=False)
    old_calls = {asked.content: said.content for asked, said in turns if said.role == "assistant"}
    if not old_calls:
        return hint_from_error(TurnError("", f'Use the key "{WRONG_KEYS[0]}".'))
    first = next(iter(old_calls.values()))
    shown = [(request, call) for request, call in demonstrations_in(site.hint)[1] if request]
    return hint_from_error(
        TurnError(
            kind="",
            message=f'Use the key "{_wrong_key(first)}".',
            example=_under_wrong_key(first),
            # A request that is not the prompt's is of a task with one convention, its call's.
            demonstrations=tuple(
                (request, _under_wrong_key(old_calls.get(request, call))) for request, call in shown
            ),
        )
    )


def _wrong_key(call: str) -> str:
    """Always the same key for the same tool, so that it could be learned."""
    return WRONG_KEYS[sum(map(ord, str(json.loads(call)["tool"]))) % len(WRONG_KEYS)]


def _under_wrong_key(old_call: str) -> str:
    # Not the hint's own example: a flag, a value or the form of a path is today's rule as well.
    call: Mapping[str, object] = json.loads(old_call)
    old = next(key for key in call if key != "tool")
    new = _wrong_key(old_call)
    return json.dumps({new if key == old else key: value for key, value in call.items()})


def empty(sites: Sequence[HintSite]) -> list[HintSite]:
    """No hint: SDPO is then a KL to the teacher's weights on the same tokens, and nothing else."""
    return [replace(site, hint="") for site in sites]


CONTROLS: Mapping[str, str] = MappingProxyType(
    {
        "shuffled": "the hint of another tool",
        "wrong_key": "a hint of the same form: the old call under a key that no tool has",
        "empty": "no hint at all",
    }
)


class ControlledHintsTrainer(ComposerReplicationTrainer):
    """The trainer with another hint at every site that SDPO takes."""

    hint_control: HintControl

    def _route(self, inputs: list[dict[str, object]], output: dict[str, Tensor]) -> list[HintSite]:
        return self.hint_control(super()._route(inputs, output))
