"""The trainer's packed steps equal those with a forward for each role, in weights and metrics."""

import dataclasses

import pytest
import tiny_families
import tiny_trainer
import torch
from test_step_under_lora import lora_model

from composer_replication import HintSite
from composer_replication.step.settings import GRPOSettings, StepSettings
from composer_replication.step.tree_forward import TreeOptions
from composer_replication.training.channel_plan import place_sites
from composer_replication.training.packing import Packing
from composer_replication.training.whole_groups import WholeGroups

# TRL's and its dependencies' own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")

STATE = tiny_families.LONG
CASES = {
    "ema": {},
    "live": {"teacher": "live"},
    "frozen": {"teacher": "frozen"},
    "gspo": {"importance_sampling_level": "sequence"},
    "old log-probs": {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.02},
    "two micro-batches": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "cut at nodes": {"tree_max_tokens": 80},
    "entropy bonus and mask": {"top_entropy_quantile": 0.5},
    "alternating": {"channel_schedule": "alternate", "max_steps": 4},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


def run(output_dir, tree, model=None, **changes):
    trainer = tiny_trainer.build_trainer(output_dir, model=model, tree=tree, **changes)
    assert trainer.packing.is_on == (tree != "off")
    return tiny_trainer.train(trainer)


def assert_equal_runs(packed, separate, atol=3e-6):
    (rows, weights), (other_rows, other_weights) = packed, separate
    for name, weight in other_weights.items():
        assert torch.allclose(weights[name], weight, rtol=0, atol=atol), name
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        for name in other:
            if name.endswith(("_s", "time", "num_tokens")) or "step_time" in name:
                continue
            assert row[name] == pytest.approx(other[name], rel=2e-4, abs=2e-5), name


def test_an_unlikely_token_of_a_tool_has_a_ratio_of_1():
    """TRL takes the ratio before it masks, and exp(0 + 109) * 0 is nan in fp32."""
    model = tiny_families.tiny_model("llama_untied", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)  # gaps of some 30 nats, as a trained model has
    settings = StepSettings(grpo=GRPOSettings(temperature=0.3))
    packing = Packing(None, settings, TreeOptions())
    prompts = torch.tensor([[7, 8], [7, 8]])
    completions = torch.tensor([[11, 12, 13, 14], [11, 12, 15, 16]])
    ids = torch.cat([prompts, completions], dim=1)
    old, _ = packing.rollout_scores(model, ids, torch.ones_like(ids), 4)
    assert old.min() < -89
    is_sampled = old > old.sort(dim=1).values[:, :1]
    inputs = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions, "completion_mask": torch.ones_like(completions),
        "tool_mask": is_sampled.long(), "old_per_token_logps": old.detach(),
    }  # fmt: skip
    with packing.shared(model, inputs, (), None):
        logp, _ = packing.rollout_scores(model, ids, torch.ones_like(ids), 4)
    ratio = (logp - old.detach()).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4)
    (ratio * is_sampled).sum().backward()
    assert model.lm_head.weight.grad.isfinite().all()
    assert model.lm_head.weight.grad.norm() > 0


@pytest.mark.parametrize("case", CASES)
def test_a_packed_run_equals_one_with_separate_forwards(case, tmp_path):
    packed, separate = (run(tmp_path / tree, tree, **CASES[case]) for tree in ("auto", "off"))
    assert_equal_runs(packed, separate)


def test_a_packed_run_of_an_adapter_with_kl_equals_one_with_separate_forwards(tmp_path):
    """TRL's reference is the policy with its adapter off, and so is the frozen teacher."""
    packed, separate = (
        run(tmp_path / tree, tree, lora_model("llama").float(), learning_rate=0.01, beta=0.3)
        for tree in ("auto", "off")
    )
    assert_equal_runs(packed, separate)


def test_without_an_extra_channel_the_step_is_trls(tmp_path):
    trainer = tiny_trainer.build_trainer(tmp_path, tree="auto", alpha_sdpo=0.0, beta_replay=0.0)
    assert trainer.packing.label == "separate: no extra channel is on, so the step is TRL's own"


def test_grpo_alone_is_packed_when_asked_and_equals_one_with_separate_forwards(tmp_path):
    without = {"alpha_sdpo": 0.0, "beta_replay": 0.0}
    packed, separate = (run(tmp_path / tree, tree, **without) for tree in ("always", "off"))
    assert_equal_runs(packed, separate)
    # The whole group in one forward of its tree; TRL alone makes one too, of padded rows.
    trainer = tiny_trainer.build_trainer(tmp_path / "counted", tree="always", **without)
    assert trainer.packing.label == "packed"
    assert forwards_with_gradient(trainer) == [1, 1]


def forwards_with_gradient(trainer):
    """How many forwards of the decoder each micro-batch makes with a graph, in a run."""
    counts, seen = [], []
    decoder = trainer.model.get_decoder()
    decoder.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    compute = trainer._compute_loss

    def counted(model, inputs):
        seen.clear()
        loss = compute(model, inputs)
        counts.append(sum(seen))
        return loss

    trainer._compute_loss = counted
    trainer.train()
    return counts


def test_one_forward_of_the_policy_serves_trl_and_every_channel(tmp_path):
    trainer = tiny_trainer.build_trainer(tmp_path, tree="auto")
    assert forwards_with_gradient(trainer) == [1, 1]
    separate = tiny_trainer.build_trainer(tmp_path, tree="off")
    assert forwards_with_gradient(separate) == [4, 4]


def test_old_and_reference_log_probs_come_from_the_packed_forward_too(tmp_path):
    model = lora_model("llama").float()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    trainer = tiny_trainer.build_trainer(
        tmp_path,
        model=model,
        tree="auto",
        beta=0.3,
        num_iterations=2,
        max_steps=2,
        learning_rate=0.0,
    )
    rows, _ = tiny_trainer.train(trainer)
    # The adapter adds 0 and never moves, so every ratio is 1 to the last digits of one kernel.
    assert all(row["kl"] == pytest.approx(0, abs=1e-9) for row in rows)
    assert all(row["clip_ratio/region_mean"] == 0 for row in rows)
    assert all(row["rewards/margins"] == pytest.approx(0, abs=1e-5) for row in rows)


def micro_batches(tmp_path, tree):
    trainer = tiny_trainer.build_trainer(
        tmp_path, tree=tree, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer.train()
    return trainer._buffered_inputs


def test_whole_groups_stay_in_one_micro_batch(tmp_path):
    for batch in micro_batches(tmp_path, "auto"):
        assert torch.equal(batch["prompt_ids"][0], batch["prompt_ids"][1])


def test_regrouping_keeps_every_row_together_with_all_of_its_values():
    prompts = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [5, 6]])
    shuffled = [
        {
            "prompt_ids": prompts[part],
            "prompt_mask": torch.ones_like(prompts[part]),
            "row": torch.arange(6)[part],
            "names": [f"row {i}" for i in range(6)][part],
            "num_items_in_batch": torch.tensor(9.0),
            "tool_mask": None,
        }
        for part in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    groups = WholeGroups()
    # Sampled in another order than the shuffle has them.
    sampled = torch.tensor([[5, 6], [5, 6], [1, 2], [1, 2], [3, 4], [3, 4]])
    planned = groups.note({"prompt_ids": sampled, "prompt_mask": torch.ones_like(sampled)}, 2)
    assert planned == [{(5, 6)}, {(1, 2)}, {(3, 4)}]
    whole = groups.regroup(shuffled)
    assert [batch["row"].tolist() for batch in whole] == [[3, 5], [0, 2], [1, 4]]
    assert [batch["names"] for batch in whole] == [
        ["row 3", "row 5"], ["row 0", "row 2"], ["row 1", "row 4"]
    ]  # fmt: skip
    assert all(batch["num_items_in_batch"] == 9 for batch in whole)
    assert all(batch["tool_mask"] is None for batch in whole)
    assert torch.equal(whole[2]["prompt_ids"], prompts[[1, 4]])


def test_a_group_larger_than_a_micro_batch_is_planned_where_it_goes_on():
    ids = torch.tensor([[0, 7], [0, 7], [0, 7], [8, 9]])
    output = {"prompt_ids": ids, "prompt_mask": torch.tensor([[0, 1]] * 3 + [[1, 1]])}
    assert WholeGroups().note(output, 2) == [{(7,)}, {(7,), (8, 9)}]


def site_after(*ids):
    return HintSite(STATE, "use find", "ls", state_ids=ids, action_ids=(3,), is_on_policy=True)


def test_an_error_turn_is_placed_beside_its_rollout_while_there_is_room():
    prompts = [{(1, 2)}, {(5, 6)}]
    first, later, other = site_after(1, 2), site_after(1, 2, 9, 9), site_after(5, 6)
    assert place_sites([other, first], prompts, 2) == [[first], [other]]
    # A later turn begins with the prompt too; each gets its share of two and no more.
    one_more = site_after(1, 2, 4)
    placed = place_sites([first, later, one_more, other], prompts, 2)
    assert placed == [[first, later], [other, one_more]]
    recorded = HintSite(STATE, "use find", "ls")
    assert place_sites([recorded, first, other], prompts, 2) == [[first, recorded], [other]]
    assert place_sites([first, later, other], None, 2) == [[first, other], [later]]
    assert place_sites([], prompts, 2) == [[], []]


@pytest.mark.parametrize("erring", [(0, 3), (2,), (0, 1, 2, 3)])
def test_sites_of_a_packed_run_share_the_prompt_of_their_micro_batch(tmp_path, erring):
    trainer = tiny_trainer.build_trainer(
        tmp_path,
        tree="auto",
        erring=erring,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    trainer.train()
    num_sites = 0
    for batch, part in zip(trainer._buffered_inputs, trainer._plan, strict=True):
        prompt = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist()
        if "input_ids" not in part.tensors:
            continue
        for ids, mask in zip(
            part.tensors["input_ids"], part.tensors["attention_mask"], strict=True
        ):
            assert ids[mask.bool()].tolist()[: len(prompt)] == prompt
            num_sites += 1
    assert num_sites == len(erring)


def test_a_model_that_a_tree_does_not_reproduce_says_why_and_trains_separately(tmp_path, caplog):
    model = tiny_families.tiny_model("llama", dtype=torch.float32, attention_dropout=0.1)
    trainer = tiny_trainer.build_trainer(tmp_path, model=model, tree="auto")
    assert not trainer.packing.is_on
    assert "drops 10% of its values" in trainer.packing.label
    assert "Every role has a forward of its own" in caplog.text
    rows, _ = tiny_trainer.train(trainer)
    assert len(rows) == 2


def test_a_routers_loss_over_all_tokens_is_a_reason_for_separate_forwards(tmp_path):
    with_loss, without = (
        tiny_trainer.build_trainer(
            tmp_path, tree="auto", family="qwen3_moe", router_aux_loss_coef=coefficient
        )
        for coefficient in (0.1, 0.0)
    )
    assert "router" in with_loss.packing.label
    assert without.packing.label == "packed"


def test_tree_off_is_said_without_a_warning(tmp_path, caplog):
    trainer = tiny_trainer.build_trainer(tmp_path, tree="off")
    assert trainer.packing.label == "separate: tree is off"
    assert "forward of its own" not in caplog.text


def test_a_config_of_trl_packs_by_default():
    fields = {
        field.name: field.default for field in dataclasses.fields(tiny_trainer.ComposerConfig)
    }
    assert fields["tree"] == "auto"
    assert fields["tree_max_tokens"] == 65_536
