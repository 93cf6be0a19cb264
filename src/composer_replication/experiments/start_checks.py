"""The checks that need the starting weights, where teacher and reference equal the policy."""

import time
from collections.abc import Mapping, Sequence
from typing import cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from composer_replication.experiments.channel_probe import undisturbed
from composer_replication.experiments.hint_check import (
    check_hint_effect,
    distinct_hints,
    require_two_hints,
)
from composer_replication.experiments.reference_check import check_references
from composer_replication.runs.summary import Check
from composer_replication.traces.hints import HintSite
from composer_replication.training.rollouts import EnvironmentRollouts, Prompt
from composer_replication.training.trainer import ComposerReplicationTrainer

PROMPTS_PLAYED = 32
"""Episodes at most that are played for hints where the data records none."""


class StartChecks(TrainerCallback):
    """Runs `hint_effect` and `dpo_reference` when the model is prepared and no step was made.

    Attributes:
        checks: the verdicts; a channel that is off has none.
        sites: with different hints, for the checks after training.
        seconds: that the checks took.
    """

    def __init__(self, trainer: ComposerReplicationTrainer) -> None:
        self._trainer = trainer
        self.checks: list[Check] = []
        self.sites: list[HintSite] = []
        self.seconds = 0.0
        trainer.add_callback(self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Check; the run that follows is the same as without.

        Raises:
            DataError: fewer than two different hints.
        """
        del args, state, control, kwargs
        trainer = self._trainer
        started_s = time.perf_counter()
        with undisturbed(trainer):
            if "sdpo" in trainer.channel_weights:
                self.sites = sites_of_run(trainer)
                self.checks.append(check_hint_effect(trainer, self.sites))
            if "dpo" in trainer.channel_weights:
                self.checks.append(check_references(trainer))
        self.seconds = time.perf_counter() - started_s


def sites_of_run(trainer: ComposerReplicationTrainer) -> list[HintSite]:
    """The run's sites of different hints: recorded ones, or error turns of episodes played now.

    Raises:
        DataError: fewer than two different hints.
    """
    assert trainer.planner is not None
    if trainer.planner.site_loader is not None:
        return require_two_hints(trainer.planner.site_loader.records, "The data")
    return require_two_hints(_error_turns(trainer), "What the policy did in its first episodes")


def _error_turns(trainer: ComposerReplicationTrainer) -> list[HintSite]:
    """Error turns of as many episodes as give two hints, played beside the run."""
    # Episodes leave marks in their environments, and those of the run must stay as they are.
    rollouts = cast(EnvironmentRollouts, trainer.rollout_func).fresh()
    rows = cast(Sequence[Mapping[str, object]], trainer.train_dataset)
    num_prompts = min(PROMPTS_PLAYED, len(rows))
    batch_size = trainer._composer_args.per_device_train_batch_size
    sites: list[HintSite] = []
    for start in range(0, num_prompts, batch_size):
        stop = min(start + batch_size, num_prompts)
        prompts = [cast(Prompt, rows[index]["prompt"]) for index in range(start, stop)]
        played = rollouts(prompts, trainer)["rollout_hint_sites"]
        sites += [site for episode in played for site in episode]
        if len(distinct_hints(sites)) > 1:
            break
    return sites
