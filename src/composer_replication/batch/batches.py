"""The step batch: the rollouts, hint sites and pairs of one optimizer step."""

from dataclasses import dataclass

from composer_replication.errors import DataError
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair


@dataclass(frozen=True, slots=True)
class Rollout:
    """A fresh trace sampled from the policy, as token ids, with its advantage.

    Example: prompt `[1, 2]`, a sampled turn `[3, 4]`, a tool turn `[5]`, a sampled turn `[6]`:
        >>> Rollout((1, 2), (3, 4, 5, 6), (True, True, False, True), advantage=0.5, reward=1.0)
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    action_mask: tuple[bool, ...]
    """True where the policy sampled the token, False where the environment wrote it."""
    advantage: float
    """The reward minus its group's baseline."""
    reward: float = 0.0
    old_logp: tuple[float, ...] | None = None
    """Log-probs under the policy that sampled, per completion token; None: on-policy."""

    def __post_init__(self) -> None:
        lengths = {len(self.completion_ids), len(self.action_mask)}
        if self.old_logp is not None:
            lengths.add(len(self.old_logp))
        if len(lengths) != 1:
            raise DataError(
                f"A rollout has {len(self.completion_ids)} completion tokens, "
                f"{len(self.action_mask)} mask entries and "
                f"{None if self.old_logp is None else len(self.old_logp)} old log-probs; "
                "they must be equal in number."
            )
        if not self.prompt_ids:
            raise DataError("A rollout has an empty prompt, so its first token has no context.")


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one optimizer step trains on; a channel without data has an empty tuple.

    Example: `StepBatch(hint_sites=(site,), pairs=(pair,))`.
    """

    rollouts: tuple[Rollout, ...] = ()
    hint_sites: tuple[HintSite, ...] = ()
    pairs: tuple[PreferencePair, ...] = ()
