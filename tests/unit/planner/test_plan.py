import json
import shlex
from datetime import timedelta
from importlib.resources import files

import pytest

from composer_replication.cli import main
from composer_replication.config.loading import load_config
from composer_replication.errors import ConfigError
from composer_replication.planner.hardware import parse_gpu
from composer_replication.planner.local_machine import LocalCard, LocalMachine
from composer_replication.planner.model_files import model_settings
from composer_replication.planner.plan import PlanRequest, make_plan
from composer_replication.planner.plan_json import PlanAnswer, plan_json, plan_json_schema
from composer_replication.planner.prices import shipped_prices

TRAIN = ["model=shape:qwen2.5-7b", "grpo.max_steps=100"]


def test_the_published_schema_is_the_generated_one():
    published = (files("composer_replication.planner") / "plan_schema.json").read_text()
    assert published == json.dumps(plan_json_schema(), indent=2) + "\n"


def test_terms_add_up_and_the_chosen_one_is_among_the_candidates(note, planned, machine):
    plan = planned(note, machine("RTX-5090"))
    payload = json.loads(plan_json(plan, []))
    assert list(payload) == [
        *("schema", "chosen", "candidates", "reason", "cheaper_fit", "prices_as_of", "warnings")
    ]
    assert payload["chosen"] in payload["candidates"]
    for each in payload["candidates"]:
        assert sum(each["terms_gib"].values()) == pytest.approx(each["peak_gib"], abs=0.001)
        assert sum(each["step_terms_s"].values()) == pytest.approx(each["step_s"][1], abs=0.001)
        assert each["fits"] == (each["peak_gib"] <= each["capacity_gib"])
        assert each["step_s"] == sorted(each["step_s"])
        assert each["where"] == "modal" or each["expected_usd"] == each["worst_usd"] == 0
    assert PlanAnswer.model_validate(payload)


def test_over_the_cap_nothing_is_chosen_and_what_fits_is_named(note, planned, machine):
    plan = planned(note, machine(), on="modal", budget_usd=0.1)
    assert (plan.chosen, plan.exit_code) == (None, 2)
    assert "over the cap of 0.1 USD" in plan.decision.reason
    assert "would fit under it" in plan.decision.reason


def test_a_local_run_costs_nothing_and_so_is_under_every_cap(note, planned, machine):
    plan = planned(note, machine("RTX-4090"), budget_usd=0.01)
    assert (plan.chosen.place.name, plan.exit_code) == ("RTX-4090", 0)


def test_where_nothing_fits_the_miss_and_a_way_out_are_named(planned, machine):
    config = load_config(None, TRAIN)
    plan = planned(config, machine("RTX-4090"), on="local")
    assert (plan.chosen, plan.exit_code) == (None, 1)
    assert plan.decision.reason.startswith("Nothing fits: RTX-4090 comes nearest and misses by ")
    assert plan.cheaper_fit.startswith("RTX-4090 would fit with ")
    assert "lora.r = 16" in plan.cheaper_fit


def test_the_change_that_is_named_does_let_it_fit(planned, machine):
    options = ["model=shape:qwen2.5-0.5b", "smoke.max_shape_tokens=1024", "tree=off"]
    options += ["batch.max_context_tokens=1024", "grpo.per_device_train_batch_size=2"]
    options += ["grpo.num_generations=2"]
    config = load_config(None, options)
    plan = planned(config, machine(), on="modal", gpu=parse_gpu("L4"))
    assert plan.exit_code == 1
    assert "grpo.gradient_checkpointing = true" in plan.cheaper_fit
    changed = load_config(None, [*options, "grpo.gradient_checkpointing=true"])
    assert planned(changed, machine(), on="modal", gpu=parse_gpu("L4")).exit_code == 0


def test_a_run_is_planned_with_the_executor_that_it_takes(planned, machine):
    options = ["model=shape:qwen2.5-0.5b", "smoke.max_shape_tokens=1024"]

    def executor(*more):
        plan = planned(load_config(None, [*options, *more]), machine(), on="modal")
        return plan.candidates[0].shape.case.executor

    assert executor() == "packed"
    assert executor("tree=off") == "separate"
    # Without an extra channel the step is TRL's own.
    assert executor("alpha_sdpo=0", "beta_replay=0") == "separate"
    assert executor("alpha_sdpo=0", "beta_replay=0", "tree=always") == "packed"


def test_held_out_evaluations_take_their_time(planned, machine):
    def phases(*more):
        config = load_config(None, [*TRAIN, "grpo.max_steps=100", *more])
        return planned(config, machine(), on="modal").chosen.clock.phases_s

    assert "evaluate" not in phases()
    often = phases("evaluation.every_steps=10")["evaluate"]
    once = phases("evaluation.every_steps=100")["evaluate"]
    # One before the first step, then one at the end of each stretch.
    assert often.expected / once.expected == pytest.approx(11 / 2)
    fewer = phases("evaluation.every_steps=10", "evaluation.prompts=8")["evaluate"]
    assert 0 < fewer.expected < often.expected
    uneven = phases("evaluation.every_steps=30")["evaluate"]
    assert uneven.expected / once.expected == pytest.approx(5 / 2)
    # A smoke has none.
    smoke = load_config(None, ["model=shape:qwen2.5-0.5b", "evaluation.every_steps=10"])
    assert "evaluate" not in planned(smoke, machine(), on="modal").chosen.clock.phases_s


def test_the_prompt_of_a_group_is_computed_once(planned, machine):
    def rollout(num_generations):
        options = [*TRAIN, f"grpo.num_generations={num_generations}", "rollout.max_action_tokens=1"]
        plan = planned(load_config(None, options), machine(), on="modal", gpu=parse_gpu("L4"))
        return plan.candidates[0].terms_s["rollout"].expected

    assert rollout(8) < rollout(2)


def test_several_cards_are_looked_at_only_where_one_is_not_enough(planned, machine):
    config = load_config(
        None, [*TRAIN, "grpo.per_device_train_batch_size=4", "grpo.num_generations=4"]
    )
    plan = planned(config, machine(), on="modal")
    counts = {candidate.place.num_gpus for candidate in plan.candidates}
    largest = max(c.place.capacity_gib for c in plan.candidates)
    one_suffices = any(c.is_launchable for c in plan.candidates if c.place.num_gpus == 1)
    assert one_suffices == (counts == {1})
    assert largest == 267.0
    small = planned(config, machine(), on="modal", gpu=parse_gpu("A100-80GB:4"))
    assert [c.place.label for c in small.candidates] == ["A100-80GB:4"]


def test_alternating_channels_are_never_in_memory_together(note, planned, machine):
    batch = note.batch.model_copy(update={"channel_schedule": "alternate"})
    alternating = note.model_copy(update={"batch": batch})
    both = planned(note, machine(), on="modal").chosen.memory.peak_gib
    one = planned(alternating, machine(), on="modal").chosen.memory.peak_gib
    assert one < both - 1.0


def test_old_prices_say_their_age(note, machine):
    prices = shipped_prices()
    request = PlanRequest(note)
    late = prices.as_of + timedelta(days=200)
    plan = make_plan(request, machine(), prices=prices, today=late)
    assert plan.warnings[0].startswith(f"The prices are of {prices.as_of}, 200 days old.")


def test_a_card_that_is_not_here_can_be_planned_for_and_is_said_to_be(note, planned, machine):
    plan = planned(note, machine(), gpu=parse_gpu("RTX-5090"))
    assert plan.chosen.place.is_assumed
    assert any("RTX-5090 is not in this machine" in text for text in plan.warnings)


def run_plan(capsys, *arguments):
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


CHEAP = ["--set", "model=shape:qwen2.5-0.5b", "--set", "smoke.fixed_shapes=[2, 256]"]


def test_the_answer_comes_first_and_the_next_command_last(capsys):
    code, out, _ = run_plan(capsys, *CHEAP, "--on", "modal", "--budget", "3")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("run     ")
    assert lines[1].startswith("why     ")
    assert lines[-1] == (
        "next    composer-replication smoke --set model=shape:qwen2.5-0.5b --set "
        "'smoke.fixed_shapes=[2, 256]' --on modal --gpu L4 --budget 3"
    )
    assert sum(line.startswith("->") for line in lines) == 1


@pytest.mark.parametrize("gpu", ["H100!", "B200+", "H100!:2"])
def test_the_next_command_asks_for_the_card_as_it_was_asked_for(gpu, capsys):
    _, out, _ = run_plan(capsys, *CHEAP, "--on", "modal", "--gpu", gpu, "--budget", "90")
    assert shlex.split(out.splitlines()[-1])[-4:] == ["--gpu", gpu, "--budget", "90"]


def test_a_card_that_is_not_here_is_said_to_be_needed(capsys):
    _, out, _ = run_plan(capsys, *CHEAP, "--on", "local", "--gpu", "H100")
    assert "H100 is not in this machine" in out
    assert out.splitlines()[-1].startswith("next    on a machine with H100: composer-")


def test_quantised_weights_are_not_planned(capsys, tmp_path):
    config = model_settings("shape:qwen2.5-0.5b") | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, error = run_plan(capsys, "--set", f"model={tmp_path}")
    assert code == 2
    assert f"{tmp_path} holds quantised weights (awq), which no optimizer step can change" in error


def test_a_train_run_without_a_file_has_no_sizes_of_a_smoke(capsys, tmp_path):
    """`train` takes a file: with smoke's rows and checkpoints the plan had a third of its GiB."""
    options = ["--set", "model=shape:qwen2.5-7b", "--set", "lora.r=16", "--set",
               "grpo.max_steps=100", "--on", "modal", "--gpu", "H100"]  # fmt: skip
    (tmp_path / "empty.toml").write_text("")
    _, out, _ = run_plan(capsys, *options)
    assert out.splitlines()[-1].startswith("next    composer-replication train CONFIG.toml --set ")
    _, given, _ = run_plan(capsys, str(tmp_path / "empty.toml"), *options, "--json")
    _, without, _ = run_plan(capsys, *options, "--json")
    assert json.loads(without)["chosen"] == json.loads(given)["chosen"]


def test_json_is_one_object_with_what_solve_found(capsys):
    options = ["--on", "modal", "--gpu", "L4", "--solve", "max_length", "--json"]
    code, out, _ = run_plan(capsys, *CHEAP, *options)
    answer = json.loads(out)
    assert code == 0
    (solved,) = answer["solved"]
    assert (solved["gpu"], solved["key"]) == ("L4", "max_length")
    fixed = ["--set", "model=shape:qwen2.5-0.5b", "--on", "modal", "--gpu", "L4"]

    def fits(num_tokens):
        options = ["--set", f"smoke.fixed_shapes=[2, {num_tokens}]", "--json"]
        return run_plan(capsys, *fixed, *options)[0] == 0

    assert fits(int(0.97 * solved["value"]))
    assert not fits(int(1.03 * solved["value"]))


def test_solve_takes_any_whole_number_of_the_file(capsys):
    options = ["--on", "modal", "--gpu", "H100", "--solve", "sdpo.sites_per_step", "--json"]
    _, out, _ = run_plan(capsys, *CHEAP, *options)
    assert json.loads(out)["solved"][0]["value"] > 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--budget", "0"], "--budget is 0 USD"),
        (["--budget", "-3"], "--budget is -3 USD"),
        (["--budget", "much"], "--budget is 'much'"),
        (["--gpu", "H101"], "There is no GPU 'H101'"),
        (["--gpu", "A10:8"], "8 x A10 is not one machine"),
        (["--gpu", "RTX-4090", "--on", "modal"], "which Modal does not rent"),
        (["--on", "moon"], "--on is 'moon'"),
        (["--solve", "name"], "only a whole number has a largest one"),
        (["--set", "model=shape:qwen2.5-8b"], "is not a shape that this package ships"),
        (["--set", "model=nowhere"], "'nowhere' is no model"),
        (["--set", "data=/nowhere"], "has no prompts.jsonl"),
        (["--set", "grpo.optim=lion_32bit"], "whose memory is not known"),
        (["--set", 'grpo.per_device_train_batch_size="8"'], "it must be a whole number"),
        (["--set", "grpo.per_device_train_batch_size=-4"], "it must be at least 1"),
        (["--set", "grpo.per_device_train_batch_size=0"], "it must be at least 1"),
        (["--set", "grpo.num_generations=a"], "grpo.num_generations is 'a'; it must be a whole"),
        (["--set", "grpo.gradient_accumulation_steps=0"], "it must be at least 1"),
        (["--set", "grpo.steps_per_generation=a"], "it must be a whole number"),
        (["--set", "grpo.num_train_epochs=a"], "it must be a number"),
        (["--set", "grpo.gradient_checkpointing=1"], "it must be true or false"),
        (["--set", "grpo.per_device_batch_size=8"], "Unknown key grpo.per_device_batch_size."),
        (["--set", "grpo.max_steps=9", "--set", "grpo.per_device_train_batch_size=3",
          "--set", "smoke.steps=1"], "one would be cut"),
        (["--set", "lora.target_modules=['qkv']"], "a layer has none of them"),
    ],
)  # fmt: skip
def test_bad_input_is_told_with_exit_code_2(capsys, options, text):
    code, _, err = run_plan(capsys, *CHEAP[:2], *options)
    assert code == 2
    assert text in err


def test_a_config_json_that_is_none_is_told(capsys, tmp_path):
    (tmp_path / "config.json").write_text("[]")
    code, _, err = run_plan(capsys, "--set", f"model={tmp_path}")
    assert code == 2
    assert "holds list and no object" in err


@pytest.mark.parametrize(
    ("content", "text"), [(b"\xff\xfe{}", "cannot be read as text"), (b"\n", "has no line")]
)
def test_prompts_that_are_none_are_told(content, text, capsys, tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(content)
    code, _, err = run_plan(capsys, *CHEAP[:2], "--set", f"data={tmp_path}")
    assert code == 2
    assert text in err


def test_a_local_card_that_is_not_in_the_table_is_told(note, planned):
    unknown = LocalMachine((LocalCard("NVIDIA Quadro 9", 8.0),), 4, frozenset(), 16.0)
    with pytest.raises(ConfigError, match="Quadro 9, which is not in the table of cards"):
        planned(note, unknown, on="local")
    # Modal's cards can be planned for all the same.
    assert planned(note, unknown).chosen.place.where == "modal"


@pytest.mark.parametrize("key", ["grpo.num_generations", "grpo.per_device_train_batch_size"])
def test_solve_starts_at_the_smallest_value_that_a_run_takes(key, capsys):
    options = ["--set", "model=shape:qwen2.5-0.5b", "--set", "grpo.max_steps=9", "--on", "modal"]
    _, out, _ = run_plan(capsys, *options, "--gpu", "H100", "--solve", key, "--json")
    value = json.loads(out)["solved"][0]["value"]
    # Without a file a group is of two.
    assert value >= 4
    assert value % 2 == 0
