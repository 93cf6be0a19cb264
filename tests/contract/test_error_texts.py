"""What a user reads after a mistake: the whole text, pinned, for a reviewer to read as one table.

Each says the value that was given, why it cannot work, and what to do; the exit code is 2, and the
model's weights were not loaded.
"""

import json
import shutil
from pathlib import Path

import pytest
from transformers import T5Config

from composer_replication.cli import main

SMOKE_TESTS = Path(__file__).parents[1] / "smoke"

STATE = [{"role": "user", "content": "Read /src/app.py."}]
PROMPT = {"prompt": STATE}
SITE = {"state": STATE, "hint": "Use the key file.", "action": '{"path": 1}', "source": "s1"}
OTHER_SITE = SITE | {"hint": "Its name is file.", "source": "s2"}
PAIR = {"state": STATE, "chosen": '{"file": 1}', "rejected": '{"path": 1}', "source": "p1"}
WITH_ACTION = [*STATE, {"role": "assistant", "content": '{"path": 1}'}]
LONG = [{"role": "user", "content": "word " * 100}]


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


# name: (options, changed files of the data folder, text)
MISTAKES = {
    "a model that nobody has": (
        ["--model", "smollm2-136m"],
        {},
        "'smollm2-136m' is no model that this package knows. Did you mean 'smollm2-135m'? A model "
        "is smollm2-135m, shape:qwen2.5-0.5b, shape:qwen2.5-1.5b, shape:qwen2.5-3b, "
        "shape:qwen2.5-7b, a local directory or a hub id (owner/name).",
    ),
    "a hub model without a network": (
        ["--model", "nobody/nothing"],
        {},
        "nobody/nothing is not in the local hub cache, and HF_HUB_OFFLINE is set. Download it "
        "where there is a network (`hf download nobody/nothing`), or train smollm2-135m, which "
        "needs none.",
    ),
    "an encoder-decoder": (
        ["--model", "{t5}"],
        {},
        "{t5} is an encoder-decoder model (t5). Prompt and completion must be one sequence here: "
        "give a decoder-only model, such as Qwen2.5 or Llama.",
    ),
    "a base model": (
        ["--model", "{base}"],
        {},
        "{base}: its tokenizer has no chat template, so the turns of a trace cannot be rendered "
        "(is it a base model?). Give the instruct version, or save a chat_template with the "
        "tokenizer.",
    ),
    "a hint site without an action": (
        [],
        {"hint_sites": [SITE, without(SITE, "action")]},
        "{data}/hint_sites.jsonl, line 2: there is no 'action' among its keys ('hint', 'source', "
        "'state'). Add it, as text.",
    ),
    "a state that holds the erring action": (
        [],
        {"hint_sites": [SITE | {"state": WITH_ACTION}]},
        "{data}/hint_sites.jsonl, line 1: Hint site 's1': the state ends with an assistant turn, "
        "'{{\"path\": 1}}'. That turn is an action; the state is what came before it.",
    ),
    "a teacher with an action of its own": (
        [],
        {"hint_sites": [SITE | {"teacher_action": '{"file": 1}'}]},
        "{data}/hint_sites.jsonl, line 1: the key 'teacher_action' cannot come from a row. Student "
        "and teacher score the same action, the one that erred. Give that one as 'action'; what "
        "would have been better goes into 'hint', or into a preference pair.",
    ),
    "a number that is none": (
        [],
        {"pairs": [PAIR, PAIR | {"weight": float("nan")}]},
        "{data}/pairs.jsonl, line 2: NaN is no number that training could use. Correct the value, "
        "or drop the row.",
    ),
    "a pair that prefers an action over itself": (
        [],
        {"pairs": [PAIR | {"rejected": PAIR["chosen"]}]},
        "{data}/pairs.jsonl, line 1: Pair 'p1' prefers '{{\"file\": 1}}' over itself: no gradient "
        "can come of it. Drop pairs whose two actions are equal.",
    ),
    "a channel without data": (
        [],
        {"pairs": None},
        "beta_replay is 0.05 and {data} has no pairs.jsonl (it has hint_sites.jsonl, "
        "prompts.jsonl), so that channel could never train. Add pairs, or set beta_replay = 0.",
    ),
    "rows over the limit": (
        ["--set", "batch.max_context_tokens=60"],
        {"hint_sites": [SITE, SITE | {"state": LONG}]},
        "1 of 2 rows of {data}/hint_sites.jsonl are over batch.max_context_tokens = 60; the "
        "longest, {data}/hint_sites.jsonl, line 2, has 144 tokens. Set batch.max_context_tokens = "
        "144, set batch.truncation = 'middle', or drop the rows.",
    ),
    "prompts that the environment does not take": (
        ["--set", "rollout.environment=api_drift"],
        {},
        "{data}/prompts.jsonl, line 1: An API-drift row has no 'task_seed'. Each row of "
        "prompts.jsonl has one.",
    ),
    "a reward that cannot be found": (
        ["--set", "rollout.environment=letters_environment:OddLetters"],
        {},
        "The environment 'letters_environment:OddLetters' cannot be imported: letters_environment "
        "has no 'OddLetters'. Did you mean 'EvenLetters'? Correct the name.",
    ),
    "a misspelt key": (
        ["--set", "sdpo.temprature=2"],
        {},
        "configuration: unknown key 'sdpo.temprature'. Did you mean 'sdpo.temperature'?",
    ),
    "two misspelt keys of TRL": (
        ["--set", "grpo.learning_rte=1e-5", "--set", "grpo.tempreature=1"],
        {},
        "2 problems.\n"
        "  Unknown key grpo.learning_rte. Did you mean 'learning_rate'?\n"
        "  Unknown key grpo.tempreature. Did you mean 'temperature'?",
    ),
    "a group that would be cut": (
        ["--set", "grpo.per_device_train_batch_size=6"],
        {},
        "grpo.per_device_train_batch_size 6 x gradient_accumulation_steps 1 makes 6 rollouts a "
        "step, and a group has grpo.num_generations = 4: one would be cut. Set "
        "grpo.per_device_train_batch_size = 4, or make the product another multiple of 4.",
    ),
    "an option that nothing would read": (
        ["--set", "grpo.vllm_gpu_memory_utilization=0.5"],
        {},
        "grpo.vllm_gpu_memory_utilization is 0.5, which only vLLM reads, and grpo.use_vllm is "
        "false. Set grpo.use_vllm = true, or leave it out.",
    ),
    "an average that the teacher does not follow": (
        ["--set", "teacher=frozen", "--set", "sdpo.teacher_ema_rate=0.1"],
        {},
        "sdpo.teacher_ema_rate is 0.1 and teacher is 'frozen', which follows no average. Set "
        "teacher = 'ema', or leave sdpo.teacher_ema_rate out.",
    ),
    "an adapter on modules that are not there": (
        ["--set", "lora.target_modules=['q_prj']"],
        {},
        "lora.target_modules names 'q_prj', and no linear module of this model is called that. Did "
        "you mean 'q_proj'? Correct the name, or set 'all-linear'.",
    ),
}


@pytest.fixture(scope="module")
def models(tiny_model_dir, tmp_path_factory):
    """Folders of models that cannot be trained here."""
    parent = tmp_path_factory.mktemp("models")
    for name in ("t5", "base"):
        shutil.copytree(tiny_model_dir, parent / name)
    T5Config().save_pretrained(parent / "t5")
    (parent / "base" / "chat_template.jinja").unlink()
    return {name: str(parent / name) for name in ("t5", "base")}


@pytest.fixture
def smoke(tiny_model_dir, tmp_path, monkeypatch):
    """`smoke(*options)`: a smoke in `tmp_path/run` that fails the test if it loads a model."""

    def load(*arguments, **options):
        pytest.fail("the model was loaded")

    monkeypatch.setattr("composer_replication.experiments.smoke.load_run_model", load)
    monkeypatch.syspath_prepend(SMOKE_TESTS)

    def run(*options):
        arguments = ["smoke", "--model", str(tiny_model_dir), "--out", str(tmp_path / "run")]
        settings = [
            "rollout.environment=letters_environment:EvenLetters",
            "grpo.num_generations=4",
            "grpo.bf16=false",
        ]
        return main([*arguments, *(x for s in settings for x in ("--set", s)), *options])

    return run


def written(folder, **changes):
    """A data folder in which every row can be used, but for the changed files."""
    folder.mkdir()
    for name, rows in (
        {"prompts": [PROMPT], "hint_sites": [SITE, OTHER_SITE], "pairs": [PAIR]} | changes
    ).items():
        if rows is not None:
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_full_before_the_model_loads(name, smoke, models, tmp_path, capsys):
    options, changes, text = MISTAKES[name]
    data = written(tmp_path / "data", **changes)
    places = {**models, "data": data}
    code = smoke("--data", str(data), *(option.format(**places) for option in options))
    assert code == 2
    assert capsys.readouterr().err == f"error: {text.format(**places)}\n"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_data_of_the_table_passes_every_check_of_its_own(smoke, tmp_path):
    """Without this, each mistake could be refused for another reason."""
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        smoke("--data", str(written(tmp_path / "data")))


def test_with_json_the_same_text_is_one_object_on_stdout(smoke, tmp_path, capsys):
    data = written(tmp_path / "data", pairs=[without(PAIR, "chosen")])
    assert smoke("--data", str(data), "--json") == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert captured.err == f"error: {error}\n"
    assert error.startswith(f"{data}/pairs.jsonl, line 1: there is no 'chosen' among its keys")


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_before_the_run_began_says_so(smoke, monkeypatch, capsys, as_json):
    def load(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("composer_replication.config.loading.load_config", load)
    assert smoke(*(["--json"] if as_json else [])) == 130
    captured = capsys.readouterr()
    assert captured.err == "stopped: Ctrl-C before the run began. Nothing was written.\n"
    if as_json:
        assert json.loads(captured.out)["status"] == "stopped"


def test_a_run_directory_that_cannot_be_made_is_told(smoke, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert smoke("--out", str(tmp_path / "file" / "run")) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'file' / 'run'} cannot be made or written: Not a directory. Choose "
        "another --out.\n"
    )
