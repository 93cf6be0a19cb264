"""What an evaluation plays: prompts of a shipped task's split, of a data folder, or of a run."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from composer_replication.config.execution_sections import (
    MAX_CONCURRENCY,
    STEP_TIMEOUT_S,
    SmokeConfig,
)
from composer_replication.config.grpo_keys import grpo_count
from composer_replication.config.loading import load_config
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError, DataError, InputError
from composer_replication.experiments.evaluate import MAX_ACTION_TOKENS, MAX_TURNS
from composer_replication.experiments.judge_checks import find_judge
from composer_replication.experiments.run_data import load_run_data, shipped_data
from composer_replication.experiments.task_registry import SPLITS, find_task, task_rows
from composer_replication.runs.followed_run import FollowedRun
from composer_replication.traces.json_lines import Row
from composer_replication.traces.pairs import PreferencePair
from composer_replication.training.rewards import RewardFunction

HELDOUT_FOLDER = "heldout"
REPORT_FILE = "evaluation.json"


@dataclass(frozen=True, slots=True)
class EvaluationData:
    """Prompts, their environment, and the pairs whose margin is measured.

    Example: `task_data("call_format").label` -> `"call_format, heldout, seed 0"`.
    """

    label: str
    """Where the prompts come from."""
    task: str
    """Name of the environment, or of the reward function."""
    prompts: list[Row]
    pairs: list[PreferencePair]
    max_turns: int = MAX_TURNS
    """Of an episode; a run's own limit where it brings the data."""
    max_action_tokens: int = MAX_ACTION_TOKENS
    step_timeout_s: float = STEP_TIMEOUT_S
    max_concurrency: int = MAX_CONCURRENCY
    reward: RewardFunction | None = None
    """Judges episodes of one turn; None: the environment does."""

    @property
    def sha256(self) -> str:
        """Of the prompts and pairs: the same episodes have the same, wherever they were read."""
        pairs = [dataclasses.asdict(pair) for pair in self.pairs]
        text = json.dumps([self.task, self.prompts, pairs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def task_data(
    name: str,
    *,
    split: str = "heldout",
    seed: int = 0,
    num_episodes: int | None = None,
    knobs: Mapping[str, object] | None = None,
) -> EvaluationData:
    """Episodes of a shipped task, made from their seeds.

    Raises:
        ConfigError: no such task, split or knob.
        DataError: a number out of its range.
    """
    # Before it is spread over arguments, where a knob `split` would be the split.
    find_task(name).check_knobs(knobs or {})
    rows = task_rows(name, split, seed=seed, num_episodes=num_episodes, **(knobs or {}))
    shown = "".join(f", {key}={value}" for key, value in (knobs or {}).items())
    return EvaluationData(f"{name}, {split}, seed {seed}{shown}", name, rows.prompts, rows.pairs)


def folder_data(
    folder: Path | None,
    split: str,
    config: RunConfig | None = None,
    *,
    limits_of: RunConfig | None = None,
) -> EvaluationData:
    """Episodes of a data folder: of its `heldout/`, or of the folder itself for `train`.

    Args:
        folder: None: the data that ships with the package.
        split: `heldout` or `train`.
        config: of the run whose data it is: its environment and limits hold.
        limits_of: a run whose limits hold, and what judges it where the folder's manifest names no
            task; None: the defaults.

    Raises:
        DataError: no such folder or split, or a row that cannot be used.
        ConfigError: nothing names an environment.
    """
    root = shipped_data() if folder is None else folder
    if split not in (HELDOUT_FOLDER, "train"):
        raise ConfigError(
            f"--split is {split!r}; a data folder has {HELDOUT_FOLDER} and train. "
            f"{'Other splits are made of a shipped task: give --task.' if split in SPLITS else ''}"
        )
    source = load_run_data(str(root))
    data = source
    if split == HELDOUT_FOLDER:
        if not (root / HELDOUT_FOLDER).is_dir():
            raise DataError(
                f"{root} has no {HELDOUT_FOLDER}/ folder, so nothing in it was kept from training. "
                f"Add {HELDOUT_FOLDER}/prompts.jsonl, or give --task to evaluate a shipped task."
            )
        data = load_run_data(str(root / HELDOUT_FOLDER))
        if data.task is None:
            data = dataclasses.replace(data, task=source.task)
    settings = config or _limits_alone(limits_of, drops_judge=data.task is not None)
    has_limits = config is not None or limits_of is not None
    # The fixed shapes of a smoke are the smoke's alone.
    _, reward = find_judge(settings.model_copy(update={"smoke": SmokeConfig()}), data)
    label = f"{root}, {split}"
    if reward is not None:
        return EvaluationData(
            label,
            str(settings.rollout.reward),
            data.prompts,
            data.pairs,
            max_turns=1,
            max_action_tokens=grpo_count(settings.grpo, "max_completion_length"),
            reward=reward,
        )
    return EvaluationData(
        label,
        settings.rollout.environment or str(data.task),
        data.prompts,
        data.pairs,
        max_turns=settings.rollout.max_turns if has_limits else MAX_TURNS,
        max_action_tokens=settings.rollout.max_action_tokens if has_limits else MAX_ACTION_TOKENS,
        step_timeout_s=settings.rollout.step_timeout_s,
        max_concurrency=settings.rollout.max_concurrency,
    )


def _limits_alone(config: RunConfig | None, *, drops_judge: bool) -> RunConfig:
    """A configuration with the limits of another."""
    if config is None:
        return RunConfig()
    rollout = config.rollout
    if drops_judge:
        rollout = rollout.model_copy(update={"environment": None, "reward": None})
    return RunConfig().model_copy(update={"rollout": rollout, "grpo": config.grpo})


def run_data_of(place: str, split: str) -> EvaluationData:
    """The held-out episodes of the run whose directory was given as the model or as the data.

    Raises:
        InputError: no run directory, so nothing says what to play.
    """
    if not is_run_folder(place):
        raise InputError(
            f"Nothing says what {place} is to do: --task names a shipped task, --data a folder of "
            "yours, and a run directory as the model brings its own. Write for example "
            f"composer-replication evaluate {place} --task api_drift."
        )
    config = config_of_run(place)
    return folder_data(None if config.data is None else Path(config.data), split, config)


def config_of_run(place: str) -> RunConfig:
    """What the run was told whose directory that is."""
    return load_config(FollowedRun(Path(place).expanduser()).config_path, [])


def is_run_folder(place: str) -> bool:
    """Whether that is the directory of a run, which names its own data.

    Raises:
        InputError: it is that of an evaluation, which has neither a model nor data.
    """
    path = FollowedRun(Path(place).expanduser()).config_path
    if not path.is_file():
        return False
    if (path.parent / REPORT_FILE).is_file():
        raise InputError(
            f"{place} is what an evaluation wrote, so there is no model in it and no data. Give "
            f"the model that it measured; {path} names it."
        )
    return True
