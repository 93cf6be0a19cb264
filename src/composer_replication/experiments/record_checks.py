"""Every prompt, hint site and pair rendered with the model's tokenizer, before its weights load.

What a chat template refuses, renders as nothing or makes too long is then a line of a file, and not
the step at which the record first comes up.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from composer_replication.batch.collate import ComposerDataCollator
from composer_replication.batch.render import render_state
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError, DataError, RecordTooLongError
from composer_replication.experiments.fixed_shapes import full_length_pairs, full_length_sites
from composer_replication.experiments.run_data import (
    PAIRS_FILE,
    PROMPTS_FILE,
    SITES_FILE,
    RunData,
)
from composer_replication.traces.row_reading import placed, require_state
from composer_replication.training.model_source import ModelFacts

MAX_RECORDS = 20_000
"""Records of each file that are rendered; short ones take 1 to 2 ms each."""
BUDGET_S = 30.0
"""Seconds for all of them together; what is left is checked when it comes up."""


@dataclass(slots=True)
class _Lengths:
    """Records over a limit: how many, and the longest."""

    limit: int
    num_over: int = 0
    longest: int = 0
    place: str = ""

    def add(self, num_tokens: int, place: str) -> None:
        """Count one more row."""
        if num_tokens > self.limit:
            self.num_over += 1
        if num_tokens > self.longest:
            self.longest, self.place = num_tokens, place


@dataclass(slots=True)
class _Clock:
    """When to stop, and what was left out."""

    ends_s: float
    left_out: list[str] = field(default_factory=list[str])

    def first(self, records: Sequence[object], file: str) -> Iterator[int]:
        """Indices of the records that there is time for; at least one."""
        for index in range(len(records)):
            if index == MAX_RECORDS or (index and time.perf_counter() > self.ends_s):
                self.left_out.append(f"{file} from row {index + 1} of {len(records)}")
                return
            yield index


def check_records(
    config: RunConfig, data: RunData, facts: ModelFacts, *, max_completion_length: int
) -> list[str]:
    """Render what this run reads, up to `MAX_RECORDS` a file and `BUDGET_S`.

    Args:
        config: of the run; a channel that is off reads no record.
        data: its records.
        facts: of the model; rows longer than its positions are refused.
        max_completion_length: tokens that a rollout adds to its prompt.

    Returns:
        A note where something was left out.

    Raises:
        DataError: a record that cannot be used; it names file and line.
        ConfigError: a limit that the rows do not fit.
    """
    if config.sdpo.top_k is not None and config.sdpo.top_k > facts.vocab_size:
        raise ConfigError(
            f"sdpo.top_k is {config.sdpo.top_k} and the model's vocabulary has {facts.vocab_size} "
            "tokens. Lower sdpo.top_k, or leave it out for the whole vocabulary."
        )
    if config.smoke.fixed_shapes is not None:
        check_row_length(config.smoke.fixed_shapes[1], facts, "smoke.fixed_shapes")
        return []
    if config.smoke.max_shape_tokens is not None:
        check_row_length(config.smoke.max_shape_tokens, facts, "smoke.max_shape_tokens")
    clock = _Clock(time.perf_counter() + BUDGET_S)
    _check_prompts(data, facts, max_completion_length, clock)
    reads_all = any(config.channels.values())
    collator = ComposerDataCollator(
        facts.tokenizer,
        hint_placement=config.sdpo.hint_placement,
        max_length=config.batch.max_context_tokens,
        truncation=config.batch.truncation,
        vocab_size=facts.vocab_size,
    )

    def site_length(index: int) -> int:
        _, teacher, _ = collator.site_rows(data.hint_sites[index])
        return len(teacher.token_ids)

    def pair_length(index: int) -> int:
        chosen, rejected, _ = collator.pair_rows(data.pairs[index])
        return max(len(chosen.token_ids), len(rejected.token_ids))

    if config.alpha_sdpo > 0 or reads_all:
        _check_rows(config, data, facts, SITES_FILE, data.hint_sites, site_length, clock)
    if config.beta_replay > 0 or reads_all:
        _check_rows(config, data, facts, PAIRS_FILE, data.pairs, pair_length, clock)
    if not clock.left_out:
        return []
    return [f"Not checked with the tokenizer, to start in time: {'; '.join(clock.left_out)}."]


def _check_prompts(
    data: RunData, facts: ModelFacts, max_completion_length: int, clock: _Clock
) -> None:
    lengths = _Lengths((facts.max_positions or 0) - max_completion_length)
    for index in clock.first(data.prompts, PROMPTS_FILE):
        place = data.place(PROMPTS_FILE, index)
        row = data.prompts[index]
        with placed(place):
            num_tokens = len(render_state(facts.tokenizer, require_state(row, "prompt")))
        lengths.add(num_tokens, place)
    if facts.max_positions is not None and lengths.num_over:
        raise DataError(
            f"{lengths.num_over} of {len(data.prompts)} prompts leave no room for "
            f"grpo.max_completion_length = {max_completion_length} within the model's "
            f"{facts.max_positions} positions; the longest, {lengths.place}, has {lengths.longest} "
            "tokens. Shorten or drop them, or lower grpo.max_completion_length."
        )


def _check_rows(
    config: RunConfig,
    data: RunData,
    facts: ModelFacts,
    file: str,
    records: Sequence[object],
    length_of: Callable[[int], int],
    clock: _Clock,
) -> None:
    limit = config.batch.max_context_tokens
    over_limit = _Lengths(0)
    over_positions = _Lengths(facts.max_positions or 0)
    for index in clock.first(records, file):
        place = data.place(file, index)
        with placed(place):
            try:
                num_tokens = length_of(index)
            except RecordTooLongError as error:
                over_limit.add(error.num_tokens, place)
                continue
        over_positions.add(num_tokens, place)
    if over_limit.num_over:
        truncation = config.batch.truncation
        remedy = "" if truncation == "middle" else ", set batch.truncation = 'middle'"
        kept = ", even without the middle of their states" if truncation == "middle" else ""
        raise DataError(
            f"{over_limit.num_over} of {len(records)} rows of {data.folder / file} are over "
            f"batch.max_context_tokens = {limit}{kept}; the longest, {over_limit.place}, has "
            f"{over_limit.longest} tokens. Set batch.max_context_tokens = {over_limit.longest}"
            f"{remedy}, or drop the rows."
        )
    if facts.max_positions is not None and over_positions.num_over:
        raise DataError(
            f"{over_positions.num_over} of {len(records)} rows of {data.folder / file} are longer "
            f"than the model's {facts.max_positions} positions; the longest, "
            f"{over_positions.place}, has {over_positions.longest} tokens. Set "
            f"batch.max_context_tokens = {facts.max_positions} and batch.truncation = 'middle', "
            "or drop the rows."
        )


def check_row_length(num_tokens: int, facts: ModelFacts, key: str) -> None:
    """Refuse rows too short for a template, a hint and an action, or longer than the positions.

    Raises:
        ConfigError: it names `key`, the setting that asks for that length.
    """
    if facts.max_positions is not None and num_tokens > facts.max_positions:
        raise ConfigError(
            f"{key} asks for rows of {num_tokens} tokens and the model has {facts.max_positions} "
            f"positions. Set at most {facts.max_positions} tokens."
        )
    try:
        full_length_sites(facts.tokenizer, num_tokens, 1)
        full_length_pairs(facts.tokenizer, num_tokens, 1)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
