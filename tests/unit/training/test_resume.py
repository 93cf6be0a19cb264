"""A run that went on from a checkpoint equals one that never stopped, bit for bit."""

import itertools
import json

import pytest
import torch
from tiny_training import PAIRS, PROMPTS, SITES, run

from composer_replication.errors import CheckpointError, DataError
from composer_replication.runs.checkpoint_folders import checkpoint_defect, newest_checkpoint
from composer_replication.runs.step_rows import without_measurements

SAVE = {"save_strategy": "steps", "save_steps": 1, "hint_sites_per_step": 2, "pairs_per_step": 2}


def lora(**changes):
    from peft import LoraConfig

    values = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**(values | changes))


CASES = {
    "a generation for each step": ({}, 2),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, 2),
    "inside a generation": ({"steps_per_generation": 4, "per_device_train_batch_size": 2}, 1),
    "inside a second iteration": ({"num_iterations": 2, "steps_per_generation": 2}, 3),
    "between generations": ({"num_iterations": 2, "steps_per_generation": 1}, 2),
    "inside the second pass over the prompts": ({"prompts": PROMPTS[:3]}, 4),
    "at the end of a pass over the prompts": ({"prompts": PROMPTS[:3]}, 3),
    "resampled actions": ({"hint_site_actions": "resampled"}, 2),
    "channels that take turns": ({"channel_schedule": "alternate"}, 3),
    "a frozen teacher": ({"teacher": "frozen"}, 2),
    "a live teacher": ({"teacher": "live"}, 2),
    "LoRA with dropout": ({"peft_config": lambda: lora(lora_dropout=0.2)}, 2),
    "LoRA with an EMA teacher": ({"peft_config": lora, "teacher": "ema"}, 2),
    "extra channels off": ({"hint_sites": None, "pairs": None, "num_iterations": 2}, 1),
}


def options_of(changes):
    options = {**SAVE, "max_steps": 5, **changes}
    if callable(options.get("peft_config")):
        options["peft_config"] = options["peft_config"]()
    return options


def weights(trainer):
    """Policy and teacher; copies, since a teacher may be the policy."""
    state = {**trainer.model.state_dict()}
    if trainer.teacher is not None:
        state |= {f"teacher.{name}": tensor for name, tensor in trainer.teacher.state().items()}
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize(("changes", "step"), CASES.values(), ids=CASES)
def test_resuming_equals_not_having_stopped(build, tmp_path, changes, step):
    whole = build(**options_of(changes))
    rows = run(whole)
    torch.manual_seed(99)  # a restarted process has another random state
    again = build(**options_of(changes))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    resumed = [row for row in again.state.log_history if "loss" in row]
    assert list(map(without_measurements, resumed)) == list(map(without_measurements, rows))
    expected, found = weights(whole), weights(again)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_rollouts_that_wait_inside_a_generation_are_in_the_checkpoint(build, tmp_path):
    """Else the resumed run would generate anew and train four steps on other rollouts."""
    run(build(**options_of({"steps_per_generation": 4, "max_steps": 4})))
    for step, is_within in ((1, True), (3, True), (4, False)):
        path = tmp_path / "out" / f"checkpoint-{step}" / "composer_rank_0.pt"
        payload = torch.load(path, weights_only=True)
        assert payload["micro_step"] == step
        assert (payload["buffered_inputs"] is not None) == is_within
        assert bool(payload["plan"]) == is_within


@pytest.fixture
def checkpoint(build, tmp_path):
    """The checkpoint of a second step."""
    run(build(**SAVE, max_steps=2))
    return tmp_path / "out" / "checkpoint-2"


def test_a_checkpoint_of_another_trainer_is_refused(build, checkpoint):
    (checkpoint / "composer_state.json").unlink()
    with pytest.raises(DataError, match=r"no composer_state\.json"):
        build(**SAVE).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_with_a_damaged_file_is_refused(build, checkpoint):
    path = checkpoint / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"content of optimizer\.pt is not what was written"):
        build(**SAVE).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pairs": PAIRS[::-1]}, "other pairs"),
        ({"hint_sites": SITES[:3]}, "other hint_sites"),
        ({"prompts": PROMPTS[1:]}, "other prompts"),
    ],
)
def test_a_place_in_other_records_is_refused(build, checkpoint, changes, what):
    with pytest.raises(DataError, match=what):
        build(**SAVE, **changes).train(resume_from_checkpoint=str(checkpoint))


def test_another_number_of_processes_is_refused(build, checkpoint):
    path = checkpoint / "composer_state.json"
    payload = json.loads(path.read_text())
    path.write_text(json.dumps(payload | {"num_processes": 2}))
    (checkpoint / "complete.json").write_text('{"files": {}}')
    with pytest.raises(DataError, match="written by 2 processes and 1 resume it"):
        build(**SAVE).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(build, tmp_path, monkeypatch):
    """The disk is full when the second checkpoint's optimizer is written."""
    writes = itertools.count(1)
    save = torch.save

    def full(payload, path, *arguments, **options):
        if str(path).endswith("optimizer.pt") and next(writes) == 2:
            raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0")
        save(payload, path, *arguments, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step 2 could not be .* last .* checkpoint-1"):
        run(build(**SAVE, max_steps=3))
    out = tmp_path / "out"
    assert newest_checkpoint(out, pytest.fail).name == "checkpoint-1"
    assert not (out / ".incoming").exists()


def test_an_error_of_the_training_itself_is_not_taken_for_a_full_disk(build, monkeypatch):
    def broken(self, model, trial):
        raise RuntimeError("a bug")

    monkeypatch.setattr("transformers.Trainer._save_checkpoint", broken)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        run(build(**SAVE, max_steps=1))


def test_only_as_many_checkpoints_stay_as_asked_for(build, tmp_path):
    run(build(**SAVE, save_total_limit=2, max_steps=4))
    folders = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert folders == ["checkpoint-3", "checkpoint-4"]
    assert all(checkpoint_defect(tmp_path / "out" / name) is None for name in folders)
