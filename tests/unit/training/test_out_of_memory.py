"""Out of memory becomes a sentence: the peak, the capacity, the phase, and what would need less."""

import errno
import gc
import os
import subprocess
import sys

import pytest
import torch

from composer_replication.config.loading import load_config
from composer_replication.errors import InputError, MemoryLimitError
from composer_replication.experiments import saved_model
from composer_replication.step.packed import score_packed
from composer_replication.step.separate import score_hint_sites
from composer_replication.training import model_source, out_of_memory, references, teacher
from composer_replication.training.memory_remedies import MemoryFigures, remedies
from composer_replication.training.out_of_memory import (
    Room,
    is_out_of_memory,
    memory_limit_error,
)
from composer_replication.training.trl_hooks import GRPOTrainer

CPU_FAILURE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_FAILURE = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1"

LACKS = {
    "python": MemoryError(),
    "cuda": torch.OutOfMemoryError(CUDA_FAILURE),
    "cpu": RuntimeError(CPU_FAILURE),
    "system": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "mapping": RuntimeError("unable to mmap 512 bytes: Cannot allocate memory (12)"),
}


@pytest.mark.parametrize("error", LACKS.values(), ids=LACKS)
def test_every_way_to_say_it_is_known(error):
    assert is_out_of_memory(error)
    found = memory_limit_error(error, load_config(None, []))
    assert isinstance(found, MemoryLimitError)
    assert isinstance(found, InputError)
    assert isinstance(found, MemoryError)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "full"), KeyError("memory")]
)
def test_other_errors_are_left_alone(error):
    assert memory_limit_error(error, load_config(None, [])) is None


@pytest.fixture
def room(monkeypatch):
    """A machine of 16 GiB of which 12 were used, with 1 GiB trained weights and nothing else."""
    monkeypatch.setattr(
        out_of_memory, "memory_room", lambda device: Room(16.0, "this container", 12.0, 0.5)
    )
    monkeypatch.setattr(out_of_memory, "_held_gib", lambda: (1.0, 0.0, 0.0))


def explained(function, *overrides):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        function()
    error = memory_limit_error(caught.value, load_config(None, list(overrides)))
    assert error is not None
    return str(error)


def fail(text=CPU_FAILURE):
    raise RuntimeError(text)


def test_the_whole_text_of_a_step_that_does_not_fit(room):
    def _compute_loss():
        fail()

    text = explained(
        _compute_loss,
        "grpo.per_device_train_batch_size=8",
        "grpo.gradient_accumulation_steps=2",
        "batch.max_context_tokens=2048",
    )
    # Fixed: 0.5 libraries, 1 weights, 1 gradients, 2 moments. The other 9.5 are for 11 rows: 8, a
    # site and both actions of a pair. With 4 rows 7 are left: twice their 6 GiB does not fit. With
    # 2 rows 5 are left.
    assert text.splitlines() == [
        "Out of memory in the policy's forward or backward. The peak so far is 12.00 of the 16.00 "
        "GiB of this container, and 2.00 GiB more were asked for. 4.50 GiB are for weights, "
        "gradients, moments and libraries, whatever the rows. These need less, in the order to try "
        "them:",
        "  grpo.per_device_train_batch_size = 2 and grpo.gradient_accumulation_steps = 8 (at least "
        "8.82 GiB)",
        "  grpo.gradient_checkpointing = true, a fifth slower",
        "  batch.max_context_tokens = 1024 and batch.truncation = 'middle'",
        "  sdpo.sites_per_step = 1",
        "  dpo.pairs_per_step = 1",
        "  lora.r = 16: train an adapter (at least 11.00 GiB)",
    ]


def test_what_is_at_its_minimum_is_not_proposed(room):
    def _compute_loss():
        fail()

    text = explained(
        _compute_loss,
        "grpo.per_device_train_batch_size=1",
        "grpo.gradient_checkpointing=true",
        "sdpo.sites_per_step=1",
        "beta_replay=0",
        "batch.max_context_tokens=2048",
        "batch.truncation=middle",
        "lora.r=8",
    )
    assert text.splitlines()[1:] == ["  batch.max_context_tokens = 1024"]


def phases():
    def load_model():
        fail()

    def detached_copy():
        fail()

    def score_references():
        fail()

    def _generate_single_turn():
        fail()

    def score_hint_sites():
        fail()

    def score_hint_sites_of_the_policy():
        teacher_hidden = 0
        fail()
        return teacher_hidden

    def backward():
        fail()

    def save_model():
        fail()

    # The policy's half of the same function: the teacher's states are there already.
    code = score_hint_sites_of_the_policy.__code__
    score_hint_sites_of_the_policy.__code__ = code.replace(co_name="score_hint_sites")
    return {
        "while the model was loaded": load_model,
        "while the weights were copied for the teacher": detached_copy,
        "while the pairs were scored under the reference": score_references,
        "while rollouts were sampled": _generate_single_turn,
        "in the teacher's forward": score_hint_sites,
        "in the policy's forward or backward": score_hint_sites_of_the_policy,
        "in the policy's forward or backward ": backward,
        "while the model was saved": save_model,
        "outside any step": fail,
    }


@pytest.mark.parametrize(("words", "function"), phases().items(), ids=phases())
def test_the_phase_is_that_of_the_innermost_function(room, words, function):
    def _compute_loss():
        function()

    outer = function if function is fail else _compute_loss
    assert explained(outer).startswith(f"Out of memory {words.strip()}. ")


def test_the_functions_that_say_the_phase_exist_under_those_names():
    """The phase is read off the stack, so a renamed function would be a phase lost in silence."""
    homes = {
        "load_model": model_source,
        "detached_copy": teacher,
        "score_references": references,
        "_generate_single_turn": GRPOTrainer,
        "_generate_and_score_completions": GRPOTrainer,
        "_compute_loss": GRPOTrainer,
        "backward": torch.Tensor,
        "_clip_grad_norm": GRPOTrainer,
        "save_model": saved_model,
        "_save_checkpoint": GRPOTrainer,
    }
    assert homes.keys() == out_of_memory._PHASES.keys()
    for name, home in homes.items():
        assert getattr(home, name).__name__ == name
    assert "teacher_hidden" in score_hint_sites.__code__.co_varnames
    assert {"teacher_hidden", "teacher_model"} <= set(score_packed.__code__.co_varnames)


def test_the_optimizers_step_is_told_from_others(room, monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter])
    monkeypatch.setattr(torch.optim.AdamW, "_init_group", lambda *a, **k: fail())
    assert explained(optimizer.step).startswith("Out of memory in the optimizer's step. ")


def test_what_is_held_for_good_is_measured():
    gc.collect()
    before = out_of_memory._held_gib()
    trained = torch.nn.Parameter(torch.ones(2**20))
    frozen = torch.nn.Parameter(torch.ones(2**18, dtype=torch.bfloat16), requires_grad=False)
    optimizer = torch.optim.AdamW([trained])
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    after = out_of_memory._held_gib()
    grown = [round((new - old) * 2**30) for new, old in zip(after, before, strict=True)]
    # Adam's two moments, and a step counter of 4 bytes.
    assert grown == [4 * 2**20, 2 * 2**18, 2 * 4 * 2**20 + 4]
    assert frozen.dtype == torch.bfloat16


FIGURES = MemoryFigures(need=90.0, capacity=80.0, fixed=20.0, trained=5.0, lora=3.0)


def proposals(phase, *overrides, figures=FIGURES):
    return [each.setting for each in remedies(load_config(None, list(overrides)), phase, figures)]


def test_rollouts_that_are_sampled_together_become_fewer_or_shorter():
    options = ["grpo.num_generations=4", "grpo.per_device_train_batch_size=4"]
    assert proposals("rollout", *options, "grpo.gradient_accumulation_steps=4") == [
        "grpo.gradient_accumulation_steps = 2: a smaller step",
        "grpo.max_completion_length = 256",
        "lora.r = 16: train an adapter",
    ]
    assert proposals("rollout", *options)[0] == (
        "grpo.num_generations = 2 and grpo.per_device_train_batch_size = 2"
    )


def test_weights_that_do_not_fit_alone_leave_rows_alone():
    too_big = MemoryFigures(need=90.0, capacity=80.0, fixed=85.0, trained=20.0, lora=10.0)
    assert proposals("policy", figures=too_big) == ["lora.r = 16: train an adapter"]
    assert proposals("load", "lora.r=4") == ["a smaller model, or a machine with more memory"]


def test_a_fixed_shape_and_an_explicit_generation_follow_the_rows():
    options = ["grpo.per_device_train_batch_size=4", "grpo.steps_per_generation=2"]
    first = proposals(
        "policy", *options, "grpo.gradient_accumulation_steps=2", "smoke.fixed_shapes=[4, 512]"
    )[0]
    assert first == (
        "grpo.per_device_train_batch_size = 1, grpo.gradient_accumulation_steps = 8, "
        "grpo.steps_per_generation = 8 and smoke.fixed_shapes = [1, 512]"
    )


LIMITED = """
import resource, sys
from composer_replication.experiments import smoke
from composer_replication.cli import main
import psutil
limit = psutil.Process().memory_info().vms + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_run_under_a_real_limit_ends_in_words_and_exit_code_2(tiny_model_dir, tmp_path):
    out = tmp_path / "run"
    arguments = [
        "smoke", "--model", str(tiny_model_dir), "--out", str(out), "--steps", "1",
        "--fixed-shapes", "16,1024",
        "--set", "grpo.num_generations=4",
        "--set", "grpo.per_device_train_batch_size=16",
        "--set", "grpo.bf16=false",
    ]  # fmt: skip
    finished = subprocess.run(
        [sys.executable, "-c", LIMITED, str(2**29), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 2, finished.stderr
    error = finished.stderr[finished.stderr.index("error: ") :]
    assert error.startswith("error: Out of memory in the policy's forward or backward. The peak so")
    assert "GiB of address space that this process may map (ulimit -v)" in error
    assert "\n  grpo.per_device_train_batch_size = " in error
    assert (out / "summary.json").is_file()
    assert (out / "config.toml").is_file()


@pytest.mark.cuda
def test_a_real_failure_on_cuda_names_the_device_and_what_was_asked_for():
    def _compute_loss():
        torch.empty(2**50, device="cuda")

    text = explained(_compute_loss)
    assert f"GiB of {torch.cuda.get_device_name()}, and 4194304.00 GiB more were asked" in text
