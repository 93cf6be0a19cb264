"""Both kinds of gradient checkpointing change no number of `step`, and do recompute."""

import pytest
import tiny_families
import torch
from test_step_on_every_family import CHANNELS, SETTINGS, assert_equal_gradients, gradients
from test_step_under_lora import adapters_off, lora_model

from composer_replication import ComposerDataCollator
from composer_replication.step import step
from composer_replication.step.hidden_states import causal_lm

# transformers deprecates the old name, PEFT still calls it.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = ("llama", "gemma2", "gemma3", "qwen3_moe", "lora")


@pytest.fixture(scope="module")
def collator():
    return ComposerDataCollator(tiny_families.chat_tokenizer())


def build(case):
    if case == "lora":
        return lora_model("llama")
    dtype = torch.float32 if case == "gemma2" else torch.float64
    return tiny_families.tiny_model(case, dtype=dtype)


def losses_and_gradients(model, collator, case):
    """The three sums, the gradient of each, and how often the inside of the first layer ran."""
    num_runs = 0

    def count(*_):
        nonlocal num_runs
        num_runs += 1

    handle = causal_lm(model).get_decoder().layers[0].self_attn.register_forward_hook(count)
    teacher = adapters_off(model) if case == "lora" else None
    sums = step(model, tiny_families.BATCH, collator, settings=SETTINGS, teacher=teacher)
    losses = {name: part.loss_sum for name, part in sums.items()}
    result = {name: gradients(model, losses[name]) for name in CHANNELS}
    handle.remove()
    return {name: loss.item() for name, loss in losses.items()}, result, num_runs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_losses_and_gradients(case, use_reentrant, collator):
    model = build(case)
    losses, expected, num_runs = losses_and_gradients(model, collator, case)
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    checkpointed = losses_and_gradients(model, collator, case)
    # GRPO, SDPO's student and teacher, both sides of DPO; all but the teacher run again.
    assert (num_runs, checkpointed[2]) == (5, 5 + 4)
    assert checkpointed[0] == losses
    for name in CHANNELS:
        assert_equal_gradients(checkpointed[1][name], expected[name], 1e-12)
