"""What a run sets by its device, where its file says nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from composer_replication.config.loading import load_config
from composer_replication.errors import ConfigError
from composer_replication.experiments import trainer_setup

FOLDERS = SimpleNamespace(checkpoints_dir="c", credit_dir="d", rollouts_dir="r")


@pytest.fixture
def settings(monkeypatch):
    """The values that TRL gets on a card, by what it can do and what the file says."""

    def of(*overrides, has_tf32=True):
        monkeypatch.setattr(trainer_setup, "_device_defaults", lambda: {"bf16": True})
        monkeypatch.setattr(trainer_setup, "_has_tf32", lambda: has_tf32)
        monkeypatch.setattr(trainer_setup, "ComposerConfig", lambda **values: values)
        config = load_config(None, list(overrides))
        return trainer_setup.composer_config(config, FOLDERS, {}, reference_cache=Path("cache"))

    return of


def test_a_run_in_bf16_has_tf32_for_what_stays_in_fp32(settings):
    assert settings()["tf32"] is True


@pytest.mark.parametrize(
    ("overrides", "has_tf32"),
    [(["grpo.bf16=false"], True), (["grpo.fp16=true"], True), ([], False)],
    ids=["a run in fp32", "a run in fp16", "a card before Ampere"],
)
def test_others_are_left_as_torch_has_them(settings, overrides, has_tf32):
    assert "tf32" not in settings(*overrides, has_tf32=has_tf32)


def test_the_file_has_the_last_word(settings):
    assert settings("grpo.tf32=false")["tf32"] is False


def test_a_cpu_has_no_tf32():
    assert trainer_setup._has_tf32() is False


def test_a_reference_that_no_file_holds_is_refused_before_anything_is_read():
    config = load_config(None, ["model=shape:qwen2.5-0.5b", "grpo.beta=0.1"])
    with pytest.raises(ConfigError, match=r"grpo\.beta is 0\.1 and the model is shape:qwen2\.5"):
        trainer_setup.prepare(config, FOLDERS, overrides={})
    with_adapter = load_config(None, ["model=shape:qwen2.5-0.5b", "grpo.beta=0.1", "lora.r=4"])
    trainer_setup._check_reference(with_adapter, "shape:qwen2.5-0.5b")
    trainer_setup._check_reference(config, "smollm2-135m")
