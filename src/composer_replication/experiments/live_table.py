"""The few numbers that matter, a row a step, and one plain sentence about each that looks odd."""

from rich.console import Console

from composer_replication.training.metrics import MetricsRow

COLUMNS = (
    ("step", "step", "{:>4.0f}"),
    ("reward", "reward", "{:>7.3f}"),
    ("grpo", "loss/grpo", "{:>9.2e}"),
    ("sdpo", "loss/sdpo", "{:>9.2e}"),
    ("dpo", "loss/dpo", "{:>7.4f}"),
    ("grad", "grad_norm", "{:>7.3f}"),
    ("tokens", "tokens/sdpo", "{:>6.0f}"),
    ("pairs", "pairs/dpo", "{:>5.0f}"),
    ("sec", "step_s", "{:>6.2f}"),
    ("GiB", "peak_gib", "{:>6.2f}"),
)
# On-policy GRPO's loss is the mean advantage, 0 up to rounding; below this it says nothing.
NEAR_ZERO_LOSS = 1e-3
# Above this share of rollouts cut off at their limit, rewards judge unfinished actions.
MANY_CUT_OFF = 0.5


class LiveTable:
    """Prints rows as steps finish; each remark appears once."""

    def __init__(self, console: Console, *, is_sampled: bool = True) -> None:
        """Keep where rows go.

        Args:
            console: shows them.
            is_sampled: False for rows of fixed shape, whose lengths say nothing.
        """
        self._console = console
        self._is_sampled = is_sampled
        self._remarked: set[str] = set()
        self._has_header = False

    def add(self, row: MetricsRow) -> None:
        """Show one step."""
        if not self._has_header:
            self._has_header = True
            widths = [len(form.format(0.0)) for _, _, form in COLUMNS]
            titles = [f"{title:>{w}}" for (title, _, _), w in zip(COLUMNS, widths, strict=True)]
            self._console.print(" ".join(titles), style="bold", highlight=False, soft_wrap=True)
        self._console.print(
            " ".join(_cell(row, name, form) for _, name, form in COLUMNS),
            highlight=False,
            soft_wrap=True,
        )
        for key, sentence in remarks(row, is_sampled=self._is_sampled).items():
            if key not in self._remarked:
                self._remarked.add(key)
                self._console.print(
                    f"     {sentence}", style="dim", highlight=False, soft_wrap=True
                )


def remarks(row: MetricsRow, *, is_sampled: bool = True) -> dict[str, str]:
    """One sentence for each number of a row that looks odd, by a stable key."""
    found: dict[str, str] = {}
    grpo = _number(row, "loss/grpo")
    if grpo is not None and abs(grpo) < NEAR_ZERO_LOSS:
        found["grpo_near_zero"] = (
            "loss/grpo is near 0: normal on-policy, where advantages sum to 0; "
            "look at reward and grad."
        )
    if _number(row, "frac_reward_zero_std") == 1.0:
        found["no_spread"] = (
            "every group's rewards were equal this step, so GRPO moved nothing; "
            "easier tasks or more rollouts a prompt help."
        )
    if _number(row, "tokens/sdpo") == 0:
        found["no_hinted_tokens"] = "no error turn and no hint site this step: SDPO was 0."
    if _number(row, "pairs/dpo") == 0:
        found["no_pairs"] = "no pair this step: DPO was 0."
    clipped = _number(row, "completions/clipped_ratio")
    if is_sampled and clipped is not None and clipped > MANY_CUT_OFF:
        found["cut_off"] = (
            f"{clipped:.0%} of the rollouts were cut off at their token limit; "
            "raise rollout.max_action_tokens."
        )
    return found


def _number(row: MetricsRow, name: str) -> float | None:
    value = row.get(name)
    return None if value is None or isinstance(value, str) else float(value)


def _cell(row: MetricsRow, name: str, form: str) -> str:
    value = _number(row, name)
    return f"{'-':>{len(form.format(0.0))}}" if value is None else form.format(value)
