"""The step that a `StepCase` stands for: its rows, its model, teacher and optimizer.

The same case runs on fake tensors (`simulate.py`) and on real ones, of a CPU or a GPU
(`bench/plan_memory.py`), so that what is compared is one step, not two descriptions of it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from composer_replication.batch.collate import StepTensors
from composer_replication.errors import ConfigError
from composer_replication.losses.head import CPU_TILE_ROWS, GPU_TILE_ROWS
from composer_replication.planner.step_case import StepCase
from composer_replication.step.optimizer_step import channel_sums
from composer_replication.step.packed import score_packed
from composer_replication.step.scores import Executor
from composer_replication.step.separate import score_separately
from composer_replication.step.settings import StepSettings
from composer_replication.step.tree_forward import (
    CPU_HEAD_TILE_MIB,
    GPU_HEAD_TILE_MIB,
    TreeOptions,
)
from composer_replication.training.model_source import own_attention
from composer_replication.training.teacher import Teacher, make_teacher


def case_tensors(case: StepCase) -> StepTensors:
    """The rows of a case as the collator gives them, with random token ids."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = _config(case.model).get_text_config().vocab_size

    def ids(num_rows: int, num_tokens: int) -> Tensor:
        return torch.randint(vocab_size, (num_rows, num_tokens), generator=generator)

    tensors: StepTensors = {}
    if case.num_rollouts:
        # The rollouts of a group share their prompt.
        groups = torch.arange(case.num_rollouts) * case.num_prompts // case.num_rollouts
        prompt_ids = ids(case.num_prompts, case.prompt_tokens)[groups]
        completion_ids = ids(case.num_rollouts, case.completion_tokens)
        tensors |= {
            "prompt_ids": prompt_ids,
            "prompt_mask": torch.ones_like(prompt_ids),
            "completion_ids": completion_ids,
            "completion_mask": torch.ones_like(completion_ids),
            "tool_mask": torch.ones_like(completion_ids),
            "advantages": torch.linspace(-1.0, 1.0, case.num_rollouts),
        }
    if case.num_sites:
        tensors |= _site_tensors(case, ids, tensors)
    if case.num_pairs:
        states = ids(case.num_pairs, case.pair_state_tokens)
        for side in ("chosen", "rejected"):
            rows = torch.cat([states, ids(case.num_pairs, case.pair_action_tokens)], dim=1)
            mask = torch.zeros_like(rows).bool()
            mask[:, case.pair_state_tokens :] = True
            tensors[f"dpo_{side}_input_ids"] = rows
            tensors[f"dpo_{side}_attention_mask"] = torch.ones_like(rows)
            tensors[f"dpo_{side}_response_mask"] = mask
            tensors[f"dpo_{side}_ref_logprobs"] = torch.zeros(case.num_pairs)
        tensors["dpo_pair_weights"] = torch.ones(case.num_pairs)
    return tensors


def _site_tensors(
    case: StepCase, ids: Callable[[int, int], Tensor], rollouts: StepTensors
) -> StepTensors:
    num_tokens = case.state_tokens + case.action_tokens
    student = ids(case.num_sites, num_tokens)
    if case.num_rollout_sites:
        rows = torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], dim=1)
        spread = torch.arange(case.num_rollout_sites) * case.num_rollouts // case.num_rollout_sites
        student[: case.num_rollout_sites] = rows[spread, :num_tokens]
    states, actions = student.split([case.state_tokens, case.action_tokens], dim=1)
    teacher = torch.cat([states, ids(case.num_sites, case.hint_tokens), actions], dim=1)
    mask = torch.zeros_like(student).bool()
    mask[:, case.state_tokens :] = True
    student_index = mask.nonzero()
    return {
        "input_ids": student,
        "attention_mask": torch.ones_like(student),
        "sdpo_loss_mask": mask,
        "ctx_teacher_input_ids": teacher,
        "ctx_teacher_attention_mask": torch.ones_like(teacher),
        "sdpo_student_index": student_index,
        "sdpo_teacher_index": student_index + torch.tensor([0, case.hint_tokens]),
    }


class CaseStep:
    """A case's model, teacher and optimizer, ready to take one step after a first one."""

    def __init__(self, case: StepCase, tensors: StepTensors, policy: nn.Module) -> None:
        """Build everything else that stays between steps; the optimizer's state included.

        Args:
            case: what to build.
            tensors: of `case_tensors`; those of a policy on a GPU are copied there.
            policy: of `case_policy`; weights on the meta device are made here.
        """
        self.case = case
        self.policy = policy
        materialize(policy)
        device = next(policy.parameters()).device
        self.tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.teacher: Teacher | None = None
        if case.num_sites:
            has_adapters = case.lora_r is not None
            self.teacher = make_teacher(
                case.teacher, self.policy, self._autocast, ema_rate=0.05, has_adapters=has_adapters
            )
        self.policy.train()
        trained = [weight for weight in self.policy.parameters() if weight.requires_grad]
        self.optimizer = _optimizer(case, trained)
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        if not case.accumulates:
            self.optimizer.zero_grad(set_to_none=True)

    def models(self) -> list[nn.Module]:
        """The policy and the teacher's model, which may be the policy."""
        if self.teacher is None:
            return [self.policy]
        with self.teacher.open() as teacher_model:
            return [self.policy, teacher_model]

    def persistent_bytes(self) -> dict[str, int]:
        """What is in memory between two steps, by what it is for."""
        weights = [*self.policy.parameters(), *self.policy.buffers()]
        states = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        parts: dict[str, list[Tensor]] = {
            "weights": weights,
            "teacher": [] if self.teacher is None else list(self.teacher.state().values()),
            "optimizer": states,
            "gradients": [weight.grad for weight in weights if weight.grad is not None],
        }
        return {name: sum(tensor.nbytes for tensor in part) for name, part in parts.items()}

    def loss(self) -> Tensor:
        """The sum of every channel's loss, its graph included."""
        is_riding = self.case.executor == "packed" and self.case.teacher == "live"
        open_teacher = None if self.teacher is None or is_riding else self.teacher.open
        sums = channel_sums(
            self.policy,
            self.tensors,
            self.case.channels,
            StepSettings(),
            open_teacher,
            executor=_executor(self.case),
        )
        return torch.stack([part.loss_sum for part in sums.values()]).sum()

    def update(self) -> None:
        """Clip the gradients and move the weights, as the trainer does, and let go of them."""
        trained = [weight for weight in self.policy.parameters() if weight.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            self.teacher.update()

    def _autocast(self) -> AbstractContextManager[object]:
        return _bf16_autocast(self.policy) if self.case.autocasts else nullcontext()


def case_policy(case: StepCase, *, device: Literal["cpu", "cuda", "meta"]) -> nn.Module:
    """The model of a case with random weights, made on its device, as the trainer wraps it."""
    config = _config(case.model)
    dtype = getattr(torch, case.weights_dtype)
    with no_init_weights(), torch.device(device):
        lm = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=own_attention(config)
        )
    lm.tie_weights()
    if device != "meta":
        with torch.no_grad():
            for weight in lm.parameters():
                weight.normal_(0.0, config.initializer_range)
    return wrapped_policy(case, lm)


def wrapped_policy(case: StepCase, lm: PreTrainedModel) -> nn.Module:
    """A model with the adapter, checkpointing and autocast of a case."""
    if case.checkpoints:
        _enable_checkpoints(lm)
    policy: nn.Module = lm
    if case.lora_r is not None:
        import peft

        targets = case.lora_targets
        adapter = peft.LoraConfig(
            r=case.lora_r,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        if case.checkpoints:
            lm.enable_input_require_grads()
        is_meta = next(lm.parameters()).is_meta
        policy = peft.get_peft_model(lm, adapter, low_cpu_mem_usage=is_meta)
    if case.autocasts:
        policy.forward = _autocasting(policy)
    return policy


def _enable_checkpoints(lm: PreTrainedModel) -> None:
    # transformers before 5.23 has the old name alone, which warns since.
    if hasattr(lm, "activation_checkpointing_enable"):
        lm.activation_checkpointing_enable()
    else:
        lm.gradient_checkpointing_enable()


def materialize(model: nn.Module) -> None:
    """Give each weight and buffer of the meta device memory, tied ones once."""
    remake(model, lambda tensor: tensor.is_meta)


def remake(model: nn.Module, is_due: Callable[[Tensor], bool]) -> None:
    """Make weights and buffers anew, without their values; tied weights once."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and is_due(weight):
                if id(weight) not in made:
                    values = torch.empty(weight.shape, dtype=weight.dtype)
                    made[id(weight)] = nn.Parameter(values, requires_grad=weight.requires_grad)
                module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None and is_due(buffer):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _autocasting(policy: nn.Module) -> Callable[..., Any]:
    """The cache of cast weights ends with each forward, as under accelerate."""
    forward = policy.forward

    def cast_forward(*args: object, **keywords: object) -> object:
        with _bf16_autocast(policy):
            return forward(*args, **keywords)

    return cast_forward


def _bf16_autocast(policy: nn.Module) -> torch.autocast:
    return torch.autocast(next(policy.parameters()).device.type, dtype=torch.bfloat16)


def _executor(case: StepCase) -> Executor:
    """The case's, with the tiles of its device: a simulation's own tensors are on a CPU."""
    if case.executor == "packed":
        tile_mib = CPU_HEAD_TILE_MIB if case.device_type == "cpu" else GPU_HEAD_TILE_MIB
        options = TreeOptions(max_tokens=case.tree_max_tokens, head_tile_mib=tile_mib)
        return partial(score_packed, options=options)
    tile_rows = CPU_TILE_ROWS if case.device_type == "cpu" else GPU_TILE_ROWS
    return partial(score_separately, tile_rows=tile_rows)


def _config(settings: Mapping[str, object]) -> PreTrainedConfig:
    values = dict(settings)
    return AutoConfig.for_model(cast(str, values.pop("model_type")), **values)


def _optimizer(case: StepCase, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    name = case.optimizer
    if name not in ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor"):
        raise ConfigError(
            f"grpo.optim is {name!r}, whose kernels need its device, so its step cannot be "
            "simulated. Plan without --simulate."
        )
    if name == "sgd":
        return torch.optim.SGD(weights, lr=1e-6)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(weights, lr=1e-6, scale_parameter=False, relative_step=False)
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(weights, lr=1e-6, fused=True)
    # torch's own choice: all weights at once on CUDA.
    return torch.optim.AdamW(weights, lr=1e-6, foreach=case.device_type == "cuda")
