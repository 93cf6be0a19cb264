"""Which weights the teacher scores with, before and after the policy moves."""

import contextlib

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from composer_replication.errors import ConfigError
from composer_replication.training.teacher import detached_copy, make_teacher

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def teacher(kind, policy, **changes):
    options = {"ema_rate": 0.25, "has_adapters": False}
    return make_teacher(kind, policy, contextlib.nullcontext, **(options | changes))


def shift(model, by):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


def lora(policy):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(policy, config)


def test_a_copy_of_a_model_that_trl_patched_does_not_call_the_policy(tiny_llama):
    policy = tiny_llama()
    add_fused_lm_head(policy)
    clone = detached_copy(policy)
    before = logits(clone)
    shift(policy, 0.1)
    assert torch.equal(logits(clone), before)
    assert not torch.equal(logits(policy), before)
    assert "forward" in policy.__dict__  # the policy keeps TRL's forward
    assert all(not parameter.requires_grad for parameter in clone.parameters())


def test_a_frozen_teacher_stays_at_the_start(tiny_llama):
    policy = tiny_llama()
    start = logits(policy)
    frozen = teacher("frozen", policy)
    shift(policy, 0.1)
    frozen.update()
    with frozen.open() as model:
        assert torch.equal(logits(model), start)


def test_an_ema_teacher_moves_its_rate_of_the_way_at_each_update(tiny_llama):
    policy = tiny_llama()
    weight = policy.model.norm.weight
    start = weight.detach().clone()
    ema = teacher("ema", policy)
    shift(policy, 1.0)
    ema.update()
    ema.update()
    with ema.open() as model:
        # 1/4 of the way, then 1/4 of what is left: 0.25 + 0.75 * 0.25 = 0.4375
        assert torch.allclose(model.model.norm.weight, start + 0.4375)


def test_a_live_teacher_is_the_policy_in_eval_mode(tiny_llama):
    policy = tiny_llama().train()
    with teacher("live", policy).open() as model:
        assert model is policy
        assert not model.training
    assert policy.training


def test_a_frozen_teacher_under_lora_is_the_base_model(tiny_llama):
    base = logits(tiny_llama())
    policy = lora(tiny_llama())
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.allclose(logits(policy), base)
    with teacher(None, policy, has_adapters=True).open() as model:
        assert torch.allclose(logits(model), base, atol=1e-6)


def randomise_adapter(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def products(policy):
    """`scaling * B A` by layer, from the factors themselves."""
    found = {}
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A"):
            factors = module.lora_B["default"].weight @ module.lora_A["default"].weight
            found[name] = module.scaling["default"] * factors.detach()
    return found


def test_under_lora_the_ema_averages_the_product_and_adds_it_to_the_base(tiny_llama):
    policy = lora(tiny_llama())
    ema = teacher("ema", policy, has_adapters=True)
    randomise_adapter(policy, 0)
    first = products(policy)
    ema.update()
    randomise_adapter(policy, 1)
    second = products(policy)
    ema.update()
    merged = tiny_llama()
    with torch.no_grad():
        for name, module in merged.named_modules():
            layer = f"base_model.model.{name}"
            if layer in first:
                # From 0: 1/4 of the first, then 3/4 of that and 1/4 of the second.
                module.weight.add_(0.75 * 0.25 * first[layer] + 0.25 * second[layer])
    with ema.open() as model:
        assert torch.allclose(logits(model), logits(merged), atol=1e-5)
    own = logits(policy)
    assert not torch.allclose(own, logits(merged), atol=1e-2)
    with ema.open():
        pass
    assert torch.equal(logits(policy), own)  # closing leaves no hook behind


def test_the_lora_average_survives_a_save(tiny_llama):
    policy = lora(tiny_llama())
    ema = teacher("ema", policy, has_adapters=True)
    randomise_adapter(policy, 0)
    ema.update()
    saved = {name: tensor.clone() for name, tensor in ema.state().items()}
    other = teacher("ema", lora(tiny_llama()), has_adapters=True)
    other.load_state(saved)
    with ema.open() as first, other.open() as second:
        assert torch.equal(logits(first), logits(second))


def test_an_adapter_whose_average_is_not_known_is_refused(tiny_llama):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"q_proj .* its average is not known"):
        teacher("ema", get_peft_model(tiny_llama(), config), has_adapters=True)


def test_the_default_teacher_is_ema_and_survives_a_save(tiny_llama):
    policy = tiny_llama()
    ema = teacher(None, policy)
    shift(policy, 1.0)
    ema.update()
    saved = {name: tensor.clone() for name, tensor in ema.state().items()}
    other = teacher(None, tiny_llama(seed=5))
    other.load_state(saved)
    with ema.open() as first, other.open() as second:
        assert torch.equal(logits(first), logits(second))
