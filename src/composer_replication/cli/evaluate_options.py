"""What `evaluate` was asked for: its options checked, as a table, and as arguments of a job."""

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_replication.cli.launching import MODAL_PREFIX
from composer_replication.cli.verb import whole_number
from composer_replication.errors import InputError

if TYPE_CHECKING:
    from composer_replication.experiments.evaluation import EvaluationRequest
    from composer_replication.experiments.evaluation_data import EvaluationData


@dataclass(frozen=True, slots=True)
class AskedEvaluation:
    """The options of one evaluation, checked as far as they stand alone.

    Example: `asked_evaluation(options).request(data)`.
    """

    model: str
    against: str | None
    task: str | None
    data: Path | None
    split: str
    num_episodes: int | None
    """Prompts of the task; None: its own number."""
    max_turns: int | None
    """None: the data's own limit."""
    max_action_tokens: int | None
    num_samples: int
    temperature: float
    seed: int
    knobs: dict[str, object]
    """Of the task."""
    modal: tuple[str, ...]
    """`modal.KEY=VALUE`: overrides of `[modal]`."""

    def elsewhere(self, model: str, against: str | None, data: str | None) -> "AskedEvaluation":
        """The same with the paths that another machine has."""
        return replace(
            self, model=model, against=against, data=None if data is None else Path(data)
        )

    def episodes(self) -> "EvaluationData":
        """The prompts that are named, with the limits that were asked for.

        Raises:
            InputError: nothing names them, or what does cannot be used.
        """
        asked = {"max_turns": self.max_turns, "max_action_tokens": self.max_action_tokens}
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return replace(self._data(), **given)

    def _data(self) -> "EvaluationData":
        from composer_replication.experiments.evaluation_data import (
            config_of_run,
            folder_data,
            is_run_folder,
            run_data_of,
            task_data,
        )

        if self.task is not None:
            return task_data(
                self.task,
                split=self.split,
                seed=self.seed,
                num_episodes=self.num_episodes,
                knobs=self.knobs,
            )
        if self.data is None or is_run_folder(str(self.data)):
            return run_data_of(str(self.data or self.model), self.split)
        # A run that is measured played this kind of task, by its own limits.
        runs = [place for place in (self.model, self.against) if place and is_run_folder(place)]
        played = config_of_run(runs[0]) if runs else None
        return folder_data(self.data, self.split, limits_of=played)

    def request(self, data: "EvaluationData") -> "EvaluationRequest":
        """What is to be measured."""
        from composer_replication.experiments.evaluation import EvaluationRequest

        return EvaluationRequest(
            model=self.model,
            data=data,
            against=self.against,
            num_samples=self.num_samples,
            temperature=self.temperature,
            seed=self.seed,
        )

    def table(self, data: "EvaluationData") -> dict[str, object]:
        """What `config.toml` keeps; equal tables give equal results."""
        given = {
            "model": self.model,
            "against": self.against,
            "task": self.task,
            "data": None if self.data is None else str(self.data),
            "split": self.split,
            "episodes": self.num_episodes,
            "turns": self.max_turns,
            "action_tokens": self.max_action_tokens,
            "samples": self.num_samples,
            "temperature": self.temperature,
            "seed": self.seed,
            "prompts": data.sha256,
            "set": self.knobs or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def arguments(self) -> tuple[str, ...]:
        """What follows `evaluate` to ask for the same."""
        given = {
            "--against": self.against,
            "--task": self.task,
            "--data": self.data,
            "--split": self.split,
            "--episodes": self.num_episodes,
            "--turns": self.max_turns,
            "--action-tokens": self.max_action_tokens,
            "--samples": self.num_samples,
            "--temperature": self.temperature,
            "--seed": self.seed,
        }
        flags = [
            part
            for flag, value in given.items()
            if value is not None
            for part in (flag, str(value))
        ]
        knobs = [f"{name}={json.dumps(value)}" for name, value in self.knobs.items()]
        return (self.model, *flags, *(part for knob in knobs for part in ("--set", knob)))


def asked_evaluation(options: argparse.Namespace) -> AskedEvaluation:
    """The options of the verb.

    Raises:
        InputError: a value that cannot work, or two that exclude each other.
    """
    is_remote = options.on == "modal"
    modal = tuple(e for e in options.set if is_remote and e.startswith(MODAL_PREFIX))
    knobs = [each for each in options.set if each not in modal]
    if options.task is None:
        given = {"--episodes": options.episodes, "--set": knobs or None}
        for flag, value in given.items():
            if value is not None:
                raise InputError(
                    f"{flag} shapes the data that --task makes, and no --task was given. Add "
                    f"--task, or drop {flag}."
                )
    elif options.data is not None:
        raise InputError(
            "--task and --data were both given; the first makes prompts and the second reads them. "
            "Drop one."
        )

    def limit(flag: str, text: str | None, example: int) -> int | None:
        return None if text is None else whole_number(flag, text, default=example)

    return AskedEvaluation(
        model=options.model,
        against=options.against,
        task=options.task,
        data=options.data,
        split=options.split or "heldout",
        num_episodes=limit("--episodes", options.episodes, 64),
        max_turns=limit("--turns", options.turns, 8),
        max_action_tokens=limit("--action-tokens", options.action_tokens, 256),
        num_samples=whole_number("--samples", options.samples, default=4),
        temperature=_temperature(options.temperature),
        seed=_seed(options.seed),
        knobs=_knobs(knobs),
        modal=modal,
    )


def _knobs(assignments: list[str]) -> dict[str, object]:
    """`--set KEY=VALUE` with a number, truth value or text."""
    knobs: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise InputError(
                f"--set was given {assignment!r}; it is KEY=VALUE, one knob of the task. "
                "Write for example --set num_demos=1."
            )
        try:
            knobs[key] = json.loads(text)
        except ValueError:
            knobs[key] = text
    return knobs


def _temperature(text: str | None) -> float:
    try:
        value = 1.0 if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(
            f"--temperature is {text!r}; it divides logits and must be a number above 0. "
            "Greedy decoding is measured anyway. Write for example --temperature 0.6."
        )
    return value


def _seed(text: str | None) -> int:
    if text is not None and not text.isdecimal():
        raise InputError(f"--seed is {text!r}; it must be a whole number from 0 on, such as 1.")
    return int(text or 0)
