"""A model's tokenizer, with all that rendering and padding turns needs of it."""

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from composer_replication.errors import ModelError


def checked_tokenizer(
    spec: str,
    location: str | Path,
    config: PreTrainedConfig,
    *,
    is_local: bool,
    on_progress: Callable[[str], None] | None = None,
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, checked against its vocabulary, with a chat template and a pad token.

    Args:
        spec: what the user called the model.
        location: what `from_pretrained` reads.
        config: of the model.
        is_local: nothing is to be asked of the hub.
        on_progress: receives a sentence where the end token stands in for a missing pad token.

    Raises:
        ModelError: a tokenizer that cannot be read, or one that cannot render or pad turns.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, local_files_only=is_local)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{spec}: its tokenizer cannot be read ({error}). "
            "Save the tokenizer next to the model with `tokenizer.save_pretrained`."
        ) from error
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{spec}: its tokenizer has no chat template, so the turns of a trace cannot be "
            "rendered (is it a base model?). Give the instruct version, or save a chat_template "
            "with the tokenizer."
        )
    vocab_size = config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ModelError(
            f"{spec}: its tokenizer has {len(tokenizer)} tokens but the model's vocabulary is "
            f"{vocab_size}, so the last tokens have no embedding. "
            "Give the tokenizer that the model was trained with."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"{spec}: its tokenizer has neither a pad token nor an end token, so rows cannot "
                "be padded and a completion cannot end. Set eos_token and save the tokenizer again."
            )
        # Padding is masked everywhere, and a new token would need a new embedding row.
        tokenizer.pad_token = tokenizer.eos_token
        if on_progress is not None:
            on_progress(f"{spec} has no pad token; its end token {tokenizer.eos_token!r} pads.")
    return tokenizer
