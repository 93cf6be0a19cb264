"""Whole runs of the trainer equal a run written out plainly in float64, one row at a time."""

import copy

import pytest
import slow_training
import tiny_families
import tiny_trainer
import torch

# TRL's and its dependencies' own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = tiny_trainer.PAIRS
ATOL = 3e-6
"""Weights, of size up to 2: about ten float32 roundings."""


def start(family="llama"):
    return tiny_families.tiny_model(family, dtype=torch.float32)


def plain_run(trainer, model=None, teacher_kind="ema", base=None, **settings):
    """The oracle's run over the rollouts that the trainer generated."""
    return slow_training.train(
        model or start(),
        trainer.rollout_func.generations,
        PAIRS,
        slow_training.Settings(**settings),
        teacher_kind,
        base,
    )


def assert_equal_runs(run, expected, atol=ATOL):
    rows, weights = run
    expected_rows, expected_weights = expected
    for row, losses in zip(rows, expected_rows, strict=True):
        for name, loss in losses.items():
            assert row[f"loss/{name}"] == pytest.approx(loss, rel=2e-5, abs=1e-6), name
        assert {name for name in row if name.startswith("loss/")} == {f"loss/{n}" for n in losses}
    for name, weight in expected_weights.items():
        assert torch.allclose(weights[name].double(), weight, rtol=0, atol=atol), name


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_every_accumulation_equals_the_plain_run(tmp_path, accumulation):
    """Three of four rollouts have an error turn, so some micro-batches have no site of SDPO."""
    trainer = tiny_trainer.build_trainer(
        tmp_path,
        erring=(0, 2, 3),
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    assert_equal_runs(tiny_trainer.train(trainer), plain_run(trainer))


@pytest.mark.parametrize(
    ("loss_type", "steps_per_generation"),
    # TRL's dapo divides by tokens of the whole generation; grpo by rollouts; bnpo by the tokens of
    # a micro-batch, so that one does depend on accumulation. Two steps a generation are off-policy.
    [("dapo", 1), ("grpo", 1), ("dr_grpo", 2), ("dapo", 2)],
)
def test_accumulation_changes_nothing_under_other_losses_and_longer_generations(
    tmp_path, loss_type, steps_per_generation
):
    runs = [
        tiny_trainer.train(
            tiny_trainer.build_trainer(
                tmp_path / str(accumulation),
                erring=(0, 2, 3),
                loss_type=loss_type,
                per_device_train_batch_size=4 // accumulation,
                gradient_accumulation_steps=accumulation,
                steps_per_generation=accumulation * steps_per_generation,
                max_steps=4,
                learning_rate=0.1,
            )
        )
        for accumulation in (1, 2, 4)
    ]
    (rows, weights), *others = runs
    for other_rows, other_weights in others:
        for name, weight in weights.items():
            assert torch.allclose(other_weights[name], weight, rtol=0, atol=ATOL), name
        for row, other in zip(rows, other_rows, strict=True):
            for name in ("loss/grpo", "loss/sdpo", "loss/dpo", "tokens/sdpo", "pairs/dpo"):
                assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("family", ["qwen2_untied", "qwen3", "gemma2", "gemma3", "granite", "phi"])
def test_the_trainer_equals_the_plain_run_on_every_kind_of_head_and_attention(tmp_path, family):
    trainer = tiny_trainer.build_trainer(tmp_path, family=family)
    assert_equal_runs(tiny_trainer.train(trainer), plain_run(trainer, start(family)))


@pytest.mark.parametrize("teacher_kind", ["frozen", "live"])
def test_every_teacher_equals_the_plain_run(tmp_path, teacher_kind):
    """The moving average is the teacher of all other tests here."""
    trainer = tiny_trainer.build_trainer(tmp_path, teacher=teacher_kind)
    assert_equal_runs(tiny_trainer.train(trainer), plain_run(trainer, teacher_kind=teacher_kind))


@pytest.mark.parametrize("erring", [(), (1,), (0, 1, 2, 3)])
def test_any_mixture_of_rollouts_with_and_without_error_turns_equals_the_plain_run(
    tmp_path, erring
):
    trainer = tiny_trainer.build_trainer(tmp_path, erring=erring)
    rows, weights = tiny_trainer.train(trainer)
    assert_equal_runs((rows, weights), plain_run(trainer))
    for row, generation in zip(rows, trainer.rollout_func.generations, strict=True):
        sites = [site for rollout in generation for site in rollout["rollout_hint_sites"]]
        assert len(sites) == len(erring)
        assert row["tokens/sdpo"] == sum(len(site.action_ids) for site in sites)
        assert row["pairs/dpo"] == 4
        assert row["tokens/grpo"] == sum(sum(rollout["env_mask"]) for rollout in generation)


def test_alternating_channels_train_one_extra_channel_a_step_and_equal_the_plain_run(tmp_path):
    trainer = tiny_trainer.build_trainer(tmp_path, channel_schedule="alternate", max_steps=4)
    rows, weights = tiny_trainer.train(trainer)
    expected = plain_run(trainer, schedule=(("sdpo",), ("dpo",)), num_steps=4)
    # Also holds which loss rows each step has.
    assert_equal_runs((rows, weights), expected)
    assert [row["pairs/dpo"] for row in rows] == [0, 4, 0, 4]
    assert [row["tokens/sdpo"] > 0 for row in rows] == [True, False, True, False]
    assert [row["tokens/grpo"] > 0 for row in rows] == [True] * 4


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_both_kinds_of_gradient_checkpointing_equal_the_plain_run(tmp_path, family, use_reentrant):
    trainer = tiny_trainer.build_trainer(
        tmp_path,
        family=family,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert_equal_runs(tiny_trainer.train(trainer), plain_run(trainer, start(family)))


@pytest.mark.parametrize("teacher_kind", ["frozen", "live"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_under_lora_the_trainer_equals_the_plain_run(tmp_path, teacher_kind, checkpointing):
    """`checkpointing` is None for none, else use_reentrant. The reference is the base model."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(
            start(),
            LoraConfig(
                r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
            ),
        )
    before = copy.deepcopy(model)
    trainer = tiny_trainer.build_trainer(
        tmp_path,
        model=model,
        teacher=teacher_kind,
        learning_rate=0.01,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": bool(checkpointing)},
    )
    run = tiny_trainer.train(trainer)
    expected = plain_run(
        trainer, before, teacher_kind=teacher_kind, base=start(), learning_rate=0.01
    )
    assert_equal_runs(run, expected)
    moved = {n for n, p in before.named_parameters() if not torch.equal(p, run[1][n])}
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi"])
def test_bf16_autocast_in_the_trainer_stays_near_the_plain_float64_run(tmp_path, family):
    """The losses of the first step: 2 % is five roundings of bf16 (2 ** -8)."""
    trainer = tiny_trainer.build_trainer(tmp_path, family=family, bf16=True, max_steps=1)
    rows, weights = tiny_trainer.train(trainer)
    ((expected,), _) = plain_run(trainer, start(family), num_steps=1)
    for name, loss in expected.items():
        assert rows[0][f"loss/{name}"] == pytest.approx(loss, rel=0.02, abs=1e-4), name
    assert all(weight.dtype == torch.float32 for weight in weights.values())
