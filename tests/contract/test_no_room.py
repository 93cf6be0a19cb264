"""A model whose weights are more than the machine has: every verb says so and loads nothing."""

import dataclasses
import json

import pytest

from composer_replication.cli import main
from composer_replication.experiments import evaluated_model, planned_run, trainer_setup
from composer_replication.planner.local_machine import this_machine

VERBS = {
    "smoke": ["smoke", "--model", "smollm2-135m"],
    "train": ["train", "run.toml"],
    "evaluate": ["evaluate", "smollm2-135m", "--task", "call_format"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_the_user_s_input_and_no_weight_is_read(verb, tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(this_machine(), memory_gib=0.4, cards=())
    monkeypatch.setattr(planned_run, "this_machine", lambda: small)

    def refuse(*_args, **_settings):
        raise AssertionError("the model was loaded")

    for module in (evaluated_model, trainer_setup):
        monkeypatch.setattr(module, "load_model", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('model = "smollm2-135m"\n[grpo]\nmax_steps = 1\n')
    out = tmp_path / "run"
    code = main([*VERBS[verb], "--out", str(out)])
    assert code == 2
    assert "smollm2-135m has no room here" in capsys.readouterr().err
    planned = json.loads((out / "planned.json").read_text())
    assert (planned["fits"], planned["capacity_gib"]) == (False, 0.4)
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
