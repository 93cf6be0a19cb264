"""Single-turn tasks of the package reasoning-gym: about a hundred procedural question generators.

Reward 1 for an answer with the generator's full score, else 0: partial scores of some generators
reward any text at all. A question belongs to one split by its own hash, whatever its seed. Scorers
that would execute an answer, or that pay for any, are refused.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from composer_replication.environments.action_json import END_TOKENS
from composer_replication.environments.gym_scorers import evaluating_names
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.environments.spec_rows import read_spec
from composer_replication.errors import ConfigError, DataError, MissingDependencyError, nearest

SPLITS = ("train", "heldout")
_NUM_DRAWS = 24
"""Questions drawn for one task seed; about half of them belong to each split."""
_NO_ANSWERS = ("no such answer", "-7919.53", "[[]]")
"""What answers no question; a scorer that pays for one of them pays for guessing."""
_SYSTEM_TEXT = "You are a helpful AI assistant. Reply with the answer only."


_Entry = dict[str, Any]


class _Generator(Protocol):
    """What this adapter uses of a generator of reasoning-gym."""

    def __getitem__(self, index: int) -> _Entry: ...

    def score_answer(self, answer: str, entry: _Entry) -> float: ...


@dataclass(frozen=True, slots=True)
class GymSpec:
    """What a row of `prompts.jsonl` says about its question, besides `prompt`.

    Example: `GymSpec(task_seed=3, dataset="letter_counting", settings='{"max_words": 5}')`.
    """

    task_seed: int
    split: str = "train"
    dataset: str = "spell_backward"
    """Generator of reasoning-gym."""
    settings: str = "{}"
    """The generator's own settings, as a JSON object; its difficulty."""
    num_demos: int = 2
    """Answered questions before the one that is asked."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(
                f"The reasoning-gym task has no split {self.split!r}. {nearest(self.split, SPLITS)}"
            )
        if self.num_demos < 0:
            raise DataError(f"num_demos is {self.num_demos}; it must be 0 or more. Choose 0 or 2.")


@dataclass(frozen=True, slots=True)
class GymTask:
    """One question, its answer, and others that show how such questions are answered.

    Example: "Spell this word backward (example: sun -> nus): ammonia" with the answer "ainomma".
    """

    question: str
    answer: str
    demos: tuple[tuple[str, str], ...]
    example: tuple[str, str]
    """Another question and its answer: what a hint shows."""

    def prompt(self) -> list[dict[str, str]]:
        """The chat messages that a model gets."""
        messages = [{"role": "system", "content": _SYSTEM_TEXT}]
        for question, answer in self.demos:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": self.question}]


class ReasoningGym:
    """One question at a time; `reset` with a row of `prompts.jsonl` before anything else.

    Also TRL's `environment_factory`, with the one tool `answer`.
    """

    def reset(self, **row: object) -> None:
        """Ask the question that a row describes; the prompt is already in the row.

        Args:
            **row: the fields of `GymSpec`, and `prompt`, which must fit the seed.

        Raises:
            DataError: a field that is missing, unknown, of the wrong type, or a foreign prompt.
            ConfigError: no such generator, or settings that it does not take.
            MissingDependencyError: reasoning-gym is not installed.
        """
        spec = read_spec(row, GymSpec, "A reasoning-gym row")
        self._task = gym_task(spec)
        self._generator, (self._entry, *_) = _questions(spec)
        if row.get("prompt") is not None and row["prompt"] != self._task.prompt():
            raise DataError(
                f"The prompt of task_seed {spec.task_seed}, split {spec.split!r}, is not the one "
                "that this version of reasoning-gym makes. Make the data again with "
                "examples/make_task_data.py."
            )
        self._is_over = False
        self._is_right = False

    def get_reward(self) -> float:
        """1 if the first answer was right, else 0."""
        return float(self._is_right)

    def answer(self, text: str) -> str:
        """Answer the question.

        Args:
            text: the answer alone.

        Returns:
            A confirmation.
        """
        observation = self._step_text(text)
        if observation.error is not None:
            raise observation.error
        return observation.content

    def _step_text(self, action: str) -> Observation:
        """Judge the first answer; never raises on what a model wrote."""
        if self._is_over:
            error = ToolError("episode_over", "The episode is over.")
            return Observation(f"error: {error}", is_done=True, error=error)
        self._is_over = True
        self._is_right = is_right(self._generator, self._entry, action)
        if self._is_right:
            return Observation("ok", is_done=True)
        question, answer = self._task.example
        kind = "wrong_answer" if action.strip() else "no_answer"
        error = ToolError(kind, f'To "{question}" the answer is "{answer}".')
        return Observation(f"error: {error}", is_done=True, error=error)


def gym_task(spec: GymSpec) -> GymTask:
    """The task of a spec; the example is another question whose answer is wrong for this one."""
    generator, (asked, *further) = _questions(spec)
    found = {entry["question"]: entry["answer"] for entry in further}
    others = [pair for pair in found.items() if pair[0] != asked["question"]]
    demos = tuple(others[: spec.num_demos])
    # Of several right answers another question's may be one: a hint would give it away.
    wrong = (pair for pair in others[spec.num_demos :] if not is_right(generator, asked, pair[1]))
    example = next(wrong, None)
    if example is None:
        raise DataError(
            f"The generator {spec.dataset!r} with settings {spec.settings} has too few answers for "
            f"{spec.num_demos} demonstrations and a hint at task_seed {spec.task_seed}. Lower "
            "num_demos, or widen the settings."
        )
    return GymTask(asked["question"], asked["answer"], demos, example)


def is_right(generator: _Generator, entry: _Entry, action: str) -> bool:
    """Whether an answer has the generator's full score; no answer text can make this raise."""
    text = action.strip()
    for token in END_TOKENS:
        text = text.removesuffix(token).rstrip()
    try:
        # Exactly 1: spell_backward adds up to a little more for the answer with text after it.
        return bool(text) and generator.score_answer(text, entry) == 1.0
    # Some generators parse the answer and raise on what is none.
    except (Exception, SystemExit):
        return False


@functools.lru_cache(maxsize=1024)
def _questions(spec: GymSpec) -> tuple[_Generator, list[_Entry]]:
    """The generator of a spec's seed, and its questions that belong to the spec's split."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise MissingDependencyError(
            "The task reasoning_gym needs the package reasoning-gym. "
            "Run: pip install 'composer-replication[reasoning-gym]'"
        ) from error
    name, names = spec.dataset, cast(Mapping[str, tuple[type, ...]], reasoning_gym.factory.DATASETS)
    if name not in names:
        raise ConfigError(f"reasoning-gym has no generator {name!r}. {nearest(name, names)}")
    evaluating = evaluating_names(names[name][0])
    if evaluating:
        raise ConfigError(
            f"The generator {name!r} judges answers with {' and '.join(evaluating)}, which can "
            "execute what a model wrote, in this process and with your rights. Choose another; "
            "docs/data.md says which are refused. Code is judged by hidden tests in a sandbox: "
            "docs/sandbox.md."
        )
    # A generator seeds its question i with seed + i: the ranges of two seeds must not meet.
    seed = spec.task_seed * _NUM_DRAWS
    try:
        settings = json.loads(spec.settings)
        made = reasoning_gym.create_dataset(name, size=_NUM_DRAWS, seed=seed, **settings)
        generator = cast(_Generator, made)
        entries = [generator[index] for index in range(_NUM_DRAWS)]
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"The generator {name!r} does not take settings = {spec.settings!r}: {error}. "
            "Give a JSON object of its own settings."
        ) from error
    wants_heldout = spec.split == "heldout"
    fitting = [entry for entry in entries if _is_heldout(entry["question"]) == wants_heldout]
    if not fitting:
        raise DataError(
            f"The generator {name!r} with settings {spec.settings} has no question for the split "
            f"{spec.split!r} at task_seed {spec.task_seed}. Widen its settings."
        )
    _check_scores(generator, fitting[0], spec)
    return generator, fitting


def _check_scores(generator: _Generator, entry: _Entry, spec: GymSpec) -> None:
    if not isinstance(entry["answer"], str) or not is_right(generator, entry, entry["answer"]):
        raise ConfigError(
            f"The generator {spec.dataset!r} stores no answer of full score at task_seed "
            f"{spec.task_seed}, so no hint and no pair could be made. Choose another."
        )
    paid = [text for text in _NO_ANSWERS if is_right(generator, entry, text)]
    if paid:
        raise ConfigError(
            f"The generator {spec.dataset!r} gives its full score at task_seed {spec.task_seed} to "
            f"the answer {paid[0]!r}, so every text would be rewarded and nothing learned. "
            "Choose another."
        )


def _is_heldout(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % 2 == 0
