"""What the evidence compares: the arms, the tasks and their settings, and which run comes next.

An arm differs from the others in the keys it lists and in nothing else; a task's settings are the
same for every arm. Settings were chosen on the validation split, never on the held-out one.
"""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

import xxhash

from composer_replication.errors import ConfigError, nearest

DPO = "beta_replay"
SDPO = "alpha_sdpo"
MAIN_ARMS = ("grpo", "sdpo", "dpo", "all")
NUM_SEEDS_MAIN = 5
NUM_SEEDS_CONTROL = 3
TASKS = ("api_drift", "call_format")
FIRST_FRESH_SEED = 5
"""Held-out prompts of earlier seeds had been looked at before the settings were changed last."""
CHOICE_DRIFTS = (0, 1, 4, 7)
"""The settings of `api_drift` were chosen on validation prompts of these."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train.

    Example: `ARMS["grpo"].switches_off` -> `("alpha_sdpo", "beta_replay")`.
    """

    title: str
    """As the table calls it."""
    switches_off: tuple[str, ...] = ()
    """Channel weights that are 0; the others are the task's."""
    teacher: str | None = None
    """None: the task's."""
    control: str | None = None
    """A key of `hint_controls.CONTROLS`; None: the hints of the environment."""
    is_trained: bool = True


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "base": Arm("base model", is_trained=False),
        "grpo": Arm("GRPO", (SDPO, DPO)),
        "sdpo": Arm("GRPO + SDPO", (DPO,)),
        "dpo": Arm("GRPO + DPO", (SDPO,)),
        "all": Arm("GRPO + SDPO + DPO"),
        "shuffled_hint": Arm("GRPO + SDPO, shuffled hints", (DPO,), control="shuffled"),
        "wrong_hint": Arm("GRPO + SDPO, wrong hints", (DPO,), control="wrong_key"),
        "live_teacher": Arm("GRPO + SDPO, live teacher", (DPO,), teacher="live"),
        "ema_teacher": Arm("GRPO + SDPO, EMA teacher", (DPO,), teacher="ema"),
        "kl_to_ema": Arm("GRPO + KL to the EMA", (DPO,), teacher="ema", control="empty"),
    }
)
"""In the order of the table."""


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """How one task is trained and measured, the same for every arm."""

    knobs: Mapping[str, object]
    """Of the task's spec."""
    num_train: int
    """Training prompts."""
    num_heldout: int
    """Held-out prompts of the last evaluation."""
    num_curve: int
    """The first so many of them at each point of the curve."""
    curve_every: int
    """Optimizer steps between two points."""
    config: Mapping[str, object] = field(default_factory=dict[str, object])
    """Keys of a run's file."""
    num_tools: int | None = None
    """Of `api_drift`: how many of its eight tools prompts and pairs are about, half of them with
    pairs; None: all."""
    old_convention_every: int | None = None
    """After so many training prompts one of them comes once more and asks for the convention that
    the task replaced, which holds there; None: none does."""


_GRPO: Mapping[str, object] = MappingProxyType(
    {
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 84,
        "temperature": 0.6,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        # What all hints have in common adds up: "not as shown" in task A. At the usual 0.9 and 1e-8
        # Adam overshoots there, and rollouts lose the form of a call in the first steps.
        "adam_beta1": 0.3,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-4,
        "max_steps": 32,
        "save_strategy": "no",
    }
)

SETTINGS: Mapping[str, TaskSettings] = MappingProxyType(
    {
        "api_drift": TaskSettings(
            knobs={"num_spare_turns": 0, "num_hint_demos": 3},
            num_train=160,
            num_heldout=40,
            num_curve=16,
            curve_every=8,
            num_tools=4,
            old_convention_every=4,
            config={
                "model": "smollm2-135m",
                "alpha_sdpo": 1.0,
                "beta_replay": 0.1,
                "teacher": "frozen",
                "tree": "always",
                "grpo": {
                    **_GRPO,
                    # In order every step has a prompt of each tool and the old convention of one.
                    # Where a step lacks a tool, what the others teach spreads to it: a further key
                    # after each path.
                    "per_device_train_batch_size": 10,
                    "num_generations": 2,
                    "shuffle_dataset": False,
                },
                "sdpo": {
                    "beta": 0.0,
                    "temperature": 0.6,
                    "hint_placement": "demonstrate",
                    "sites_per_step": 10,
                },
                "dpo": {"pairs_per_step": 2},
                "rollout": {"max_turns": 2, "max_action_tokens": 36},
            },
        ),
        "call_format": TaskSettings(
            # With one shown call of the tool asked for, 29 % of the base model's calls are right.
            knobs={"num_matching_demos": 1, "num_hint_demos": 3},
            num_train=144,
            num_heldout=56,
            num_curve=28,
            curve_every=4,
            config={
                "model": "smollm2-135m",
                "alpha_sdpo": 1.0,
                "beta_replay": 0.05,
                "teacher": "frozen",
                "tree": "always",
                # Four more: so step 8, a point of the curve, is below a quarter of all tokens.
                "grpo": {**_GRPO, "max_steps": 36},
                "sdpo": {
                    "beta": 0.0,
                    "temperature": 0.6,
                    "hint_placement": "demonstrate",
                    "sites_per_step": 16,
                },
                "dpo": {"pairs_per_step": 1},
                "rollout": {"max_turns": 1, "max_action_tokens": 40},
            },
        ),
    }
)


def sampling_temperature(settings: TaskSettings) -> float:
    """Of rollouts, and so of the sampled evaluation."""
    grpo = cast(Mapping[str, float], settings.config["grpo"])
    return grpo["temperature"]


@dataclass(frozen=True, slots=True, order=True)
class EvidenceRun:
    """One cell of the table for one seed.

    Example: `EvidenceRun("api_drift", "all", 0).key` -> `"api_drift-all-s0"`.
    """

    task: str
    arm: str
    seed: int
    drift: int = 0
    """Of `api_drift`: 0 is the shipped drift."""

    @property
    def key(self) -> str:
        """Names the run's result file."""
        drift = f"-d{self.drift}" if self.drift else ""
        return f"{self.task}-{self.arm}-s{self.seed}{drift}"


_CHANNEL_KEYS = {SDPO: (SDPO, "sdpo", "teacher"), DPO: (DPO, "dpo")}
"""Of a run's file: what one channel alone reads."""


def fingerprint(task: str, arm: Arm, settings: TaskSettings) -> str:
    """A hash of all that a result depends on beside its seed; results of two are not mixed.

    Keys of a channel that the arm does not train are not among it.
    """
    unused = arm.switches_off if arm.is_trained else (SDPO, DPO)
    keys = {key for channel in unused for key in _CHANNEL_KEYS[channel]}
    config = {key: value for key, value in settings.config.items() if key not in keys}
    used = dataclasses.replace(settings, config=config)
    facts = [task, dataclasses.asdict(arm), dataclasses.asdict(used)]
    text = json.dumps(facts, sort_keys=True, default=dict)
    return xxhash.xxh3_64_hexdigest(text.encode())


def planned_runs() -> Iterator[EvidenceRun]:
    """Every run of the table, the most telling first.

    Under each seed task A and then task B, the main arms before the controls.
    """
    controls = [arm for arm in ARMS if arm not in ("base", *MAIN_ARMS)]
    first = ["base", "all", "grpo", "sdpo", "dpo"]
    for seed in range(NUM_SEEDS_MAIN):
        for task in TASKS:
            for arm in first + (controls if seed < NUM_SEEDS_CONTROL else []):
                yield EvidenceRun(task, arm, seed)


def next_runs(done: Collection[str], only: Mapping[str, str]) -> list[EvidenceRun]:
    """The runs that are still missing, in their order.

    Args:
        done: keys of the runs with a result.
        only: `task`, `arm`, `seed`, `drift` -> the values asked for, comma-separated. Runs outside
            the plan, such as another drift or a sixth seed, are made when they are asked for.

    Raises:
        ConfigError: an unknown filter, task or arm, or a seed that is no number.
    """
    known = {"task": TASKS, "arm": tuple(ARMS), "seed": None, "drift": None}
    asked: dict[str, list[str]] = {}
    for name, text in only.items():
        if name not in known:
            raise ConfigError(f"There is no filter {name!r}. {nearest(name, known)}")
        asked[name] = text.split(",")
        for value in asked[name]:
            _check_value(name, value, known[name])
    runs = list(planned_runs())
    if "seed" in asked or "drift" in asked:
        runs += [
            EvidenceRun(task, arm, int(seed), int(drift))
            for drift in asked.get("drift", ["0"])
            for seed in asked.get("seed", ["0"])
            for task in TASKS
            for arm in ARMS
            if task == "api_drift" or drift == "0"
        ]
    fits = [
        run
        for run in dict.fromkeys(runs)
        if all(str(getattr(run, name)) in values for name, values in asked.items())
    ]
    return [run for run in fits if run.key not in done]


def _check_value(name: str, value: str, known: tuple[str, ...] | None) -> None:
    if known is None and not value.isdecimal():
        raise ConfigError(
            f"{name} is {value!r}; it is a number from 0 on. Give one, or several with commas."
        )
    if known is not None and value not in known:
        raise ConfigError(f"There is no {name} {value!r}. {nearest(value, known)}")
