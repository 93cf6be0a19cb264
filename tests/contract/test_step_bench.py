"""`bench/step.py` on a tiny model: every key, equal steps, honest FLOPs, refusals."""

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from composer_replication.errors import ConfigError
from composer_replication.step.separate import score_separately
from composer_replication.step.trie import PrefixTree
from composer_replication.training.model_source import load_model
from composer_replication.training.tensor_memory import TensorMemory
from composer_replication.units import gib

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "numerics")]
bench = importlib.import_module("step")
ours = importlib.import_module("step_ours")
growth = importlib.import_module("step_growth")
memory = importlib.import_module("step_memory")
precision = importlib.import_module("step_precision")
flops = importlib.import_module("step_flops")
workloads = importlib.import_module("step_workload")
families = importlib.import_module("tiny_families")

SIZES = {"prefix": 12, "rollouts": 3, "action": 4, "hint": 3, "pairs": 2, "repeats": 1}
SMALL = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
NAMED = ("naive", "good", "grpo_trl", "grpo_ours", "ours")


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny: waiting for a second thread costs more than it brings."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    families.tiny_model("qwen2", dtype=torch.float32, vocab_size=64).save_pretrained(folder)
    families.chat_tokenizer().save_pretrained(folder)
    return str(folder)


def run_bench(folder, *flags):
    args = bench.parse_args(["--model", folder, *SMALL, *flags])
    return json.loads(json.dumps(bench.measure(args, load_model(folder))))


def test_the_report_has_every_key_and_every_step_equals_the_separate_executor(tiny_folder):
    report = run_bench(tiny_folder, "--whole-step")
    for key in ("step_s", "peak_gib", "tokens", "flops", "flops_per_s", "rows_per_forward"):
        assert tuple(report[key]) == NAMED, key
    assert tuple(report["ratios"]) == NAMED[:-1]
    assert tuple(report["flops_limit_ratio"]) == ("naive", "good")
    # The steps themselves compute in fp32: 1e-5 is what they may differ by.
    assert max(report["loss_errors"].values()) < 1e-6
    assert max(report["grad_errors"].values()) < 1e-5
    assert report["whole_step"]["rollout_s"] > 0
    assert report["whole_step"]["rollout_ours_s"] > 0
    assert report["peak_above_model_gib"]["naive"] > report["peak_tensor_gib"]["ours"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--trajectories", "--teacher", "ema", "--turns", "3"],
        ["--disjoint", "--teacher", "frozen", "--max-rows", "1"],
        ["--pairs", "0", "--max-rows", "2"],
    ],
)
def test_other_workloads_and_micro_batches_give_the_same_gradients(tiny_folder, flags):
    report = run_bench(tiny_folder, *flags)
    assert max(report["loss_errors"].values()) < 1e-6
    assert max(report["grad_errors"].values()) < 1e-5


def test_a_step_with_another_gradient_is_not_timed(tiny_folder, monkeypatch):
    def forgetful(*args, **keywords):
        scores = score_separately(*args, **keywords)
        if scores.divergence is not None:
            scores.divergence = scores.divergence.detach()
        return scores

    monkeypatch.setattr(bench, "OUR_EXECUTOR", forgetful)
    with pytest.raises(SystemExit, match="ours differs from the separate executor"):
        run_bench(tiny_folder, "--variants", "ours")


def test_a_bf16_gradient_may_be_twice_as_far_off_as_rounding_takes_it(
    tiny_folder, monkeypatch, capsys
):
    flags = ["--precision", "bf16", "--weights", "bf16", "--variants", "ours"]
    args = bench.parse_args(["--model", tiny_folder, *SMALL, *flags])
    monkeypatch.setitem(bench.MAX_GRAD_ERROR, "bf16", 1e-9)
    loaded = load_model(tiny_folder, dtype=torch.bfloat16)
    weights = [weight.clone() for weight in loaded.model.parameters()]
    report = bench.measure(args, loaded)
    rounding = report["rounding_errors"]["grpo+sdpo+dpo"]
    assert 1e-3 < rounding < 0.2
    assert f"{bench.OF_ROUNDING * rounding:.1e}" in capsys.readouterr().err
    # The fp32 forwards had the same weights, which are bf16 again.
    for weight, before in zip(loaded.model.parameters(), weights, strict=True):
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before)
    monkeypatch.setattr(bench, "OF_ROUNDING", 1e-6)
    with pytest.raises(SystemExit, match="Nothing was timed"):
        bench.measure(args, loaded)


@pytest.mark.parametrize(("num_rollouts", "fits"), [(3, 2), (4, 3), (8, 7), (8, 5), (4, 0)])
def test_a_baseline_runs_in_the_largest_micro_batches_that_fit(
    tiny_folder, monkeypatch, num_rollouts, fits
):
    own = bench.NaiveStep.loss

    def loss(self, part):
        if max(len(part.rollouts), len(part.sites), len(part.pairs)) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(self, part)

    monkeypatch.setattr(bench.NaiveStep, "loss", loss)
    flags = ["--variants", "naive", "ours", "--rollouts", str(num_rollouts)]
    report = run_bench(tiny_folder, *flags)
    if fits:
        assert report["rows_per_forward"]["naive"] == fits
        assert report["left_out"] == {}
    else:
        # Ours is reported all the same.
        assert report["left_out"] == {"naive": "not even one row in a forward fits"}
        assert set(report["step_s"]) == {"ours"}


def test_a_step_of_ours_that_does_not_fit_is_said(tiny_folder, monkeypatch):
    def full(self, part):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench.OurStep, "loss", full)
    with pytest.raises(SystemExit, match=r"ours does not fit in .* Nothing was timed"):
        run_bench(tiny_folder, "--variants", "ours")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device is cuda, and torch finds no such device"):
        bench.parse_args(["--device", "cuda"])


def test_a_baseline_that_only_memory_keeps_from_a_verdict_is_left_out_and_ours_never_is(
    tiny_folder, monkeypatch, capsys
):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    good_loss = bench.GoodStep.loss
    monkeypatch.setattr(bench.GoodStep, "loss", lambda step, part: 1.5 * good_loss(step, part))
    monkeypatch.setattr(ours, "_repeated_keys", out_of_memory)
    flags = ["--precision", "bf16", "--weights", "bf16", "--variants", "good", "ours"]
    args = bench.parse_args(["--model", tiny_folder, *SMALL, *flags])
    loaded = load_model(tiny_folder, dtype=torch.bfloat16)
    assert set(bench.measure(args, loaded)["step_s"]) == {"ours"}
    assert "good is left out" in capsys.readouterr().err
    monkeypatch.setitem(bench.MAX_GRAD_ERROR, "bf16", 0.0)
    with pytest.raises(SystemExit, match="ours differs"):
        bench.measure(args, loaded)


def test_counted_flops_are_those_that_torch_counts(tiny_folder):
    model = load_model(tiny_folder, attn_implementation="eager").model
    rows, tokens = 2, 10
    ids = torch.arange(1, rows * tokens + 1).view(rows, tokens)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    # Eager attention computes the whole square of the causal half.
    work = flops.Forward(rows * tokens, rows * tokens**2, rows * tokens)
    assert flops.model_size(model).flops([work]) == counter.get_total_flops()


def test_memory_counted_without_memory_is_what_real_tensors_take(tiny_folder):
    loaded = load_model(tiny_folder)
    workload = bench.make_workload(bench.parse_args(SMALL), loaded.model.config.vocab_size)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(loaded.model.config)
    counted = memory.peak_gib(empty, workload)
    setting = bench.make_setting(bench.parse_args(SMALL), loaded, workload, nullcontext)
    for step in memory.steps_of(setting):
        loaded.model.zero_grad(set_to_none=True)
        workloads.forget_layouts()
        with TensorMemory(held=loaded.model.parameters()) as real:
            held_bytes = real.live_bytes
            step.loss(memory.with_sampler(workload)).backward()
        assert counted[step.name] == gib(real.peak_bytes - held_bytes), step.name


def test_stored_growth_is_what_the_code_counts():
    spec = growth.MODELS[0]
    model = growth.empty_model(spec)
    workload = workloads.one_state(growth.BASE, workloads.Draw(model.config.vocab_size, 0))
    work = growth.work_of(workload, model, is_live=True)
    counted = {name: flops.model_size(model).flops(forwards) for name, forwards in work.items()}
    stored = json.loads((ROOT / "bench/results/step_growth.json").read_text())[spec]
    base = {"prefix": 1024, "rollouts": 4, "action": 64, "teacher": "live"}
    row = next(row for row in stored if row | base == row)
    ratios = {name: value / counted["ours"] for name, value in counted.items() if name != "ours"}
    assert row["ratios"] == pytest.approx(ratios)


def test_merged_prefixes_are_counted_once():
    rows = [(1, 2, 3), (1, 2, 4), (1, 2), (5,)]
    assert workloads.unique_tokens(rows) == (5, 1 + 2 + 3 + 3 + 1)


@pytest.mark.parametrize("flags", [["--teacher", "live"], ["--trajectories"], ["--disjoint"]])
def test_tokens_of_ours_are_the_rows_of_the_tree_that_it_walks(tiny_folder, flags):
    loaded = load_model(tiny_folder)
    args = bench.parse_args([*SMALL, *flags])
    workload = bench.make_workload(args, loaded.model.config.vocab_size)
    setting = bench.make_setting(args, loaded, workload, nullcontext)
    rows = [(*r.prompt_ids, *r.completion_ids) for r in workload.rollouts]
    rows += [(*s.context, *s.action) for s in workload.sites]
    rows += [(*p.context, *action) for p in workload.pairs for action in (p.chosen, p.rejected)]
    hinted = [(*s.hinted, *s.action) for s in workload.sites]
    policy, teacher, both = (
        PrefixTree([np.array(row[:-1]) for row in each]) for each in (rows, hinted, rows + hinted)
    )
    num_own = both.num_rows - policy.num_rows
    rides = teacher.num_rows - num_own > 2 * num_own
    assert rides == (flags == ["--trajectories"])
    trees = [both] if rides else [policy, teacher]
    work = ours.OurStep("ours", setting, bench.OUR_EXECUTOR).work(workload)
    assert sum(forward.tokens for forward in work) == sum(tree.num_rows for tree in trees)
    num_attended = sum(int((tree.positions + 1).sum()) for tree in trees)
    assert sum(forward.attention_pairs for forward in work) == num_attended


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rollouts", "1"], "--rollouts is 1"),
        (["--action", "0"], "--action is 0"),
        (["--variants", "naive"], "--variants leaves out ours"),
        (["--whole-step", "--disjoint"], "--whole-step"),
        (["--max-rows", "0"], "--max-rows is 0"),
        (["--max-rows", "-3"], "--max-rows is -3"),
        (["--memory-gib", "0"], "--memory-gib is 0"),
        (["--memory-gib", "-1"], "--memory-gib is -1"),
    ],
)
def test_flags_that_make_no_step_are_refused_by_name(flags, named):
    with pytest.raises(ConfigError, match=named):
        bench.parse_args(flags)


def test_precision_is_measured_against_float64(tiny_folder):
    sizes = workloads.Sizes(prefix=12, rollouts=3, action=4, hint=3, pairs=2)
    report = precision.report(tiny_folder, sizes)
    for errors in (report["loss_error"], report["grad_error_max"], report["grad_error_median"]):
        # Rounding of fp32, and not 0, which would mean that fp32 was compared with itself.
        assert all(0 <= error < 1e-4 for error in errors.values())
    assert all(error > 1e-9 for error in report["grad_error_max"].values())
    largest = report["grad_error_max"]
    assert report["ratio_of_max"] == largest["packed"] / largest["separate"]
