"""What of a model, a run or an adapter travels to another machine, and what it is called there."""

import json
import tomllib
from pathlib import Path

import pytest

import composer_replication.experiments.evaluation_bundle as evaluation_bundle
from composer_replication.config.loading import dump_config
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ModelError
from composer_replication.experiments.evaluation_bundle import pack_evaluation


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation_bundle, "check_evaluated_model", lambda _: None)


def write(path, content="x"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def pack(model, against=None, data=None, task="call_format"):
    notes = []
    packed = pack_evaluation(
        str(model), against, data, task, runs=Path("runs"), on_note=notes.append
    )
    return packed, notes


def test_a_name_stays_and_needs_no_file():
    packed, _ = pack("org/model", "smollm2-135m")
    assert (packed.model, packed.against, packed.data) == ("org/model", "smollm2-135m", None)
    assert packed.files == {}


def test_a_relative_path_stays_and_another_gets_a_folder_of_its_own(tmp_path):
    write("models/a/config.json")
    write("models/a/pytorch_model.bin")
    packed, _ = pack("models/a", str(tmp_path / "models/a"))
    assert (packed.model, packed.against) == ("models/a", "before/a")
    assert set(packed.files) == {
        *("models/a/config.json", "models/a/pytorch_model.bin"),
        *("before/a/config.json", "before/a/pytorch_model.bin"),
    }


def test_of_a_checkpoint_travels_what_holds_the_model(monkeypatch):
    write("first/config.toml", dump_config(RunConfig(data="/elsewhere")))
    for name in ("model.safetensors", "config.json", "optimizer.pt", "teacher.safetensors"):
        write(f"first/checkpoints/checkpoint-2/{name}")
    place = "first/checkpoints/checkpoint-2"
    monkeypatch.setattr(evaluation_bundle, "model_place", lambda given, note: note("old") or place)
    packed, notes = pack("first")
    assert packed.model == "first"
    assert set(packed.files) == {
        *("first/config.toml", "first/model/model.safetensors", "first/model/config.json"),
    }
    assert notes == ["old"]


def test_the_data_of_a_run_is_named_by_the_configuration_that_travels(tmp_path):
    write("first/model/config.json")
    write(tmp_path / "rows/heldout/prompts.jsonl")
    write("first/config.toml", dump_config(RunConfig(data=str(tmp_path / "rows"))))
    write("letters.py", "class Even: ...")
    packed, _ = pack("first", data=Path("first"), task="letters:Even")
    assert (packed.model, packed.data) == ("first", "first")
    config = tomllib.loads(packed.files["first/config.toml"].decode())
    assert config["data"] == "data/rows"
    assert {"data/rows/heldout/prompts.jsonl", "letters.py"} < set(packed.files)


def test_an_adapter_names_its_base_as_it_is_called_there(tmp_path, monkeypatch):
    write("base/config.json")
    for base, there in (("base", "base"), (str(tmp_path / "base"), "base/base")):
        write("adapter/adapter_config.json", json.dumps({"base_model_name_or_path": base}))
        packed, _ = pack("adapter")
        adapter = json.loads(packed.files["adapter/adapter_config.json"])
        assert adapter["base_model_name_or_path"] == there
        assert f"{there}/config.json" in packed.files
    monkeypatch.setenv("COMPOSER_CACHE", str(tmp_path))
    packed, _ = pack("adapter")
    adapter = json.loads(packed.files["adapter/adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "smollm2-135m"  # it is in the image


def test_a_run_without_a_model_is_refused():
    write("first/config.toml", dump_config(RunConfig()))
    with pytest.raises(ModelError, match="saved no model and no checkpoint"):
        pack("first")
