"""Norms, shares and cosines of the channels' gradients, and that measuring changes no weight."""

import json
import math
import os
import socket
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from tiny_training import all_equal, run
from transformers import TrainerCallback

from composer_replication.errors import ConfigError
from composer_replication.experiments.extra_steps import step_at_largest_shape
from composer_replication.training.channel_gradients import ChannelGradients, gradient_figures
from composer_replication.training.step_diagnostics import StepDiagnostics

CHANNELS = ("grpo", "sdpo", "dpo")
STRONG = {"alpha_sdpo": 30.0, "beta_replay": 1.0, "max_grad_norm": 0.0}
"""Weights at which all three channels of the tiny model matter, and no clipping."""

CASES = {
    "plain": {},
    "two micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "non-reentrant checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "reentrant checkpointing, two micro-batches": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "bf16": {"bf16": True},
    "live teacher": {"teacher": "live"},
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)},
    "dropout, recomputed": {
        "peft_config": LoraConfig(
            r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False
        ),
        "gradient_checkpointing": True,
    },
}
DRAWN_ANEW = CASES["dropout, recomputed"] | {
    "gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False}
}
"""Each recomputation has another dropout, and moves the random state."""


class SeenGradients(TrainerCallback):
    """Keeps the gradients that each optimizer step is given."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([p.grad.clone() for p in model.parameters() if p.requires_grad])


def rows_and_norms(trainer):
    """Rows, and each step's norm in fp64: the logged one is summed in fp32 and 3e-4 off here."""
    seen = SeenGradients()
    trainer.add_callback(seen)
    rows = run(trainer)
    norms = [math.sqrt(sum(g.double().square().sum() for g in step)) for step in seen.steps]
    return list(zip(rows, norms, strict=True))


def measured(row):
    return {name for name in row if name.startswith(("grad_norm/", "grad_share/", "grad_cosine/"))}


def norm_of_the_sum(row, channels=CHANNELS):
    """The norm of all channels' gradients together, from what a row says of each by itself."""
    norms = {name: row[f"grad_norm/{name}"] for name in channels}
    square = sum(norm**2 for norm in norms.values())
    for a, b in combinations(channels, 2):
        square += 2 * norms[a] * norms[b] * row[f"grad_cosine/{a}_{b}"]
    return math.sqrt(square)


def test_figures_of_a_hand_computed_example():
    """a = (3, 0, 4), b = (0, 0, -2): <a,b> = -8, |a + b|^2 = 13, shares (25 - 8)/13, (4 - 8)/13."""
    figures = gradient_figures(
        {
            "a": [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])],
            "b": [torch.tensor([0.0, 0.0]), torch.tensor([[-2.0]])],
        }
    )
    assert figures == pytest.approx(
        {
            "grad_norm/a": 5,
            "grad_norm/b": 2,
            "grad_share/a": 17 / 13,
            "grad_share/b": -4 / 13,
            "grad_cosine/a_b": -0.8,
        },
        rel=1e-12,
    )


def test_a_channel_without_gradient_has_share_0_and_no_cosine():
    figures = gradient_figures({"a": [torch.ones(2)], "b": [torch.zeros(2)]})
    assert (figures["grad_norm/b"], figures["grad_share/b"], figures["grad_share/a"]) == (0, 0, 1)
    assert math.isnan(figures["grad_cosine/a_b"])


@pytest.mark.parametrize("changes", [*CASES.values(), DRAWN_ANEW], ids=[*CASES, "drawn anew"])
def test_measuring_leaves_gradients_metrics_and_random_state_bit_equal(build, changes):
    ends = []
    for every in (None, 1):
        trainer = build(
            gradients_every=every, credit_every=every, max_steps=1, **(STRONG | changes)
        )
        seen = SeenGradients()
        trainer.add_callback(seen)
        torch.manual_seed(5)
        (row,) = run(trainer)
        ends.append((seen.steps[0], row, torch.get_rng_state()))
    (gradients, row, state), (other_gradients, other, other_state) = ends
    assert all(map(torch.equal, gradients, other_gradients))
    assert torch.equal(state, other_state)
    assert row.keys() == other.keys() - measured(other)
    for name in row.keys() - {"step_time", "rollout_s"}:
        assert row[name] == other[name], name


def test_a_measured_run_ends_with_the_weights_of_an_unmeasured_one(build):
    ends = []
    for every in (None, 1):
        # Building seeds what the run samples with.
        trainer = build(gradients_every=every, credit_every=every, max_steps=3)
        run(trainer)
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("case", CASES)
def test_the_channels_gradients_add_up_to_the_gradient_of_the_step(build, case):
    # Channels share one forward, and in half precision their joint backward rounds by itself.
    rel = 1e-3 if case == "bf16" else 1e-6
    for row, norm in rows_and_norms(build(gradients_every=1, **(STRONG | CASES[case]))):
        assert norm_of_the_sum(row) == pytest.approx(norm, rel=rel)
        assert sum(row[f"grad_share/{name}"] for name in CHANNELS) == pytest.approx(1, abs=1e-12)
        assert min(row[f"grad_norm/{name}"] for name in CHANNELS) > 0.01 * norm


def test_clipping_comes_after_the_measurement(build):
    """Unclipped the norm is above 0.5; the logged norm, that before clipping, is an fp32 sum."""
    changes = STRONG | {"max_grad_norm": 0.01}
    for row, clipped_norm in rows_and_norms(build(gradients_every=1, **changes)):
        assert clipped_norm == pytest.approx(0.01, rel=1e-2)
        assert norm_of_the_sum(row) == pytest.approx(row["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("case", ["plain", "two micro-batches", "reentrant checkpointing"])
def test_a_channels_norm_is_the_steps_norm_where_it_trains_alone(build, case):
    """Equal rewards switch GRPO off, so the step's gradient is one channel's."""
    together = run(build(gradients_every=1, max_steps=1, **(STRONG | CASES[case])))[0]
    for channel, alone in (("sdpo", {"beta_replay": 0.0}), ("dpo", {"alpha_sdpo": 0.0})):
        trainer = build(reward=all_equal, max_steps=1, **(STRONG | CASES[case] | alone))
        ((_, norm),) = rows_and_norms(trainer)
        assert together[f"grad_norm/{channel}"] == pytest.approx(norm, rel=1e-5)


def test_where_channels_alternate_each_row_measures_those_of_its_step(build):
    trainer = build(channel_schedule="alternate", gradients_every=1, max_steps=4, **STRONG)
    found = rows_and_norms(trainer)
    for (row, norm), extra in zip(found, ("sdpo", "dpo", "sdpo", "dpo"), strict=True):
        assert measured(row) == {
            "grad_norm/grpo",
            f"grad_norm/{extra}",
            "grad_share/grpo",
            f"grad_share/{extra}",
            f"grad_cosine/grpo_{extra}",
        }
        assert norm_of_the_sum(row, ("grpo", extra)) == pytest.approx(norm, rel=1e-6)


def test_only_every_nth_step_is_measured_and_0_is_none(build):
    rows = run(build(gradients_every=2, max_steps=5))
    assert [bool(measured(row)) for row in rows] == [False, True, False, True, False]
    assert not measured(run(build(gradients_every=0, max_steps=1))[0])


def test_without_extra_channels_grpo_is_the_whole_step(build):
    trainer = build(hint_sites=None, pairs=None, gradients_every=1, max_steps=1, max_grad_norm=0.0)
    ((row, norm),) = rows_and_norms(trainer)
    assert measured(row) == {"grad_norm/grpo", "grad_share/grpo"}
    assert row["grad_norm/grpo"] == pytest.approx(norm, rel=1e-6)
    assert row["grad_share/grpo"] == 1


def test_a_channel_whose_loss_is_a_constant_has_no_gradient(build):
    trainer = build(gradients_every=1, max_steps=1)
    trainer._compute_trace_replay_loss = lambda model, inputs: torch.tensor(7.0)
    row = run(trainer)[0]
    assert (row["grad_norm/dpo"], row["grad_share/dpo"]) == (0, 0)
    assert row["grad_cosine/grpo_dpo"] is None


def test_forwards_outside_of_steps_are_not_measured(build, tmp_path):
    trainer = build(gradients_every=1, credit_every=1, max_steps=1)
    run(trainer)
    step_at_largest_shape(trainer, 48, 96)
    assert not measured(trainer._metrics["train"])
    assert [path.name for path in (tmp_path / "out/credit").iterdir()] == ["step_000001.jsonl"]


@pytest.mark.parametrize("field", ["gradients_every", "credit_every"])
def test_weights_in_shards_are_refused(build, monkeypatch, field):
    trainer = build(**{field: 1})
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ConfigError, match=rf"diagnostics\.{field} is set .* FSDP"):
        StepDiagnostics(trainer.args, trainer.accelerator, trainer.channel_weights)


def test_loss_scaling_is_refused(build, monkeypatch):
    accelerator = build().accelerator
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigError, match="fp16, whose small gradients are 0"):
        ChannelGradients(accelerator, is_reentrant=False)


def test_two_processes_report_the_reduced_gradient_and_train_the_same(tmp_path, tiny_model_dir):
    """Each process has rollouts, hint sites and pairs of its own; DDP averages over both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("two_process_gradients.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tiny_model_dir), str(tmp_path)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["weights_are_equal"]
    for row in found["rows"]:
        assert norm_of_the_sum(row) == pytest.approx(row["grad_norm"], rel=1e-3)
        assert min(row[f"grad_norm/{name}"] for name in CHANNELS) > 0.01 * row["grad_norm"]
    assert "reentrant gradient checkpointing on 2 processes" in found["reentrant"]
    check_credit_of_both_processes(found["credit"], found["rows"][1])


def check_credit_of_both_processes(credit, metrics):
    """All rows of the step are there once, and sum to the loss that both processes share."""
    rows = {name: [row for row in credit if row["channel"] == name] for name in CHANNELS}
    assert {name: len(found) for name, found in rows.items()} == {"grpo": 8, "sdpo": 4, "dpo": 4}
    for row in rows["grpo"]:
        # dr_grpo divides by the step's 8 rollouts of at most 6 tokens.
        assert row["credit"] == pytest.approx([row["advantage"] / 48] * len(row["credit"]))
    total = sum(sum(row["divergence"]) * row["loss_weight"] for row in rows["sdpo"])
    assert total == pytest.approx(30 * metrics["loss/sdpo"], rel=1e-4)
    losses = [math.log(1 + math.exp(-row["margin"])) for row in rows["dpo"]]
    assert sum(losses) / 4 == pytest.approx(metrics["loss/dpo"], rel=1e-5)
    for row in rows["dpo"]:
        expected = 0.1 / 4 / (1 + math.exp(row["margin"]))
        assert row["chosen"]["credit"] == pytest.approx(
            [expected] * len(row["chosen"]["credit"]), rel=1e-4
        )
