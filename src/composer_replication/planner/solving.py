"""`--solve KEY`: the largest value of a setting with which a run still fits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from pydantic import ValidationError

from composer_replication.config.grpo_keys import TRL_DEFAULTS
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError
from composer_replication.planner.candidate import Candidate, Place
from composer_replication.planner.memory import predict
from composer_replication.planner.plan import Planner
from composer_replication.planner.run_memory import RunMemory, run_memory
from composer_replication.planner.run_shape import RunShape

MAX_LENGTH = "max_length"
"""Tokens of every row: of rollouts, of the teacher's rows and of pairs."""

_LARGEST = 2**20


@dataclass(frozen=True, slots=True)
class Solved:
    """The largest value in one place.

    Example: `Solved(candidate, "max_length", 3120).text`.
    """

    candidate: Candidate
    key: str
    value: int | None
    """None: not even the smallest fits."""
    beyond: RunMemory | None = None
    """What the next larger value needs, or the smallest where none fits; None: no run takes it."""
    to_set: str = ""
    """What of the file sets it, where `key` is none of it."""

    @property
    def text(self) -> str:
        """One line for a reader."""
        place = self.candidate.place
        of = f"of {place.capacity_gib:.2f} GiB"
        obstacle = None if self.candidate.is_sharded else self.candidate.device_obstacle
        if obstacle is not None:
            return f"{place.label}: {obstacle}, whatever {self.key} is"
        if self.value is None:
            if self.beyond is None:
                return f"{place.label}: no {self.key} up to {_TRIED} makes a run"
            return (
                f"{place.label}: no {self.key} fits: the smallest takes "
                f"{self.beyond.peak_gib:.2f} {of}, most of it in the {self.beyond.phase_words}"
            )
        if self.value >= _LARGEST:
            return f"{place.label}: memory sets no limit to {self.key}"
        text = (
            f"{place.label}: {self.key} = {self.value} is the largest that fits, all else as it is"
        )
        if self.beyond is None:
            text += "; no run takes a larger one"
        elif self.beyond.peak_gib > place.capacity_gib:
            text += f"; the next needs {self.beyond.peak_gib:.2f} {of} in the "
            text += self.beyond.phase_words
        return text + (f". Set {self.to_set}" if self.to_set else "")


def solve(planner: Planner, key: str, candidates: list[Candidate]) -> list[Solved]:
    """The largest value of `key` for each candidate, whose runs are otherwise as configured.

    Raises:
        ConfigError: a key that is no whole number.
    """
    if key == MAX_LENGTH:
        return [_solved_length(planner.request.config, c) for c in candidates]
    _current(planner.request.config, key)
    return [_solved_value(planner, key, c) for c in candidates]


_TRIED = 64
"""Values among which the smallest that a run takes is looked for."""

_SHORTEST = 16
"""Tokens of the shortest row that is tried."""


def _solved_value(planner: Planner, key: str, candidate: Candidate) -> Solved:
    """The largest that fits, in steps of the smallest that a run takes: groups stay whole."""
    place = candidate.place

    def is_valid(value: int) -> bool:
        config = _with_value(planner.request.config, key, value)
        try:
            return config is not None and planner.shape(place, config) is not None
        except ConfigError:
            return False

    def memory(value: int) -> RunMemory | None:
        config = _with_value(planner.request.config, key, value)
        if config is None or not is_valid(value):
            return None
        return planner.candidate(place, config, predict).memory

    smallest = next((value for value in range(1, _TRIED + 1) if is_valid(value)), None)
    if smallest is None:
        return Solved(candidate, key, None)
    fits = _value_fits(planner, key, place)
    steps = _largest(lambda count: is_valid(count * smallest) and fits(count * smallest), 1)
    if steps is None:
        return Solved(candidate, key, None, memory(smallest))
    value = min(steps * smallest, _LARGEST)
    return Solved(candidate, key, value, memory(value + smallest))


def _solved_length(config: RunConfig, candidate: Candidate) -> Solved:
    place, shape = candidate.place, candidate.shape

    def memory(num_tokens: int) -> RunMemory:
        return run_memory(
            _with_rows_of(shape, num_tokens), max(place.num_gpus, 1), card_gib=place.capacity_gib
        )

    value = _largest(lambda length: memory(length).peak_gib <= place.capacity_gib, _SHORTEST)
    if value is None:
        return Solved(candidate, MAX_LENGTH, None, memory(_SHORTEST))
    to_set = _length_setting(config, shape, value)
    return Solved(candidate, MAX_LENGTH, value, memory(value + 1), to_set)


def _length_setting(config: RunConfig, shape: RunShape, num_tokens: int) -> str:
    """What makes every row as long as that."""
    if config.smoke.fixed_shapes is not None:
        return f"smoke.fixed_shapes = [{config.smoke.fixed_shapes[0]}, {num_tokens}]"
    if shape.verb == "smoke":
        return f"smoke.max_shape_tokens = {num_tokens}"
    case = _with_rows_of(shape, num_tokens).case
    prompts = f"prompts of at most {case.prompt_tokens} tokens"
    if case.completion_tokens < shape.case.completion_tokens:
        cut = f"grpo.max_completion_length = {case.completion_tokens}"
        return f"batch.max_context_tokens = {num_tokens} and {cut}, and take {prompts}"
    completions = f"completions of {case.completion_tokens}"
    return f"batch.max_context_tokens = {num_tokens}, and take {prompts} beside {completions}"


def _with_rows_of(shape: RunShape, num_tokens: int) -> RunShape:
    """The same run with every row as long as that."""
    case = shape.case
    completion = min(case.completion_tokens, num_tokens // 2)
    action = min(case.action_tokens, num_tokens // 4)
    hint = min(case.hint_tokens, num_tokens // 4)
    pair_action = min(case.pair_action_tokens, num_tokens // 2)
    longer = replace(
        case,
        prompt_tokens=num_tokens - completion,
        completion_tokens=completion,
        state_tokens=num_tokens - action - hint,
        action_tokens=action,
        hint_tokens=hint,
        pair_state_tokens=num_tokens - pair_action,
        pair_action_tokens=pair_action,
    )
    rollouts = replace(shape.rollouts, prompt_tokens=longer.prompt_tokens)
    evaluation = replace(shape.evaluation, prompt_tokens=longer.prompt_tokens)
    return replace(shape, case=longer, rollouts=rollouts, evaluation=evaluation)


def _value_fits(planner: Planner, key: str, place: Place) -> Callable[[int], bool]:
    def fits(value: int) -> bool:
        config = _with_value(planner.request.config, key, value)
        if config is None:
            return False
        candidate = planner.candidate(place, config, predict)
        return candidate.fits and candidate.device_obstacle is None

    return fits


def _largest(fits: Callable[[int], bool], smallest: int) -> int | None:
    """By doubling and then halving; what does not fit once never fits for a larger value."""
    if not fits(smallest):
        return None
    low = smallest
    while low < _LARGEST and fits(2 * low):
        low *= 2
    if low >= _LARGEST:
        return _LARGEST
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _current(config: RunConfig, key: str) -> None:
    """Refuse a key that no whole number could be the value of."""
    section, _, name = key.rpartition(".")
    value = _lookup(config.model_dump(), key)
    if section == "grpo" and value is None and name in TRL_DEFAULTS:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        known = f"{MAX_LENGTH}, grpo.per_device_train_batch_size, sdpo.sites_per_step"
        raise ConfigError(
            f"--solve {key}: its value is {value!r}, and only a whole number has a largest one "
            f"that fits. Give for example {known}."
        )


def _with_value(config: RunConfig, key: str, value: int) -> RunConfig | None:
    """The configuration with that value; None where it is out of the key's range."""
    table = config.model_dump(exclude_none=True)
    names = key.split(".")
    section = table
    for name in names[:-1]:
        section = cast("dict[str, object]", section.setdefault(name, {}))
    section[names[-1]] = value
    try:
        return RunConfig.model_validate(table)
    except ValidationError:
        return None


def _lookup(table: Mapping[str, object], key: str) -> object:
    found: object = table
    for name in key.split("."):
        if not isinstance(found, Mapping):
            return None
        found = cast("Mapping[str, object]", found).get(name)
    return found
