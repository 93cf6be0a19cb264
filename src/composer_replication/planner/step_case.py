"""`StepCase`: one micro-batch on one device as numbers; what formulas and simulation both read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TeacherKind = Literal["live", "ema", "frozen"]
OptimizerName = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "sgd", "adafactor"]


@dataclass(frozen=True, slots=True)
class StepCase:
    """One micro-batch on one device, in padded lengths.

    Example: the founding note's shape on its reference model:
        >>> StepCase(config, num_rollouts=2, prompt_tokens=768, completion_tokens=256)
    """

    model: Mapping[str, object]
    """The architecture, as `config.json` holds it."""
    num_rollouts: int = 0
    num_prompts: int = 1
    """Groups that the rollouts are of; each shares its prompt."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_sites: int = 0
    num_rollout_sites: int = 0
    """Of them, turns of the micro-batch's own rollouts: a tree has their state and action already,
    and their teacher's has each prompt once. Their state is at least a prompt."""
    state_tokens: int = 0
    """Of a hint site; the student's row is state and action, the teacher's has the hint too."""
    hint_tokens: int = 0
    action_tokens: int = 0
    num_pairs: int = 0
    pair_state_tokens: int = 0
    pair_action_tokens: int = 0
    teacher: TeacherKind = "ema"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    autocasts: bool = False
    """bf16 autocast around each forward, as accelerate wraps it."""
    optimizer: OptimizerName = "adamw_torch_fused"
    lora_r: int | None = None
    lora_targets: tuple[str, ...] | str = "all-linear"
    checkpoints: bool = False
    """Gradient checkpointing: a layer keeps its input alone and runs again in the backward."""
    accumulates: bool = False
    """A later micro-batch of its step: gradients are in memory before it starts."""
    executor: Literal["separate", "packed"] = "separate"
    """One forward for each role, or one for the tree of all rows."""
    tree_max_tokens: int | None = None
    """Most tokens of one forward of a tree; a larger one is cut into parts. None: no limit."""
    device_type: Literal["cpu", "cuda"] = "cpu"
    """Tiles and kernels differ; see `losses/head.py`."""
    has_flash: bool = True
    """The card runs torch's flash attention, which needs compute capability 8.0."""

    @property
    def casts_trained_weights(self) -> bool:
        """Whether autocast copies every weight to half precision: fp32 ones that are trained."""
        return self.autocasts and self.lora_r is None and self.weights_dtype == "float32"

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that have rows."""
        rows = {"grpo": self.num_rollouts, "sdpo": self.num_sites, "dpo": self.num_pairs}
        return tuple(name for name, num_rows in rows.items() if num_rows > 0)
