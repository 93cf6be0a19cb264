import pytest

import composer_replication.launch.bundle as bundle_module
from composer_replication.config.loading import load_config
from composer_replication.errors import ConfigError
from composer_replication.launch.bundle import bundle


def test_what_a_run_reads_here_travels_and_is_named_where_it_lies_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "prompts.jsonl").write_text("{}")
    (tmp_path / "letters.py").write_text("class Even: ...")
    (tmp_path / "run.toml").write_text(
        'data = "rows"\nmodel = "org/model"\n[rollout]\nenvironment = "letters:Even"\n'
    )
    config = load_config(tmp_path / "run.toml", ["seed=3"])
    packed = bundle(tmp_path / "run.toml", ["seed=3"], config)
    assert set(packed.files) == {"config.toml", "data/prompts.jsonl", "letters.py"}
    assert packed.arguments == ("config.toml", "--set", "seed=3", "--set", 'data="data"')


def test_a_model_folder_travels_and_one_that_is_too_large_does_not(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 100)
    config = load_config(None, [f'model="{tmp_path / "model"}"'])
    assert bundle(None, [], config).files == {"model/weights": b"x" * 100}
    monkeypatch.setattr(bundle_module, "MAX_FILE_BYTES", 99)
    with pytest.raises(ConfigError, match="Put it on the Hugging Face hub"):
        bundle(None, [], config)


def test_a_data_folder_that_is_not_here_is_refused():
    config = load_config(None, ['data="nowhere"'])
    with pytest.raises(ConfigError, match="which is no folder on this machine"):
        bundle(None, [], config)
