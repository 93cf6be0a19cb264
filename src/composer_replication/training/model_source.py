"""Models by name: `smollm2-135m`, `shape:<name>`, a local directory or a Hugging Face hub id.

What cannot be trained here is refused from its configuration and tokenizer, before weights load.
"""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import transformers
from huggingface_hub import constants, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from composer_replication.errors import ModelError, nearest
from composer_replication.planner.model_files import (
    EMBEDDED_SPEC,
    REFERENCE_SPEC,
    SHAPE_PREFIX,
    refuse_quantised,
    shipped_shapes,
)
from composer_replication.training.embedded_model import (
    EMBEDDED_LABEL,
    check_embedded_model,
    embedded_model_dir,
)
from composer_replication.training.model_weights import missing_weights, read_weights
from composer_replication.training.shape_models import (
    build_shape_model,
    shape_config,
)
from composer_replication.training.tokenizer_source import checked_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM that can be trained, with its tokenizer and what to call it.

    Example: `load_model("smollm2-135m").label == "SmolLM2-135M-Instruct (embedded)"`
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    """What to print; says so when the weights are random."""
    has_random_weights: bool
    spec: str
    """What the user gave."""
    had_weights: bool
    """False where reading the weights fetched them from the hub, so its time holds both."""


def load_model(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """The model and tokenizer that `spec` names, on the CPU and in eval mode.

    Args:
        spec: `smollm2-135m`, `shape:<name>`, a local directory or a hub id.
        dtype: of the weights; None means float32, the master weights that an optimizer needs.
        attn_implementation: passed on to transformers; None: `own_attention`.
        seed: of the random weights of a `shape:` model; the others ignore it.
        on_progress: receives one sentence for each slow thing that is about to happen.

    Raises:
        ModelError: the spec names nothing, or something that this framework cannot train.
        MissingDependencyError: the embedded model's package is not installed.
    """
    weight_dtype = torch.float32 if dtype is None else dtype
    files = _find(spec, on_progress)
    tokenizer = files.tokenizer(spec, on_progress)
    is_shape = spec.startswith(SHAPE_PREFIX)
    attention = attn_implementation or own_attention(files.config)
    if is_shape:
        model = build_shape_model(
            spec.removeprefix(SHAPE_PREFIX),
            tokenizer,
            dtype=weight_dtype,
            attn_implementation=attention,
            seed=seed,
        )
    else:
        model = read_weights(
            spec,
            files.location,
            is_local=files.is_local,
            dtype=weight_dtype,
            attn_implementation=attention,
        )
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return LoadedModel(model, tokenizer, model_label(spec), is_shape, spec, files.has_weights)


def own_attention(config: PreTrainedConfig) -> str:
    """The attention to compute a model with: torch's own kernel where it computes all of it.

    Soft-capped scores it does not: transformers refuses it for them, before 5.23 it forgot the cap.
    """
    model_class = cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if is_capped or not model_class._supports_sdpa else "sdpa"


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before its weights are read.

    Example: `model_facts("smollm2-135m").vocab_size == 49152`
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    """Rows of the embedding; ids from here on have none."""
    max_positions: int | None
    """Tokens of the longest row that the model was built for; None: it does not say."""
    config: PreTrainedConfig


def model_facts(spec: str, on_progress: Callable[[str], None] | None = None) -> ModelFacts:
    """The checked tokenizer and the limits of `spec`; the embedded model is converted if need be.

    Raises:
        ModelError: as `load_model`.
    """
    files = _find(spec, on_progress)
    config = files.config.get_text_config()
    return ModelFacts(
        tokenizer=files.tokenizer(spec),
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        config=files.config,
    )


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `spec`, with a chat template and a pad token (the end token if it has none).

    Raises:
        ModelError: as `load_model`.
    """
    return model_facts(spec).tokenizer


def check_model_spec(spec: str) -> None:
    """Raise what `load_model` would raise, from names, configuration and tokenizer alone.

    A hub id downloads its configuration and tokenizer; the embedded model is not converted.
    """
    if spec == EMBEDDED_SPEC:
        check_embedded_model()
    elif spec.startswith(SHAPE_PREFIX):
        shape_config(spec.removeprefix(SHAPE_PREFIX))
        check_embedded_model()
    else:
        _find(spec, None).tokenizer(spec)


def default_model_spec(device_type: str) -> tuple[str, str]:
    """The model to use when none was named, and a sentence that says why.

    Args:
        device_type: as in `torch.device(...).type`; only `cuda` gets the reference model.
    """
    if device_type != "cuda":
        return EMBEDDED_SPEC, f"{EMBEDDED_LABEL}, because there is no CUDA device."
    if is_cached(REFERENCE_SPEC):
        return REFERENCE_SPEC, f"{REFERENCE_SPEC}, the reference model, from the local hub cache."
    if hub_is_reachable():
        return REFERENCE_SPEC, f"{REFERENCE_SPEC}, the reference model, from the Hugging Face hub."
    return EMBEDDED_SPEC, (
        f"{EMBEDDED_LABEL}, because {REFERENCE_SPEC} is not in the local cache and the hub "
        f"{'is switched off (HF_HUB_OFFLINE)' if is_offline_mode() else 'cannot be reached'}."
    )


def model_label(spec: str) -> str:
    """What to print for a spec; a shape's label says that its weights are random."""
    if spec == EMBEDDED_SPEC:
        return EMBEDDED_LABEL
    if spec.startswith(SHAPE_PREFIX):
        return f"{spec.removeprefix(SHAPE_PREFIX)} shape (random weights)"
    return spec


def is_cached(repo_id: str) -> bool:
    """Whether the local hub cache holds a repository's configuration and all its weights."""
    config_path = try_to_load_from_cache(repo_id, "config.json")
    return isinstance(config_path, str) and missing_weights(Path(config_path).parent) is None


def hub_is_reachable(timeout_s: float = 2.0) -> bool:
    """Whether the hub answers in time; False at once when it is switched off."""
    if is_offline_mode():
        return False
    answers: list[int] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                answers.append(answer.status)
        except urllib.error.HTTPError as error:
            # A refusal is an answer: the hub is there.
            answers.append(error.code)
            error.close()
        except OSError:
            return

    # A name look-up ignores the time-out of its socket, so the wait is bounded from outside.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_s)
    return bool(answers)


@dataclass(frozen=True)
class _ModelFiles:
    """Where the files of a spec are, and the configuration found there."""

    location: str | Path
    """What `from_pretrained` reads."""
    is_local: bool
    """True when nothing is to be asked of the hub."""
    has_weights: bool
    """False where the weights are still to be fetched."""
    config: PreTrainedConfig

    def tokenizer(
        self, spec: str, on_progress: Callable[[str], None] | None = None
    ) -> PreTrainedTokenizerBase:
        """The checked tokenizer."""
        return checked_tokenizer(
            spec, self.location, self.config, is_local=self.is_local, on_progress=on_progress
        )


def _find(spec: str, on_progress: Callable[[str], None] | None) -> _ModelFiles:
    """The files of a spec with a checked configuration; converts the embedded model if need be."""
    if spec == EMBEDDED_SPEC:
        folder = embedded_model_dir(on_progress=on_progress)
        return _ModelFiles(folder, True, True, AutoConfig.from_pretrained(folder))
    if spec.startswith(SHAPE_PREFIX):
        config = shape_config(spec.removeprefix(SHAPE_PREFIX))
        return _ModelFiles(embedded_model_dir(on_progress=on_progress), True, True, config)
    local_folder = _local_folder(spec)
    # huggingface_hub retries for 23 s per file when there is no network; one question is quicker.
    is_local = local_folder is not None or not hub_is_reachable()
    folder = local_folder or _hub_snapshot(spec, is_local)
    config = _causal_lm_config(spec, folder)
    missing = missing_weights(folder)
    if missing is not None and is_local:
        raise ModelError(
            f"{spec}: {folder} has a config.json but lacks {missing}, so there are no weights to "
            "train. Copy or download the complete model."
        )
    return _ModelFiles(local_folder or spec, is_local, missing is None, config)


def _local_folder(spec: str) -> Path | None:
    """The directory that a spec names; None for what can only be a hub id."""
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{spec} holds a LoRA adapter without its base model, so there is nothing to load "
                "it into. Merge the adapter into its base model and give that directory."
            )
        raise ModelError(
            f"{spec} is a directory without a config.json, so it holds no model that transformers "
            "can read. Give the folder that `save_pretrained` wrote."
        )
    if path.is_file():
        raise ModelError(
            f"{spec} is a file; a model is a directory with a config.json. "
            "Give the folder it lies in."
        )
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ModelError(f"{spec}: there is no such directory. {_known_specs()}")
    return None


def _hub_snapshot(spec: str, is_local: bool) -> Path:
    """The hub cache's folder with the repository's config.json, downloaded unless `is_local`."""
    if "/" not in spec:
        hint = nearest(spec, [EMBEDDED_SPEC, *(SHAPE_PREFIX + name for name in shipped_shapes())])
        raise ModelError(f"{spec!r} is no model that this package knows. {hint} {_known_specs()}")
    try:
        return Path(hf_hub_download(spec, "config.json", local_files_only=is_local)).parent
    except HFValidationError as error:
        raise ModelError(f"{spec!r} is not a hub id: {error} {_known_specs()}") from error
    except GatedRepoError as error:
        raise ModelError(
            f"{spec} is gated: its owner wants its terms accepted first. "
            f"Accept them at {constants.ENDPOINT}/{spec} and run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{spec} is not on the Hugging Face hub, or is private. "
            "Check the spelling, or run `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"
        raise ModelError(
            f"{spec} is not in the local hub cache, and {why}. Download it where there is a "
            f"network (`hf download {spec}`), or train {EMBEDDED_SPEC}, which needs none."
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"{spec} has no config.json on the hub, so transformers cannot build the model (a GGUF "
            "or adapter repository?). Give the repository of the full weights."
        ) from error


def _causal_lm_config(spec: str, folder: Path) -> PreTrainedConfig:
    """The configuration in a folder, once it is known to be a decoder that predicts text."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{spec}: {folder / 'config.json'} is not a JSON object with a model_type "
            f"({type(error).__name__}: {error}). Write it with `save_pretrained` again."
        ) from error
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{spec} is of the type {model_type!r}, which transformers {transformers.__version__} "
            "does not know, and code from a model repository is not run. Use a newer transformers."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ModelError(
            f"{spec}: {folder / 'config.json'} describes no model that transformers can build "
            f"({' '.join(str(error).split())}). Correct it, or download it again."
        ) from error
    refuse_quantised(spec, getattr(config, "quantization_config", None))
    if config.is_encoder_decoder:
        raise ModelError(
            f"{spec} is an encoder-decoder model ({model_type}). Prompt and completion must be one "
            "sequence here: give a decoder-only model, such as Qwen2.5 or Llama."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{spec} ({model_type}) is not a causal language model that AutoModelForCausalLM can "
            "load, so it has no next-token probabilities to train. Give a text generation model."
        )
    return config


def _known_specs() -> str:
    """The sentence that tells what a model can be."""
    shapes = ", ".join(SHAPE_PREFIX + name for name in shipped_shapes())
    return f"A model is {EMBEDDED_SPEC}, {shapes}, a local directory or a hub id (owner/name)."
