"""What an executor hands to the channels: per-token and per-pair values of one forward pass.

Letters: B rollouts, C completion tokens, M action tokens over all hint sites, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn

from composer_replication.batch.collate import StepTensors
from composer_replication.step.settings import StepSettings, TeacherContext


@dataclass(slots=True)
class Scores:
    """Values with gradients to the policy; None where the batch or the request had no such rows."""

    policy_logp: Float[Tensor, "B C"] | None = None
    """Rollout tokens at the sampling temperature; 0 where the policy did not sample."""
    entropy: Float[Tensor, "B C"] | None = None
    """Nats, same positions."""
    divergence: Float[Tensor, " M"] | None = None
    """Nats, in the order of `sdpo_student_index`."""
    chosen_logp: Float[Tensor, " P"] | None = None
    """Summed over the action, at temperature 1."""
    rejected_logp: Float[Tensor, " P"] | None = None


class Executor(Protocol):
    """A way to compute `Scores`; every executor gives the same numbers.

    What it does with the sequences is its own: `separate` forwards each role, `packed` lays all out
    in one row, and layers that carry a state need one that walks `trie.PrefixTree` depth first.
    """

    def __call__(
        self,
        model: nn.Module,
        tensors: StepTensors,
        needs: frozenset[str],
        settings: StepSettings,
        teacher: TeacherContext | None,
    ) -> Scores:
        """Score the rows behind `needs`: any of `rollouts`, `hint_sites`, `pairs`."""
        ...


Count = Callable[[StepTensors], int]
