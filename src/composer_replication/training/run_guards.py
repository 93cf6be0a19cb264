"""Stops a run that cannot learn, in words: what was seen, why it cannot work, what to change.

The guards read the rows that training logs. Those are in every checkpoint (`state.log_history`), so
a resumed run stops where the whole one would have stopped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from composer_replication.errors import TrainingError
from composer_replication.runs.checkpoint_folders import checkpoint_folders
from composer_replication.step.channels import CHANNELS
from composer_replication.training.channel_plan import scheduled
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.heldout_guard import last_good_checkpoint

FP16_OVERFLOWS = 20
"""Steps that loss scaling may overflow in a row while it halves its way from 65536 to below 1."""

FP32_EFFECT_FLOOR = 1e-6
HALF_EFFECT_FLOOR = 1e-3
"""Nats a token. On one text in two batch shapes SmolLM2-135M differs from itself by 0 in fp32 and
by 6e-5 to 8e-4 in bf16, depending on `sdpo.beta`; a hint moves it by 0.03 to 0.12."""

_WEIGHT_KEYS = {"sdpo": "alpha_sdpo", "dpo": "beta_replay"}

LogRow = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Guard:
    """One way in which a run cannot learn."""

    key: str
    """Of `[guards]`: how many steps in a row stop the run."""
    num_steps: int | None
    """0 or None: never."""
    is_bad: Callable[[LogRow], bool | None]
    """None where the row cannot tell: one of an evaluation, or without the rollouts' figures."""
    explain: Callable[[Sequence[LogRow]], str]
    """What the bad rows show, why it cannot work and what to change."""
    channel: str | None = None
    """The extra channel whose own steps count; None: every step counts."""
    is_collapse: bool = False
    """The policy has changed for the worse: a checkpoint from within is no place to go back to."""


class RunGuards(TrainerCallback):
    """Checks every guard whenever a row is logged.

    Raises from the training loop:
        TrainingError: a guard's steps are full.
    """

    def __init__(
        self, args: ComposerConfig, channels: Sequence[str], *, is_fp32: bool = True
    ) -> None:
        """Keep the guards that are on.

        Args:
            args: how many steps each waits for.
            channels: the extra channels that are on.
            is_fp32: the policy computes in fp32, so that equal texts score nearly equal.
        """
        self._channels = tuple(channels)
        self._schedule = args.channel_schedule
        floor = args.guard_effect_floor
        if floor is None:
            floor = FP32_EFFECT_FLOOR if is_fp32 else HALF_EFFECT_FLOOR
        guards = _guards(args, channels, floor) if args.guard_enabled else []
        self._guards = [guard for guard in guards if guard.num_steps]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Look at the row that was just logged and at those before it."""
        del control, kwargs
        if logs is None or "loss" not in logs:
            return
        for guard in self._guards:
            bad, steps = self._stretch(guard, state.log_history)
            if guard.num_steps and len(steps) >= guard.num_steps:
                folder = Path(str(args.output_dir))
                if guard.is_collapse:
                    last = last_good_checkpoint(folder, steps[0] - 1)
                else:
                    last = _last_checkpoint(folder)
                raise TrainingError(
                    f"Stopped at step {state.global_step} by guards.{guard.key}. "
                    f"{_span(steps)}, {guard.explain(bad)} {last} "
                    f"To go on regardless set guards.{guard.key} = 0 (in Python "
                    f"guard_{guard.key} = 0)."
                )

    def _stretch(self, guard: Guard, rows: Sequence[LogRow]) -> tuple[list[LogRow], list[int]]:
        """The bad rows at the end of the log, and the steps since they began that count."""
        bad: list[LogRow] = []
        if not guard.is_bad(rows[-1]):
            return bad, []
        first = len(rows)
        for index in range(len(rows) - 1, -1, -1):
            verdict = guard.is_bad(rows[index])
            if verdict is False:
                break
            if verdict:
                bad.append(rows[index])
                first = index
        # A row covers the steps since the one before it.
        begin = _step(rows[first - 1]) if first > 0 else 0
        steps = range(begin + 1, _step(rows[-1]) + 1)
        return bad[::-1], [step for step in steps if self._counts(guard, step)]

    def _counts(self, guard: Guard, step: int) -> bool:
        if guard.channel is None:
            return True
        return guard.channel in scheduled(self._channels, self._schedule, step - 1)


def _guards(args: ComposerConfig, channels: Sequence[str], effect_floor: float) -> list[Guard]:
    guards = [
        Guard("no_spread_steps", args.guard_no_spread_steps, _has_no_spread, _explain_no_spread),
        Guard(
            "entropy_steps",
            args.guard_entropy_steps,
            lambda row: _is_below(row, "entropy", args.guard_entropy_floor),
            lambda rows: _explain_entropy(rows, args.guard_entropy_floor),
            is_collapse=True,
        ),
        Guard(
            "short_steps",
            args.guard_short_steps,
            lambda row: _is_at_most(row, "completions/mean_length", args.guard_short_tokens),
            lambda rows: _explain_short(rows, args.guard_short_tokens),
            is_collapse=True,
        ),
        Guard(
            "repetition_steps",
            args.guard_repetition_steps,
            lambda row: _is_at_least(row, "completions/repetition", args.guard_repetition_share),
            _explain_repetition,
            is_collapse=True,
        ),
        Guard("cut_off_steps", args.guard_cut_off_steps, _is_cut_off, _explain_cut_off),
        Guard(
            "non_finite_steps", _non_finite_steps(args), _has_no_finite_norm, _explain_non_finite
        ),
        _no_data(args, "grpo", None),
        *(_no_data(args, name, name) for name in channels),
    ]
    if "sdpo" in channels:
        guards.append(
            Guard(
                "no_effect_steps",
                args.guard_no_effect_steps,
                lambda row: _has_no_effect(row, effect_floor),
                lambda rows: _explain_no_effect(rows, effect_floor),
                "sdpo",
            )
        )
    return guards


def _non_finite_steps(args: ComposerConfig) -> int | None:
    steps = args.guard_non_finite_steps
    return max(steps, FP16_OVERFLOWS) if steps and args.fp16 else steps


# ---- reading rows -------------------------------------------------------------------------------


def _number(row: LogRow, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else None


def _step(row: LogRow) -> int:
    step = row["step"]
    assert isinstance(step, int)
    return step


def _has_no_spread(row: LogRow) -> bool | None:
    share = _number(row, "frac_reward_zero_std")
    return None if share is None else share == 1.0


def _is_below(row: LogRow, name: str, floor: float) -> bool | None:
    value = _number(row, name)
    # Without a sampled token TRL's means are 0 and say nothing.
    return None if value is None or not row.get("tokens/grpo") else value < floor


def _is_at_most(row: LogRow, name: str, limit: float) -> bool | None:
    value = _number(row, name)
    return None if value is None else value <= limit


def _is_at_least(row: LogRow, name: str, limit: float) -> bool | None:
    value = _number(row, name)
    return None if value is None else value >= limit


def _is_cut_off(row: LogRow) -> bool | None:
    share = _number(row, "completions/clipped_ratio")
    return None if share is None else share == 1.0


def _has_no_finite_norm(row: LogRow) -> bool | None:
    norm = _number(row, "grad_norm")
    return None if norm is None else not math.isfinite(norm)


def _has_no_effect(row: LogRow, floor: float) -> bool | None:
    divergence = _number(row, "loss/sdpo")
    return None if divergence is None or not row.get("tokens/sdpo") else abs(divergence) < floor


# ---- words --------------------------------------------------------------------------------------


def _explain_no_spread(rows: Sequence[LogRow]) -> str:
    return (
        f"all rewards within every group were equal (mean reward {_range(rows, 'reward')}), so "
        "every advantage was 0 and GRPO had no gradient. Use tasks that the policy solves now and "
        "then, a reward with more levels, or more rollouts a prompt (grpo.num_generations); where "
        "the reward is at its maximum, the tasks are learned."
    )


def _explain_entropy(rows: Sequence[LogRow], floor: float) -> str:
    return (
        f"the mean entropy of a sampled token was {_range(rows, 'entropy')} nats, under "
        f"{floor:g}: the policy gives nearly the same rollout each time, so groups cannot differ "
        "and nothing new is tried. Go back to a checkpoint from before the collapse with a lower "
        "grpo.learning_rate, or add an entropy bonus (grpo.entropy_coef) or a KL term (grpo.beta)."
    )


def _explain_short(rows: Sequence[LogRow], limit: float) -> str:
    return (
        f"completions were {_range(rows, 'completions/mean_length')} tokens long on average, at "
        f"most {limit:g}: the policy ends its turn at once and says nothing that a reward could "
        "judge. Check that the reward does not favour an empty answer, go back to a checkpoint "
        "from before the collapse and lower grpo.learning_rate."
    )


def _explain_repetition(rows: Sequence[LogRow]) -> str:
    return (
        f"completions had said {_range(rows, 'completions/repetition')} of their 4-grams before: "
        "the policy runs in a loop. Go back to a checkpoint from before it with a lower "
        "grpo.learning_rate or alpha_sdpo, and a slower teacher (teacher = 'frozen') if it is live."
    )


def _explain_cut_off(rows: Sequence[LogRow]) -> str:
    return (
        "every completion was cut off at its token limit (mean length "
        f"{_range(rows, 'completions/mean_length')}), so no reward judged a finished action and "
        "nothing rewards ending a turn. Raise rollout.max_action_tokens and "
        "grpo.max_completion_length, or check that the chat template's end-of-turn token is the "
        "model's end-of-sequence token."
    )


def _explain_non_finite(rows: Sequence[LogRow]) -> str:
    return (
        f"the gradient's norm was {rows[-1]['grad_norm']}, and an update with it makes the weights "
        "nan. Lower grpo.learning_rate, use bf16 or fp32 instead of fp16, or look for a row with "
        "extreme log-probs; diagnostics.gradients_every = 1 says which channel it comes from."
    )


def _explain_no_effect(rows: Sequence[LogRow], floor: float) -> str:
    return (
        f"SDPO had tokens and its mean divergence was {_range(rows, 'loss/sdpo')} nats a token, "
        f"under {floor:g}: with and without the hint the model says the same, so no hint teaches "
        "anything. Check that hints are not empty and say what would have been right (an example "
        "call moves small models most), and that batch.truncation does not cut them; or set "
        "alpha_sdpo = 0."
    )


def _no_data(args: ComposerConfig, name: str, channel: str | None) -> Guard:
    unit = CHANNELS[name].unit

    def is_bad(row: LogRow) -> bool | None:
        # The loss is logged in the channel's own steps alone.
        has_turn = f"loss/{name}" in row
        return _number(row, f"{unit}/{name}") == 0 if has_turn else None

    def explain(rows: Sequence[LogRow]) -> str:
        del rows
        return f"no {unit} reached {name}, so it trained on nothing. {_how_to_feed(name)}"

    return Guard("no_data_steps", args.guard_no_data_steps, is_bad, explain, channel)


def _how_to_feed(name: str) -> str:
    data = CHANNELS[name].data
    if name == "grpo":
        return (
            "Every rollout was empty or masked: check the environment, and "
            "grpo.mask_truncated_completions."
        )
    weight = _WEIGHT_KEYS.get(name, f"channels.{name}")
    feed = {
        "hint_sites": "No rollout had an error turn and no hint site was given; give hint_sites",
        "pairs": "Every pair was dropped or none was given; give pairs",
        "rollouts": "Check the environment",
    }[data]
    return f"{feed}, or set {weight} = 0."


def _span(steps: Sequence[int]) -> str:
    """`Over steps 3 to 12 (10 steps)`, or fewer steps than lie between where channels alternate."""
    if len(steps) == 1:
        return f"In step {steps[0]}"
    own = "" if steps[-1] - steps[0] + 1 == len(steps) else " of the channel's own"
    return f"Over steps {steps[0]} to {steps[-1]} ({len(steps)}{own})"


def _range(rows: Sequence[LogRow], name: str) -> str:
    """Smallest and largest value over the rows that have it."""
    values = [value for row in rows if (value := _number(row, name)) is not None]
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _last_checkpoint(output_dir: Path) -> str:
    found = checkpoint_folders(output_dir)
    return f"The last checkpoint is {found[0].name}." if found else "There is no checkpoint."
