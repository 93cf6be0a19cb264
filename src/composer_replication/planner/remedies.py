"""The smallest change of a run's settings that lets it fit somewhere."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from composer_replication.config.execution_sections import LoraConfig
from composer_replication.config.grpo_keys import grpo_count
from composer_replication.config.run_config import RunConfig

_TREE_TOKENS = (32_768, 16_384, 8_192, 4_096, 2_048)


@dataclass(frozen=True, slots=True)
class Change:
    """One change, as the file would say it.

    Example: `Change("grpo.gradient_checkpointing = true", config)`.
    """

    setting: str
    config: RunConfig


def smallest_change(config: RunConfig, fits: Callable[[RunConfig], bool]) -> Change | None:
    """The first change, from the least to the most that it changes training, after which it fits.

    Args:
        config: that does not fit.
        fits: whether a changed one does.
    """
    return next((change for change in _changes(config) if fits(change.config)), None)


def _changes(config: RunConfig) -> Iterator[Change]:
    """The same sums made slower, then smaller parts, shorter rows, less that is trained."""
    bases = [(config, "")]
    if not config.grpo.get("gradient_checkpointing"):
        checkpointed = _with_grpo(config, gradient_checkpointing=True)
        yield Change("grpo.gradient_checkpointing = true", checkpointed)
        bases.append((checkpointed, "grpo.gradient_checkpointing = true and "))
    for base, before in bases:
        yield from _cut_trees(base, before)
    for base, before in bases:
        yield from _smaller_parts(base, before)
        yield from _adapter(base, before)


def _cut_trees(config: RunConfig, before: str) -> Iterator[Change]:
    """Lower budgets of one forward, which change nothing where no tree is packed."""
    for tokens in _TREE_TOKENS:
        if tokens < (config.batch.tree_max_tokens or 2 * tokens):
            batch = config.batch.model_copy(update={"tree_max_tokens": tokens})
            changed = config.model_copy(update={"batch": batch})
            yield Change(f"{before}batch.tree_max_tokens = {tokens}", changed)


def _smaller_parts(config: RunConfig, before: str) -> Iterator[Change]:
    has_both = config.alpha_sdpo > 0 and config.beta_replay > 0
    if has_both and config.batch.channel_schedule == "every_step":
        batch = config.batch.model_copy(update={"channel_schedule": "alternate"})
        yield Change(
            f"{before}batch.channel_schedule = 'alternate'",
            config.model_copy(update={"batch": batch}),
        )
    rows, parts = (
        grpo_count(config.grpo, "per_device_train_batch_size"),
        grpo_count(config.grpo, "gradient_accumulation_steps"),
    )
    if rows % 2 == 0 and config.smoke.fixed_shapes is None:
        yield Change(
            f"{before}grpo.per_device_train_batch_size = {rows // 2} with "
            f"grpo.gradient_accumulation_steps = {parts * 2}",
            _with_grpo(
                config,
                per_device_train_batch_size=rows // 2,
                gradient_accumulation_steps=parts * 2,
            ),
        )
    if config.smoke.fixed_shapes is not None:
        num_rows, num_tokens = config.smoke.fixed_shapes
        if num_tokens >= 64:
            smoke = config.smoke.model_copy(update={"fixed_shapes": (num_rows, num_tokens // 2)})
            yield Change(
                f"{before}smoke.fixed_shapes = [{num_rows}, {num_tokens // 2}]",
                config.model_copy(update={"smoke": smoke}),
            )


def _adapter(config: RunConfig, before: str) -> Iterator[Change]:
    if config.lora is None:
        lora = LoraConfig()
        yield Change(f"{before}lora.r = {lora.r}", config.model_copy(update={"lora": lora}))
        if config.teacher not in (None, "frozen") and config.alpha_sdpo > 0:
            values = {"lora": lora, "teacher": "frozen"}
            yield Change(
                f"{before}lora.r = {lora.r} and teacher = 'frozen'",
                config.model_copy(update=values),
            )


def _with_grpo(config: RunConfig, **values: int | bool) -> RunConfig:
    return config.model_copy(update={"grpo": {**config.grpo, **values}})
