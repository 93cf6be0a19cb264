"""The tensor tracker counts storages: each once, from its first operator to its last holder."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerState

from composer_replication.training.metrics import TensorPeakCallback
from composer_replication.training.tensor_memory import (
    TensorMemory,
    tensor_peak_gib,
    tensors_in_memory,
)
from composer_replication.units import gib

FLOAT_BYTES = 4


def test_a_tensor_counts_until_nothing_holds_it():
    with TensorMemory(held=()) as memory:
        first = torch.zeros(1000)
        second = torch.zeros(500)
        assert memory.live_bytes == 1500 * FLOAT_BYTES
        del first
        assert memory.live_bytes == 500 * FLOAT_BYTES
    assert memory.peak_bytes == 1500 * FLOAT_BYTES
    del second


def test_views_and_in_place_operators_cost_nothing():
    with TensorMemory(held=()) as memory:
        whole = torch.zeros(10, 10)
        part = whole[2:].t()
        part += 1
        del whole
        assert memory.live_bytes == 100 * FLOAT_BYTES


def test_what_the_graph_saves_counts_until_the_backward_has_used_it():
    weight = nn.Parameter(torch.ones(100))
    with TensorMemory(held=(weight,)) as memory:
        loss = (weight.exp() * 2.0).sum()
        assert memory.live_bytes >= 2 * 100 * FLOAT_BYTES
        loss.backward()
        del loss
        assert memory.live_bytes == 2 * 100 * FLOAT_BYTES, "the weight and its gradient"


def test_what_exists_already_counts_once_whatever_points_at_it():
    tied = torch.zeros(64)
    with TensorMemory(held=(tied, tied, tied[:3])) as memory:
        assert memory.peak_bytes == 64 * FLOAT_BYTES


def test_the_peak_restarts_from_what_is_live():
    with TensorMemory(held=()) as memory:
        kept = torch.zeros(100)
        torch.zeros(900)
        assert memory.restart_peak() == 1000 * FLOAT_BYTES
        assert memory.peak_bytes == 100 * FLOAT_BYTES
    del kept


def test_tensors_of_another_device_do_not_count():
    with TensorMemory(held=()) as memory:
        assert torch.empty(100, device="meta").is_meta
        assert memory.peak_bytes == 0


def _two_steps(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(32, 64)).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_peak_is_what_the_allocator_handed_out_to_the_byte():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    weights = sum(weight.nbytes for weight in model.parameters())
    with TensorMemory(held=model.parameters()) as memory:
        _two_steps(model)
    for weight in model.parameters():
        weight.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _two_steps(model)
    held = peak = weights
    assert recorded.profiler is not None
    kineto = recorded.profiler.kineto_results
    assert kineto is not None
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    assert memory.peak_bytes == pytest.approx(peak, rel=0.001)


def test_every_tensor_in_memory_is_found():
    mine = torch.full((7,), 0.5)
    assert any(found is mine for found in tensors_in_memory())


def test_a_measurement_counts_what_was_there_before_it():
    before = torch.zeros(1 << 20)
    with tensor_peak_gib(torch.device("cpu")) as read_gib:
        during = torch.zeros(1 << 20)
        assert read_gib() >= gib(before.nbytes + during.nbytes)


@pytest.mark.parametrize(
    ("is_on", "steps_measured"), [(True, [False, True, False]), (False, [False] * 3)]
)
def test_the_callback_watches_the_second_step_alone(is_on, steps_measured):
    callback = TensorPeakCallback(torch.device("cpu"), is_on=is_on)
    state, peaks = TrainerState(), []
    for step in range(3):
        state.global_step = step
        callback.on_step_begin(None, state, None)
        work = torch.zeros(1 << 18)
        state.global_step = step + 1
        callback.on_step_end(None, state, None)
        peaks.append(callback.peak_gib)
        assert work is not None
    assert [b is not None and b != a for a, b in zip([None, *peaks], peaks, strict=False)] == (
        steps_measured
    )
