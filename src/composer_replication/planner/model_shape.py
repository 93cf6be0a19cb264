"""`ModelShape`: the sizes of a decoder as its `config.json` gives them, and what follows from them.

Letters: V vocabulary, H hidden, Q all query heads, K all key-value heads, I intermediate.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from composer_replication.errors import ConfigError, ModelError

GATED_DECODERS = {
    # model_type: (bias on q, k, v; norms on q and k)
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}
"""Families whose memory and FLOPs the formulas give: dense, RMS norms, gated MLP."""

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a dense decoder.

    Example: Qwen2.5-0.5B has `num_parameters` 494,032,768.
    """

    vocab: int
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    is_tied: bool
    """The output head is the embedding."""
    has_qkv_bias: bool = False
    has_qk_norm: bool = False

    @property
    def q_dim(self) -> int:
        """Numbers in all query heads of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Numbers in all keys, or all values, of a token."""
        return self.num_kv_heads * self.head_dim

    @property
    def head_parameters(self) -> int:
        """Of the output head or the embedding."""
        return self.vocab * self.hidden

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix of a layer."""
        hidden, inner = self.hidden, self.intermediate
        return {
            "q_proj": (hidden, self.q_dim),
            "k_proj": (hidden, self.kv_dim),
            "v_proj": (hidden, self.kv_dim),
            "o_proj": (self.q_dim, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def layer_linear_parameters(self) -> int:
        """Of the matrices of one layer and their biases."""
        bias = self.q_dim + 2 * self.kv_dim if self.has_qkv_bias else 0
        return bias + sum(inputs * outputs for inputs, outputs in self.linear_sizes.values())

    @property
    def layer_parameters(self) -> int:
        """Of one layer, norms included."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.has_qk_norm else 0)
        return self.layer_linear_parameters + norms

    @property
    def num_parameters(self) -> int:
        """Of the model, a tied head counted once."""
        heads = self.head_parameters * (1 if self.is_tied else 2)
        return heads + self.num_layers * self.layer_parameters + self.hidden

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest matrix, head included."""
        return max(self.head_parameters, self.hidden * self.intermediate)

    def lora_layer_parameters(self, r: int, targets: tuple[str, ...] | str) -> int:
        """Of the adapters of rank `r` in one layer."""
        sizes = self.linear_sizes
        return sum(r * sum(sizes[name]) for name in adapted_linears(targets))


def check_targets(targets: tuple[str, ...] | str) -> None:
    """Refuse an adapter that would sit on nothing.

    Raises:
        ConfigError: targets of which a layer has none.
    """
    if not adapted_linears(targets):
        raise ConfigError(
            f"lora.target_modules is {list(targets)}, and a layer has none of them: it has "
            f"{', '.join(LINEAR_NAMES)}. Name some of those, or write 'all-linear'."
        )


def adapted_linears(targets: tuple[str, ...] | str) -> tuple[str, ...]:
    """The matrices of a layer that an adapter of these targets sits on."""
    if isinstance(targets, str):
        return LINEAR_NAMES
    return tuple(name for name in LINEAR_NAMES if name in targets)


def model_shape(config: Mapping[str, object]) -> ModelShape:
    """The sizes in a `config.json`.

    Raises:
        ModelError: a family that the formulas do not know, a size that is missing, or sizes that
            cannot go together.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in GATED_DECODERS:
        raise ModelError(
            f"The formulas know {', '.join(GATED_DECODERS)}, and this model's type is {family!r}: "
            "its layers hold other tensors, so a figure would be a guess. Measure it instead: "
            "composer-replication smoke --model M --steps 3."
        )
    has_bias, has_qk_norm = GATED_DECODERS[family]
    if family == "llama" and config.get("attention_bias"):
        has_bias = True
    hidden = _size(config, "hidden_size")
    num_heads = _size(config, "num_attention_heads")
    num_kv_heads = _size(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads != 0:
        raise ModelError(
            f"num_attention_heads is {num_heads} and num_key_value_heads {num_kv_heads}: query "
            "heads share keys in groups of one size, so the first must be a multiple of the "
            "second. Correct config.json."
        )
    if config.get("head_dim") is None and hidden % num_heads != 0:
        raise ModelError(
            f"hidden_size is {hidden} and num_attention_heads {num_heads}, which does not divide "
            "it, and there is no head_dim. Correct config.json."
        )
    return ModelShape(
        vocab=_size(config, "vocab_size"),
        hidden=hidden,
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_size(config, "head_dim", hidden // num_heads),
        intermediate=_size(config, "intermediate_size"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_qkv_bias=has_bias,
        has_qk_norm=has_qk_norm,
    )


def _size(config: Mapping[str, object], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(
            f"config.json gives {name} as {value!r}; it must be a whole number of at least 1, or "
            "no size of the model can be computed. Correct it, or download the file again."
        )
    return value
