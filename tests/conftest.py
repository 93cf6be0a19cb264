"""Fixtures that every test may use: small real models, no network.

`HF_HUB_OFFLINE=0 pytest -m hub` runs the tests that need the hub.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# TRL's own telemetry goes through the hub's and obeys the same switch.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from composer_replication.training.embedded_model import embedded_model_dir
from composer_replication.training.model_source import hub_is_reachable

# Beside other test processes one thread each: two that wait for each other are slower.
NUM_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(NUM_THREADS)
# For the processes that tests start.
os.environ["OMP_NUM_THREADS"] = str(NUM_THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; nothing else is skipped."""
    reasons: dict[str, str | None] = {}
    for item in items:
        for name, find_reason in _SKIP_REASONS.items():
            if item.get_closest_marker(name) is None:
                continue
            if name not in reasons:
                reasons[name] = find_reason()
            if reasons[name] is not None:
                item.add_marker(pytest.mark.skip(reason=reasons[name]))


def _why_no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "there is no CUDA device"


def _why_no_modal() -> str | None:
    if importlib.util.find_spec("modal") is None:
        return "the package modal is not installed"
    has_token = "MODAL_TOKEN_ID" in os.environ or (Path.home() / ".modal.toml").is_file()
    return None if has_token else "there are no Modal credentials"


def _why_no_hub() -> str | None:
    return None if hub_is_reachable() else "HF_HUB_OFFLINE is set or the hub cannot be reached"


_SKIP_REASONS = {"cuda": _why_no_cuda, "modal": _why_no_modal, "hub": _why_no_hub}


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    """SmolLM2-135M-Instruct as safetensors; the first use on a machine takes about 20 s."""
    return embedded_model_dir()


@pytest.fixture(scope="session")
def smollm2_tokenizer(embedded_dir: Path) -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer, chat template included. Do not change it."""
    return AutoTokenizer.from_pretrained(embedded_dir)


@pytest.fixture(scope="session")
def tiny_llama(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama(dtype=torch.float32, seed=0, **config)`: 2 layers, random weights, eval mode."""

    def build(
        *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: object
    ) -> LlamaForCausalLM:
        settings = {
            "vocab_size": len(smollm2_tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": smollm2_tokenizer.bos_token_id,
            "eos_token_id": smollm2_tokenizer.eos_token_id,
            "pad_token_id": smollm2_tokenizer.pad_token_id,
            "attn_implementation": "sdpa",
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def tiny_model_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """A saved tiny Llama with SmolLM2's tokenizer, for whole runs in seconds. Do not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder
