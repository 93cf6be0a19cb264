"""Credit files of real runs: every number against the losses, TRL's own included."""

import math
from itertools import groupby

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_training import PAIRS, PROMPTS, SITES, STATE, run
from transformers import AutoModelForCausalLM

from composer_replication import (
    ComposerConfig,
    ComposerReplicationTrainer,
    EnvironmentRollouts,
    HintSite,
)
from composer_replication.batch.batches import StepBatch
from composer_replication.environments.protocol import Observation, ToolError
from composer_replication.losses.sdpo import generalized_jsd
from composer_replication.runs.credit_files import (
    CreditedAction,
    DpoCreditRow,
    GrpoCreditRow,
    SdpoCreditRow,
    read_credit,
)
from composer_replication.step.hidden_states import in_eval_mode
from composer_replication.step.separate import score_actions
from composer_replication.step.settings import SDPOSettings
from composer_replication.training.credit_scores import _site_tile, score_pair_tokens
from composer_replication.training.record_texts import RECORD_TEXTS, record_texts
from composer_replication.training.trl_hooks import GRPOTrainer

CASES = {
    "plain": {},
    "two micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "non-reentrant checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True},
    "weighed by acceptance": {"sdpo_prefix_weight": "acceptance"},
    "lora": {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)},
    "other options": {
        "sdpo_beta": 1.0,
        "sdpo_temperature": 2.0,
        "sdpo_top_k": 50,
        "sdpo_tail": True,
        "sdpo_clip": "token",
        "sdpo_clip_value": 1e-4,
        "dpo_beta": 0.3,
        "dpo_label_smoothing": 0.1,
    },
}


@pytest.fixture
def build(build):
    """Credit is scored by separate forwards, and held against losses that they gave."""
    return lambda **changes: build(**({"tree": "off"} | changes))


def credit_of(tmp_path, step):
    rows = read_credit(tmp_path / "out" / "credit" / f"step_{step:06d}.jsonl")
    return {name: list(group) for name, group in groupby(rows, key=lambda row: row["channel"])}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_every_nth_step_has_a_file_of_rows_of_the_published_types(build, tmp_path):
    run(build(credit_every=2, max_steps=5))
    folder = tmp_path / "out" / "credit"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step_000002.jsonl", "step_000004.jsonl"]
    found = credit_of(tmp_path, 4)
    kinds = {"grpo": GrpoCreditRow, "sdpo": SdpoCreditRow, "dpo": DpoCreditRow}
    assert list(found) == list(kinds)
    for name, kind in kinds.items():
        assert len(found[name]) == 4
        for row in found[name]:
            assert row.keys() == kind.__annotations__.keys()
            assert (row["schema"], row["step"]) == (1, 4)
    for row in found["dpo"]:
        assert (
            row["chosen"].keys() == row["rejected"].keys() == CreditedAction.__annotations__.keys()
        )


def test_rows_say_what_they_are_about(build, tmp_path, smollm2_tokenizer):
    run(build(credit_every=1, max_steps=1))
    found = credit_of(tmp_path, 1)
    for row in found["grpo"]:
        assert row["context"].startswith("<|im_start|>")
        assert "Read file" in row["context"]
        assert row["tokens"] == [smollm2_tokenizer.decode([i]) for i in row["token_ids"]]
    by_source = {site.source: site for site in SITES}
    assert {row["source"] for row in found["sdpo"]} == by_source.keys()
    for row in found["sdpo"]:
        site = by_source[row["source"]]
        assert row["hint"] == site.hint
        assert "".join(row["tokens"]).startswith(site.action)
        assert "Read /src/app.py." in row["context"]
        assert "Use file." not in row["context"]
    by_source = {pair.source: pair for pair in PAIRS}
    assert {row["source"] for row in found["dpo"]} == by_source.keys()
    for row in found["dpo"]:
        pair = by_source[row["source"]]
        assert "".join(row["chosen"]["tokens"]).startswith(pair.chosen)
        assert "".join(row["rejected"]["tokens"]).startswith(pair.rejected)
        assert row["context"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("case", ["plain", "two micro-batches"])
def test_on_policy_dr_grpo_credits_each_token_its_advantage_over_the_steps_size(
    build, tmp_path, case
):
    """dr_grpo divides by 4 rollouts of at most 6 tokens, whatever the micro-batches."""
    run(build(credit_every=1, max_steps=1, **CASES[case]))
    rows = credit_of(tmp_path, 1)["grpo"]
    assert any(row["advantage"] != 0 for row in rows)
    for row in rows:
        assert all(row["is_sampled"])
        assert row["credit"] == pytest.approx([row["advantage"] / 24] * len(row["credit"]))


OBJECTIVES = {
    "dr_grpo with a KL term": {"beta": 0.5},
    "grpo, sequence ratios": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dapo, narrow clip": {"loss_type": "dapo", "epsilon": 1e-3},
    "sapo": {"loss_type": "sapo"},
    "two micro-batches": CASES["two micro-batches"],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_grpo_credit_is_the_finite_difference_of_trls_loss_at_each_token(
    build, tmp_path, tiny_model_dir, objective
):
    """The second step over the same rollouts: off-policy, so that ratios and clips matter."""
    trainer = build(
        # TRL reads the KL term's reference where the policy came from.
        model=AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32),
        hint_sites=None,
        pairs=None,
        credit_every=2,
        num_iterations=2,
        learning_rate=3e-3,
        **OBJECTIVES[objective],
    )
    seen = []
    compute = trainer._compute_loss

    def spy(model, inputs):
        seen.append({name: value for name, value in inputs.items() if value is not None})
        return compute(model, inputs)

    trainer._compute_loss = spy
    run(trainer)
    rows = credit_of(tmp_path, 2)["grpo"]
    micro_batches = seen[len(seen) // 2 :]
    num_rows = len(rows) // len(micro_batches)
    trainer.model.train()

    def loss_at(inputs, logp):
        trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
            logp,
            torch.zeros_like(logp),
            None,
        )
        return GRPOTrainer._compute_loss(trainer, trainer.model, inputs).item()

    for number, inputs in enumerate(micro_batches):
        inputs = {
            k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        here = rows[number * num_rows : (number + 1) * num_rows]
        logp = torch.tensor([row["policy_logp"] for row in here], dtype=torch.float64)
        assert not torch.equal(logp, inputs["old_per_token_logps"])
        for place in range(logp.numel()):
            step = torch.zeros(logp.numel(), dtype=torch.float64)
            step[place] = 1e-6
            step = step.reshape(logp.shape)
            difference = loss_at(inputs, logp + step) - loss_at(inputs, logp - step)
            row, token = divmod(place, logp.shape[1])
            assert here[row]["credit"][token] == pytest.approx(-difference / 2e-6, abs=1e-6), place
    if objective == "dapo, narrow clip":
        assert any(0.0 in row["credit"] for row in rows)


@pytest.mark.parametrize("case", CASES)
def test_sdpo_rows_sum_to_what_the_channel_adds_to_the_loss(build, tmp_path, case):
    changes = {"alpha_sdpo": 2.0, "learning_rate": 1e-2} | CASES[case]
    logged = run(build(credit_every=1, **changes))
    for step, metrics in enumerate(logged, 1):
        rows = credit_of(tmp_path, step)["sdpo"]
        total = sum(sum(row["divergence"]) * row["loss_weight"] for row in rows)
        assert total == pytest.approx(2.0 * metrics["loss/sdpo"], rel=1e-4)
        assert sum(len(row["token_ids"]) for row in rows) == metrics["tokens/sdpo"]
        assert {row["loss_weight"] for row in rows} == {2.0 / metrics["tokens/sdpo"]}


@pytest.mark.parametrize("case", CASES)
def test_dpo_credits_sum_to_the_slope_of_the_pairs_loss(build, tmp_path, case):
    """Chosen: weight/pairs * beta * ((1 - e) sigmoid(-m) - e sigmoid(m)) a token, e smoothing."""
    changes = {"beta_replay": 0.5, "learning_rate": 1e-2} | CASES[case]
    pairs = [
        type(pair)(pair.state, pair.chosen, pair.rejected, 1.0 + i, source=pair.source)
        for i, pair in enumerate(PAIRS)
    ]
    trainer = build(credit_every=1, pairs=pairs, **changes)
    logged = run(trainer)
    beta, smoothing = trainer.args.dpo_beta, trainer.args.dpo_label_smoothing
    for step, metrics in enumerate(logged, 1):
        rows = credit_of(tmp_path, step)["dpo"]
        assert {row["pair_weight"] for row in rows} == {1.0, 2.0, 3.0, 4.0}
        losses = 0.0
        for row in rows:
            m, weight = row["margin"], row["pair_weight"]
            slope = beta * ((1 - smoothing) * sigmoid(-m) - smoothing * sigmoid(m))
            for side, sign in (("chosen", 1), ("rejected", -1)):
                credit = row[side]["credit"]
                expected = sign * 0.5 * weight / 4 * slope * len(row[side]["token_ids"])
                assert sum(credit) == pytest.approx(expected, rel=1e-4)
                assert len(set(credit)) == 1
            losses += (
                weight
                / 4
                * ((smoothing - 1) * math.log(sigmoid(m)) - smoothing * math.log(sigmoid(-m)))
            )
        assert losses == pytest.approx(metrics["loss/dpo"], rel=1e-4)
    assert any(abs(row["margin"]) > 1e-3 for row in rows)


def test_pair_tokens_sum_to_the_channels_own_scores(build):
    trainer = build()
    trainer.model.train()
    tensors, _ = trainer.collator.collate_pairs(PAIRS)
    references = torch.arange(4.0)
    tensors |= {"dpo_chosen_ref_logprobs": references, "dpo_rejected_ref_logprobs": -references}
    found = score_pair_tokens(trainer.model, tensors, trainer.step_settings)
    with torch.no_grad(), in_eval_mode(trainer.model):
        sums = [score_actions(trainer.model, tensors, f"dpo_{s}") for s in ("chosen", "rejected")]
    for tokens, expected in zip(found[:2], sums, strict=True):
        total = torch.zeros(4).index_add(0, tokens.places[:, 0], tokens.policy_logp)
        assert torch.allclose(total, expected, rtol=1e-6)
    margins = 0.1 * ((sums[0] - references) - (sums[1] + references))
    assert torch.allclose(found[2], margins, atol=1e-5)
    assert trainer.model.training


DIVERGENCES = [
    SDPOSettings(beta=0.0),
    SDPOSettings(beta=0.5),
    SDPOSettings(beta=1.0),
    SDPOSettings(beta=1.0, temperature=3.0),
    SDPOSettings(beta=0.3, top_k=4, tail=True),
    SDPOSettings(beta=0.3, top_k=4, top_k_from="policy"),
]


@pytest.mark.parametrize("settings", DIVERGENCES, ids=str)
def test_sdpo_slope_is_the_finite_difference_along_the_tokens_own_logit(settings):
    """Clipping is left out: its factor is a constant to autograd and none to a difference."""
    generator = torch.Generator().manual_seed(3)
    policy, teacher = torch.randn(2, 5, 9, dtype=torch.float64, generator=generator) * 2
    token_ids = torch.tensor([0, 3, 8, 2, 2])
    found = _site_tile(policy.clone(), teacher, token_ids, settings)

    def at(offset):
        moved = policy.clone()
        moved[torch.arange(5), token_ids] += offset
        divergence = generalized_jsd(
            moved,
            teacher,
            beta=settings.beta,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_k_from=settings.top_k_from,
            tail=settings.tail,
        )
        logp = (moved / settings.temperature).log_softmax(-1)
        return divergence, logp[torch.arange(5), token_ids]

    (above, above_logp), (below, below_logp) = at(1e-5), at(-1e-5)
    assert torch.allclose(found.slope, (above - below) / (above_logp - below_logp), atol=1e-8)
    divergence, logp = at(0.0)
    assert torch.allclose(found.divergence, divergence, atol=1e-14)
    assert torch.allclose(found.policy_logp, logp, atol=1e-14)


def test_sdpo_credit_follows_the_teacher_where_both_choose_between_two_tokens():
    """Reverse KL of (p, 1-p) from (t, 1-t): dD/d(log p) = p (log(p/t) - log((1-p)/(1-t)))."""
    p, t = 0.8, 0.3
    logits = [torch.tensor([[q, 1 - q]], dtype=torch.float64).log() for q in (p, t)]
    found = _site_tile(*logits, torch.tensor([0]), SDPOSettings(beta=1.0))
    expected = p * (math.log(p / t) - math.log((1 - p) / (1 - t)))
    assert found.slope.item() == pytest.approx(expected, rel=1e-12)
    assert found.teacher_logp.item() == pytest.approx(math.log(t), rel=1e-12)


def test_an_empty_hint_under_the_live_teacher_credits_nothing(build, tmp_path):
    sites = [HintSite(STATE, "", '{"path": 1}', source="empty")]
    run(build(hint_sites=sites, teacher="live", credit_every=1, max_steps=1))
    for row in credit_of(tmp_path, 1)["sdpo"]:
        assert row["hint"] == ""
        for name in ("divergence", "teacher_minus_policy_logp", "credit"):
            assert row[name] == pytest.approx([0.0] * len(row[name]), abs=1e-10), name


def test_the_sites_logps_are_those_of_the_models_own_logits(build, tmp_path, tiny_llama):
    trainer = build(credit_every=1, max_steps=1)
    run(trainer)
    row = credit_of(tmp_path, 1)["sdpo"][0]
    site = next(site for site in SITES if site.source == row["source"])
    student, teacher, _ = trainer.collator.site_rows(site)
    model = tiny_llama()
    found = []
    for sequence in (student, teacher):
        with torch.no_grad():
            logits = model(torch.tensor([sequence.token_ids])).logits[0]
        start = len(sequence.context_ids)
        logp = logits[start - 1 : -1].log_softmax(-1)
        found.append(logp[range(len(row["token_ids"])), row["token_ids"]])
    assert row["policy_logp"] == pytest.approx(found[0].tolist(), abs=1e-5)
    difference = (found[1] - found[0]).tolist()
    assert row["teacher_minus_policy_logp"] == pytest.approx(difference, abs=2e-5)
    assert max(map(abs, difference)) > 1e-3


def test_where_channels_alternate_a_step_has_rows_of_its_own_channels(build, tmp_path):
    run(build(channel_schedule="alternate", credit_every=1))
    assert list(credit_of(tmp_path, 1)) == ["grpo", "sdpo"]
    assert list(credit_of(tmp_path, 2)) == ["grpo", "dpo"]


def test_texts_of_records_travel_as_a_tensor(build):
    collator = build(credit_every=1).collator
    tensors = collator(StepBatch(hint_sites=(SITES[1],)))
    assert tensors[RECORD_TEXTS].dtype == torch.uint8
    assert record_texts(tensors) == {
        "sites": [{"source": "s1", "hint": SITES[1].hint}],
        "pair_sources": [],
    }


def test_rows_planned_without_texts_have_empty_ones(build):
    """A checkpoint inside a generation may come from a run that wrote no credit."""
    tensors = build().collator(StepBatch(hint_sites=(SITES[0], SITES[1])))
    assert record_texts(tensors)["sites"] == [{"source": "", "hint": ""}] * 2


class ErrsOnce:
    """Answers the first action with an error and ends after the second; rewards differ."""

    rewards = 0

    def reset(self, **row):
        self.num_actions = 0

    def _step_text(self, action):
        self.num_actions += 1
        error = ToolError("bad_key", "Wrong key.", "file") if self.num_actions == 1 else None
        return Observation("error: wrong key", is_done=self.num_actions == 2, error=error)

    def get_reward(self):
        ErrsOnce.rewards += 1
        return float(ErrsOnce.rewards % 3)


def test_what_the_environment_wrote_has_credit_0_and_its_error_turns_are_sites(
    tmp_path, tiny_llama, smollm2_tokenizer
):
    trainer = ComposerReplicationTrainer(
        tiny_llama(),
        args=ComposerConfig(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=64,
            max_steps=1,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            credit_every=1,
        ),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=smollm2_tokenizer,
        rollout_func=EnvironmentRollouts(ErrsOnce, PROMPTS, max_turns=2, max_action_tokens=5),
    )
    run(trainer)
    found = credit_of(tmp_path, 1)
    for row in found["grpo"]:
        written = [i for i, is_sampled in enumerate(row["is_sampled"]) if not is_sampled]
        assert "wrong key" in "".join(row["tokens"][i] for i in written)
        for i, credit in enumerate(row["credit"]):
            expected = 0.0 if i in written else row["advantage"] / (4 * 64)
            assert credit == pytest.approx(expected)
    assert any(row["advantage"] != 0 for row in found["grpo"])
    assert len(found["sdpo"]) == 2
    for row in found["sdpo"]:
        assert row["hint"].startswith("Hint: Wrong key.")
        actions = ["".join(other["tokens"]) for other in found["grpo"]]
        assert any(action.startswith("".join(row["tokens"])) for action in actions)
