"""The sections that watch a run: `[evaluation]`, `[diagnostics]` and `[guards]`."""

from pydantic import Field

from composer_replication.config.config_model import ConfigModel


class EvaluationConfig(ConfigModel):
    """`[evaluation]`: how a train run does on prompts that it is not trained on, while it runs."""

    every_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps between two evaluations on the `heldout/` folder of the data, greedy; one
    more before the first step and one after the last. They go into `heldout.jsonl`, to your
    trackers and to `guards.heldout_evaluations`. 0 or None: never."""
    prompts: int = Field(default=32, ge=1)
    """Of the held-out split, the first so many are played each time."""


class DiagnosticsConfig(ConfigModel):
    """`[diagnostics]`: what is measured beside training; none of it changes a weight."""

    gradients_every: int | None = Field(default=None, ge=0)
    """Steps between two measurements of each channel's own gradient: its norm, its share of the
    step's gradient and the cosines between channels, before clipping. Costs a backward pass a
    channel at those steps, and from the first of them on the memory of one gradient a channel: the
    trainable weights once more, in their own precision. Take an odd number under
    `batch.channel_schedule = "alternate"`, or one channel is never met. 0 or None: never."""
    credit_every: int | None = Field(default=None, ge=0)
    """Steps between two files `credit/step_000001.jsonl`, which say for every token of that step
    how much each channel pushes it. Costs a forward pass without gradient for each role of SDPO and
    DPO at those steps. Odd under `alternate`, as above. 0 or None: never."""


class GuardsConfig(ConfigModel):
    """`[guards]`: after how many steps in a row a run that cannot learn is stopped.

    A guard reads the logged rows, ends the run with what it saw and what to change, and names the
    last checkpoint. The smoke runs fewer steps than these defaults wait for, and has checks of its
    own.
    """

    enabled: bool = True
    """False turns every guard off at once."""
    no_spread_steps: int | None = Field(default=100, ge=0)
    """Steps in a row in which no group's rewards differed, so that GRPO had no gradient. 0 or None:
    never stops."""
    no_effect_steps: int | None = Field(default=100, ge=0)
    """SDPO's own steps in a row with hinted tokens whose mean divergence was under `effect_floor`,
    so that no hint told the policy anything. 0 or None: never stops."""
    effect_floor: float | None = Field(default=None, ge=0)
    """Nats a token; None: 1e-6 in fp32 and 1e-3 in bf16 and fp16, just above what two forwards of
    one text differ by."""
    no_data_steps: int | None = Field(default=100, ge=0)
    """A channel's own steps in a row without a single token or pair, though its weight is above 0.
    SDPO that only error turns feed runs dry when the policy stops erring: give it hint sites, or
    turn this off. 0 or None: never stops."""
    entropy_steps: int | None = Field(default=50, ge=0)
    """Steps in a row whose mean token entropy was under `entropy_floor`. 0 or None: never stops."""
    entropy_floor: float = Field(default=0.01, ge=0)
    """Nats a token. At 0.01 the likeliest token has a probability of about 0.999, so 19 of 20
    rollouts of 40 tokens are the same; small models start at 1 to 3."""
    short_steps: int | None = Field(default=20, ge=0)
    """Steps in a row whose mean completion was not longer than `short_tokens`. 0 or None: never
    stops."""
    short_tokens: float = Field(default=2.0, ge=0)
    """Tokens of a completion, its end-of-turn token included, that count as none at all."""
    repetition_steps: int | None = Field(default=50, ge=0)
    """Steps in a row whose completions repeated at least `repetition_share` of their 4-grams, on
    average. 0 or None: never stops."""
    repetition_share: float = Field(default=0.5, ge=0)
    """Share of a completion's 4-grams that it had said before: 0 for a JSON call, near 1 for a
    loop. Raise it where long answers repeat themselves by right, as tables do."""
    cut_off_steps: int | None = Field(default=200, ge=0)
    """Steps in a row in which every completion was cut off at its token limit. 0 or None: never
    stops."""
    non_finite_steps: int | None = Field(default=1, ge=0)
    """Steps in a row whose gradient norm was nan or infinite. Under fp16 at least 20, since its
    loss scaling finds its scale by overflowing. 0 or None: never stops."""
    heldout_evaluations: int | None = Field(default=2, ge=0)
    """Evaluations in a row whose held-out reward is under that of the best as many before them, by
    `heldout_drop` and by more than their noise, while the training reward rose.
    `evaluation.every_steps` makes them; a trainer in Python has them with `eval_dataset`, in at
    least two batches. 0 or None: never stops."""
    heldout_drop: float = Field(default=0.1, ge=0)
    """How far under the best evaluations counts as fallen, in units of the reward."""
