"""Draws the hint sites and pairs of the optimizer steps that one generation feeds."""

from collections.abc import Callable, Collection, Sequence

from composer_replication.batch.collate import ComposerDataCollator
from composer_replication.errors import ConfigError
from composer_replication.step.channels import CHANNELS
from composer_replication.traces.hints import HintSite
from composer_replication.traces.pairs import PreferencePair
from composer_replication.training.channel_plan import (
    MicroBatch,
    SumOverRanks,
    place_sites,
    plan_step,
    scheduled,
)
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.record_loader import RecordLoader, records_fingerprint
from composer_replication.training.whole_groups import PromptIds

Resample = Callable[[list[HintSite]], list[HintSite]]


class GenerationPlanner:
    """Which records each step trains on; its place is the two loaders' positions.

    Attributes:
        site_loader: over the given hint sites; None without any.
        pair_loader: over the given pairs; None without any.
        fingerprints: a hash of each loader's records, to tell whether a place is theirs.
    """

    def __init__(
        self,
        args: ComposerConfig,
        channels: Sequence[str],
        *,
        sites: Sequence[HintSite] | None,
        pairs: Sequence[PreferencePair] | None,
        rank: int,
        num_ranks: int,
        sum_over_ranks: SumOverRanks,
    ) -> None:
        """Keep the records.

        Args:
            args: how many records a step takes, and the schedule.
            channels: the extra channels that are on.
            sites: given hint sites; None where only rollouts give any.
            pairs: with their reference log-probs; None without the channel.
            rank: of this process.
            num_ranks: processes that draw from the same records.
            sum_over_ranks: adds counts up over the processes.

        Raises:
            ConfigError: an optimizer step that would span several generations.
        """
        _check_accumulation(args)
        self._args = args
        self._channels = tuple(channels)
        self._rank, self._num_ranks = rank, num_ranks
        self._sum_over_ranks = sum_over_ranks
        data = {CHANNELS[name].data for name in channels}
        self._needs_sites = "hint_sites" in data
        self.site_loader: RecordLoader[HintSite] | None = None
        self.pair_loader: RecordLoader[PreferencePair] | None = None
        if self._needs_sites and sites is not None:
            self.site_loader = RecordLoader(sites, args.seed)
        if "pairs" in data and pairs is not None:
            self.pair_loader = RecordLoader(pairs, args.seed)
        self.fingerprints = {
            name: records_fingerprint(loader.records) for name, loader in self.loaders().items()
        }

    def loaders(self) -> dict[str, RecordLoader[HintSite] | RecordLoader[PreferencePair]]:
        """The loaders that have records, by the name of their data."""
        loaders = {"hint_sites": self.site_loader, "pairs": self.pair_loader}
        return {name: loader for name, loader in loaders.items() if loader is not None}

    def choose(self, rollout_sites: Sequence[HintSite]) -> list[HintSite]:
        """The error turns of rollouts that a generation's steps have room for.

        Spread over the rollouts: neighbours are turns of one episode.
        """
        num_found = min(self._args.hint_sites_per_step * self._num_steps, len(rollout_sites))
        return [rollout_sites[i * len(rollout_sites) // num_found] for i in range(num_found)]

    @property
    def _num_steps(self) -> int:
        """Optimizer steps that one generation feeds."""
        args = self._args
        # Each further iteration over the same rollouts takes its own hint sites and pairs.
        per_generation = int(args.steps_per_generation or 1)
        return per_generation * args.num_iterations // args.gradient_accumulation_steps

    def plan(
        self,
        rollout_sites: Sequence[HintSite],
        collator: ComposerDataCollator,
        *,
        global_step: int,
        resample: Resample,
        prompts: Sequence[Collection[PromptIds]] | None = None,
    ) -> list[MicroBatch]:
        """Micro-batches for every optimizer step of a generation; all ranks call it together.

        Args:
            rollout_sites: error turns of this rank's rollouts, as `choose` gave them.
            collator: renders and aligns the records.
            global_step: optimizer steps done.
            resample: gives recorded sites an action of the policy.
            prompts: of the rollouts in each micro-batch of the generation; None: not known.
        """
        args = self._args
        accumulation = args.gradient_accumulation_steps
        num_steps = self._num_steps
        sites = self._sites(rollout_sites, resample) if self._needs_sites else []
        plan: list[MicroBatch] = []
        for index in range(num_steps):
            live = scheduled(self._channels, args.channel_schedule, global_step + index)
            data = {CHANNELS[name].data for name in live}
            own = None
            if prompts is not None:
                # Each further iteration walks through the same micro-batches once more.
                start = index * accumulation % len(prompts)
                own = prompts[start : start + accumulation]
            of_step = sites[index::num_steps] if "hint_sites" in data else []
            plan += plan_step(
                place_sites(of_step, own, accumulation),
                self._pairs() if "pairs" in data else [],
                collator=collator,
                channels=self._channels,
                sum_over_ranks=self._sum_over_ranks,
            )
        return plan

    def _sites(self, rollout_sites: Sequence[HintSite], resample: Resample) -> list[HintSite]:
        """Error turns of the rollouts first; the given hint sites fill what they leave."""
        wanted = self._args.hint_sites_per_step * self._num_steps
        sites = list(rollout_sites)
        if self.site_loader is None:
            return sites
        # Every rank moves its loader by the same amount, whatever its own rollouts gave.
        drawn = self.site_loader.take(wanted, rank=self._rank, num_ranks=self._num_ranks)
        recorded = drawn[: wanted - len(sites)]
        if self._args.hint_site_actions == "recorded" or not recorded:
            return sites + recorded
        return sites + resample(recorded)

    def _pairs(self) -> list[PreferencePair]:
        if self.pair_loader is None:
            return []
        return self.pair_loader.take(
            self._args.pairs_per_step, rank=self._rank, num_ranks=self._num_ranks
        )


def _check_accumulation(args: ComposerConfig) -> None:
    per_generation = int(args.steps_per_generation or 1)
    accumulation = args.gradient_accumulation_steps
    if per_generation % accumulation:
        raise ConfigError(
            f"steps_per_generation is {per_generation} and gradient_accumulation_steps is "
            f"{accumulation}. One optimizer step would span several generations, so the "
            "tokens of SDPO and the pairs of DPO could not be counted before it starts. Make "
            "steps_per_generation a multiple of gradient_accumulation_steps."
        )
