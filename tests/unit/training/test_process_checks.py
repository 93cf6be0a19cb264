"""What spreads weights over processes is refused before a step, and by its name."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from composer_replication import ComposerConfig
from composer_replication.errors import ConfigError
from composer_replication.step.hidden_states import final_hidden_states
from composer_replication.training.process_checks import check_processes


def accelerator(kind, num_processes=2, zero_stage=None):
    plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    return SimpleNamespace(
        distributed_type=kind,
        num_processes=num_processes,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )


def config(**changes):
    return ComposerConfig(output_dir="nowhere", use_cpu=True, bf16=False, **changes)


@pytest.mark.parametrize(
    ("kind", "zero_stage"),
    [(DistributedType.FSDP, None), (DistributedType.DEEPSPEED, 3),
     (DistributedType.MEGATRON_LM, None)],
)  # fmt: skip
def test_weights_in_shards_are_refused(kind, zero_stage):
    with pytest.raises(ConfigError, match=f"distributed by {kind.value}.* Use one process, or DDP"):
        check_processes(config(), accelerator(kind, zero_stage=zero_stage))


@pytest.mark.parametrize(
    ("kind", "zero_stage"),
    [(DistributedType.NO, None), (DistributedType.MULTI_GPU, None), (DistributedType.DEEPSPEED, 2)],
)
def test_whole_weights_are_taken(kind, zero_stage):
    check_processes(config(), accelerator(kind, zero_stage=zero_stage))


def test_reentrant_checkpointing_is_refused_beside_other_processes():
    reentrant = config(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    check_processes(reentrant, accelerator(DistributedType.NO, num_processes=1))
    with pytest.raises(ConfigError, match="use_reentrant = true and there are 2 processes"):
        check_processes(reentrant, accelerator(DistributedType.MULTI_CPU))


class TwoReplicas(torch.nn.Module):
    """As nn.DataParallel on two cards: each half of the rows goes through a decoder of its own."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, input_ids, **inputs):
        self.module(input_ids=input_ids[:1], **{k: _half(v) for k, v in inputs.items()})
        return self.module(input_ids=input_ids[1:], **{k: _half(v) for k, v in inputs.items()})


def _half(value):
    return value[:1] if isinstance(value, torch.Tensor) else value


def test_rows_that_are_split_over_cards_of_one_process_are_refused(tiny_llama):
    ids = torch.arange(8).reshape(2, 4)
    model = tiny_llama()
    final_hidden_states(model, ids, torch.ones_like(ids))
    with pytest.raises(ConfigError, match=r"ran 2 decoders.*torchrun or accelerate launch"):
        final_hidden_states(TwoReplicas(model), ids, torch.ones_like(ids))
