"""Each planted fault fails the check that is there for it, and the cause says what is wrong.

The runs are smokes of a tiny model at fixed shapes; only the fault differs.
"""

import json
from dataclasses import asdict

import pytest
from planted_faults import plant

from composer_replication.batch import collate, render
from composer_replication.cli import main
from composer_replication.config.loading import load_config
from composer_replication.experiments import trl_parity
from composer_replication.experiments.quiet_libraries import quiet_libraries, without_printed_logs
from composer_replication.experiments.smoke_checks import SmokeChecks
from composer_replication.experiments.trainer_setup import (
    build_trainer,
    device,
    load_run_model,
    prepare,
)
from composer_replication.losses import divergence
from composer_replication.runs.run_directory import RunDirectory
from composer_replication.step import channels, packed, separate
from composer_replication.training import packing, references, resume_state, trainer
from composer_replication.training.metrics import StepMetricsCallback
from composer_replication.training.trainer import ComposerReplicationTrainer

SIZES = [
    "--fixed-shapes", "2,96", "--steps", "2",
    "--set", "grpo.num_generations=2",
    "--set", "grpo.per_device_train_batch_size=2",
    "--set", "grpo.max_completion_length=24",
    "--set", "grpo.learning_rate=1e-3",
    "--set", "grpo.bf16=false",
]  # fmt: skip


@pytest.fixture
def smoke(tiny_model_dir, tmp_path):
    """`smoke(*options)` -> the checks of a whole smoke by name."""

    def run(*options):
        out = tmp_path / "run"
        code = main(["smoke", "--model", str(tiny_model_dir), "--out", str(out), *SIZES, *options])
        assert not (out / "checkpoints").exists()
        assert not (out / "resume_check").exists()
        checks = json.loads((out / "summary.json").read_text())["checks"]
        assert code == (0 if all(check["passed"] for check in checks) else 1)
        return checks

    return run


@pytest.fixture
def judge(tiny_model_dir, tmp_path):
    """`judge(*settings)` -> the same checks without the resume, which takes a second trainer."""

    def run(*settings):
        values = [value for value in SIZES[5::2] if value != "--set"]
        fixed = [f'model="{tiny_model_dir}"', "smoke.fixed_shapes=[2, 96]"]
        # Faults are planted in separate forwards; a packed step beside them would only differ.
        config = load_config(None, ["tree=off", *fixed, *values, *settings])
        length = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
        with RunDirectory.create(tmp_path / "run", resume=False) as folder, quiet_libraries():
            parts = prepare(config, folder, overrides=length)
            metrics = StepMetricsCallback(device(), list, list)
            trainer = build_trainer(parts, load_run_model(parts, print), [metrics])
            without_printed_logs(trainer)
            checks = SmokeChecks(trainer)
            trainer.train()
            return [asdict(check) for check in checks.judge(metrics.rows)]

    return run


def failed(checks, *names):
    """The causes of the failed checks, which are exactly `names`."""
    wrong = {check["name"]: check["cause"] for check in checks if not check["passed"]}
    assert set(wrong) == set(names), wrong
    return wrong


def test_without_a_fault_every_check_passes_with_value_and_bound(smoke):
    checks = smoke()
    assert [check["name"] for check in checks] == [
        "channels_live/grpo", "channels_live/sdpo", "channels_live/dpo", "parameters_moved",
        "hint_effect", "dpo_reference", "gradient_rows", "token_alignment", "zero_weight_parity",
        "packed_parity", "resume",
    ]  # fmt: skip
    for check in checks:
        assert check["passed"]
        assert check["value"] is not None
        assert check["bound"] is not None
        assert check["cause"] is None


# ---- channels_live --------------------------------------------------------------------------


def test_sdpo_that_returns_a_zero_in_the_graph_is_a_dead_channel(judge, monkeypatch):
    plant(monkeypatch, ComposerReplicationTrainer, "_compute_sdpo_loss",
          'return self._normalised("sdpo", model, inputs)',
          "return sum(p.sum() for p in model.parameters()) * 0.0")  # fmt: skip
    causes = failed(judge(), "channels_live/sdpo", "hint_effect", "gradient_rows")
    assert "exactly 0 at every step" in causes["channels_live/sdpo"]
    assert "No forward read the teacher's rows" in causes["gradient_rows"]


@pytest.mark.parametrize(("channel", "method", "also"), [
    ("sdpo", "_compute_sdpo_loss", ["gradient_rows"]),
    ("dpo", "_compute_trace_replay_loss", []),
])  # fmt: skip
def test_a_detached_channel_has_a_loss_and_moves_nothing(judge, monkeypatch, channel, method, also):
    plant(monkeypatch, ComposerReplicationTrainer, method, "model, inputs)\n",
          "model, inputs).detach()\n")  # fmt: skip
    causes = failed(judge(), f"channels_live/{channel}", *also)
    assert "detached from the policy" in causes[f"channels_live/{channel}"]


def test_a_channel_that_is_logged_and_not_added_is_found_by_its_gradient(judge, monkeypatch):
    plant(monkeypatch, ComposerReplicationTrainer, "_weighted_losses",
          "* losses[name]", "* losses[name].detach()")  # fmt: skip
    causes = failed(judge(), "channels_live/sdpo", "channels_live/dpo")
    assert "100% of the sdpo channel's own gradient is missing" in causes["channels_live/sdpo"]


def test_a_weight_that_is_not_applied_is_found_by_the_sum(judge, monkeypatch):
    plant(monkeypatch, ComposerReplicationTrainer, "_weighted_losses",
          "self.channel_weights[name] *",
          '(2.0 if name == "dpo" else 1.0) * self.channel_weights[name] *')  # fmt: skip
    causes = failed(judge(), "channels_live/dpo")
    assert "weighted sum of its channels" in causes["channels_live/dpo"]


def test_channels_that_should_take_turns_and_do_not_are_found(judge, monkeypatch):
    monkeypatch.setattr(trainer, "scheduled", lambda channels, schedule, step: tuple(channels))
    found = judge("batch.channel_schedule=alternate")
    causes = failed(found, "channels_live/sdpo", "channels_live/dpo")
    assert "the schedule 'alternate' gives it none there" in causes["channels_live/dpo"]


# ---- dpo_reference --------------------------------------------------------------------------


def test_invented_references_are_told_by_how_many_nats_they_are_off(smoke, monkeypatch, capsys):
    plant(monkeypatch, references, "fill_references",
          "ref_chosen_logp=chosen, ref_rejected_logp=rejected",
          "ref_chosen_logp=-30.0, ref_rejected_logp=-35.0")  # fmt: skip
    causes = failed(smoke(), "dpo_reference")
    assert "nats away from the policy's own log-prob" in causes["dpo_reference"]
    assert "instead of 0.6931" in causes["dpo_reference"]
    shown = capsys.readouterr().out
    assert "check dpo_reference: " in shown
    assert "checks  10 of 11 passed" in shown


def test_references_shifted_alike_keep_log_2_and_are_found_all_the_same(judge, monkeypatch):
    plant(monkeypatch, references, "fill_references",
          "ref_chosen_logp=chosen, ref_rejected_logp=rejected",
          "ref_chosen_logp=chosen - 1, ref_rejected_logp=rejected - 1")  # fmt: skip
    causes = failed(judge(), "dpo_reference")
    assert "is 1 nats away" in causes["dpo_reference"]


def test_right_references_that_the_loss_mixes_up_are_found(judge, monkeypatch):
    plant(monkeypatch, collate, "_reference_sums", "torch.tensor(rejected,", "torch.tensor(chosen,")
    causes = failed(judge(), "dpo_reference")
    assert "does not compare each side with its own reference" in causes["dpo_reference"]


# ---- hint_effect ----------------------------------------------------------------------------


def test_a_hint_that_is_not_inserted_is_found(judge, monkeypatch):
    plant(monkeypatch, render, "with_hint", "if not hint:", "if True:")
    causes = failed(judge(), "hint_effect")
    assert "is not in the teacher's row" in causes["hint_effect"]


def test_one_hint_for_every_site_is_found(judge, monkeypatch):
    plant(monkeypatch, render, "insert_hint", "with_hint(site.state, site.hint, placement)",
          'with_hint(site.state, site.hint and "Hint: be good.", placement)')  # fmt: skip
    monkeypatch.setattr(collate, "insert_hint", render.insert_hint)
    causes = failed(judge(), "hint_effect")
    assert "does not hold the words of the hint" in causes["hint_effect"]


def test_a_teacher_that_is_scored_on_the_students_rows_is_found(judge, monkeypatch):
    score = separate.score_hint_sites

    def without_hint(model, tensors, settings, teacher, **options):
        rows = {
            "ctx_teacher_input_ids": tensors["input_ids"],
            "ctx_teacher_attention_mask": tensors["attention_mask"],
            "sdpo_teacher_index": tensors["sdpo_student_index"],
        }
        return score(model, {**tensors, **rows}, settings, teacher)

    monkeypatch.setattr(separate, "score_hint_sites", without_hint)
    causes = failed(judge(), "hint_effect", "gradient_rows")
    assert "no more than rounding does" in causes["hint_effect"]
    assert "No forward read the teacher's rows" in causes["gradient_rows"]


# ---- gradient_rows, token_alignment ---------------------------------------------------------


def test_index_lists_that_are_off_by_one_are_found_though_they_agree(judge, monkeypatch):
    """Both sides are shifted alike, so comparing their tokens with each other shows nothing."""
    plant(monkeypatch, collate.ComposerDataCollator, "_pad_rows",
          "[0] * len(row.context_ids) + [1] * len(row.action_ids)",
          "[0] * (len(row.context_ids) - 1) + [1] * len(row.action_ids) + [0]")  # fmt: skip
    causes = failed(judge(), "gradient_rows", "token_alignment")
    assert "the site's record has token" in causes["token_alignment"]
    assert "predict no action token" in causes["gradient_rows"]


def test_a_student_that_sees_the_hint_is_found(judge, monkeypatch):
    plant(monkeypatch, collate.ComposerDataCollator, "site_rows",
          "_without(state_ids, cut),", "_without(hinted_ids, cut),")  # fmt: skip
    causes = failed(judge(), "hint_effect", "gradient_rows", "token_alignment")
    assert "must see the original context" in causes["token_alignment"]


def test_scores_read_one_row_too_late_are_found(judge, monkeypatch):
    plant(monkeypatch, separate, "score_hint_sites",
          'rows_before(policy_hidden, tensors["sdpo_student_index"])',
          'rows_before(policy_hidden, tensors["sdpo_student_index"] + torch.tensor([0, 1]))'
    )  # fmt: skip
    causes = failed(judge(), "hint_effect", "gradient_rows")
    assert "predict no action token" in causes["gradient_rows"]


def test_a_gradient_on_rows_of_the_prompt_is_found(judge, monkeypatch):
    plant(monkeypatch, separate, "score_hint_sites",
          "divergence = fused_generalized_jsd(",
          "push = 1e-6 * policy_hidden.sum()\n    "
          "divergence = (push - push.detach()) + fused_generalized_jsd(")  # fmt: skip
    causes = failed(judge(), "gradient_rows")
    assert "prompt, hint or padding tokens are trained on" in causes["gradient_rows"]


def test_a_live_teacher_that_is_not_cut_off_from_the_gradient_is_found(judge, monkeypatch):
    plant(monkeypatch, separate, "score_hint_sites", "with torch.no_grad(), (", "with (")
    causes = failed(judge("teacher=live"), "gradient_rows")
    assert "teacher's hidden states carry a gradient" in causes["gradient_rows"]


# ---- zero_weight_parity ---------------------------------------------------------------------


def test_a_term_that_no_weight_controls_is_found(judge, monkeypatch):
    plant(monkeypatch, ComposerReplicationTrainer, "_weighted_losses",
          "losses = {", "loss = loss + 1e-6 * next(model.parameters()).sum()\n    losses = {"
    )  # fmt: skip
    causes = failed(judge(), "zero_weight_parity")
    assert "would not be GRPO" in causes["zero_weight_parity"]


def test_a_loss_that_draws_random_numbers_is_found(judge, monkeypatch):
    plant(monkeypatch, ComposerReplicationTrainer, "_weighted_losses",
          "losses = {", "torch.rand(1)\n    losses = {")  # fmt: skip
    causes = failed(judge(), "zero_weight_parity")
    assert "another random state" in causes["zero_weight_parity"]


# ---- packed_parity --------------------------------------------------------------------------


def test_a_packed_forward_at_another_temperature_is_found(judge, monkeypatch):
    old = '"rollouts": settings.grpo.temperature'
    plant(monkeypatch, packed, "score_packed", old, '"rollouts": 2.0')
    monkeypatch.setattr(packing, "score_packed", packed.score_packed)
    causes = failed(judge("tree=auto"), "packed_parity")
    assert "of its norm" in causes["packed_parity"]


def test_a_small_term_that_the_packed_forward_detaches_is_found(judge, monkeypatch):
    """SDPO's weight is a tenth, so its gradient hardly shows in that of the whole loss."""
    plant(monkeypatch, packed, "score_packed", "divergence=values.divergence",
          "divergence=None if values.divergence is None else "
          "values.divergence.detach().requires_grad_()")  # fmt: skip
    monkeypatch.setattr(packing, "score_packed", packed.score_packed)
    causes = failed(judge("tree=auto"), "packed_parity")
    assert "The packed gradient of sdpo differs" in causes["packed_parity"]


# ---- resume ---------------------------------------------------------------------------------


def test_a_checkpoint_without_the_teacher_is_found(smoke, monkeypatch):
    plant(monkeypatch, resume_state, "load_run_state",
          "run.teacher.load_state(load_file(folder / TEACHER_FILE))", "pass")  # fmt: skip
    monkeypatch.setattr(trainer, "load_run_state", resume_state.load_run_state)
    assert "The teacher" in failed(smoke(), "resume")["resume"]


def test_a_checkpoint_without_the_loaders_places_is_found(smoke, monkeypatch):
    plant(monkeypatch, resume_state, "load_run_state", "positions[name]", "0")
    monkeypatch.setattr(trainer, "load_run_state", resume_state.load_run_state)
    assert "place in the hint sites or pairs" in failed(smoke(), "resume")["resume"]


def test_a_checkpoint_without_the_optimizer_is_found(smoke, monkeypatch):
    monkeypatch.setattr(
        ComposerReplicationTrainer, "_load_optimizer_and_scheduler", lambda self, folder: None
    )
    assert "not restored" in failed(smoke(), "resume")["resume"]


def test_a_checkpoint_that_cannot_be_read_is_the_resumes_verdict(smoke, monkeypatch):
    def refuse(*arguments):
        raise OSError("the file is gone")

    monkeypatch.setattr(resume_state, "load_file", refuse)
    assert "OSError: the file is gone" in failed(smoke(), "resume")["resume"]


def test_a_channel_that_was_asked_for_and_is_not_weighed_is_found(smoke, monkeypatch):
    plant(monkeypatch, trainer, "channel_weights", "if weight > 0}", "if weight > 0.06}")
    causes = failed(smoke(), "channels_live/dpo")
    assert "gives dpo the weight 0.05 and the trainer 0.0" in causes["channels_live/dpo"]


def test_a_weight_of_0_that_becomes_the_default_is_found(judge, monkeypatch):
    old = "given if given is not None else default"
    plant(monkeypatch, trl_parity, "channel_weights", old, "given if given else default")
    failed(judge(), "zero_weight_parity")


def test_references_that_the_loss_never_reads_are_found_though_it_is_log_2(judge, monkeypatch):
    old, new = "_single(ref_chosen_logp.detach())", "_single(policy_chosen_logp.detach())"
    plant(monkeypatch, channels, "dpo_loss", old, new)
    causes = failed(judge(), "dpo_reference")
    assert "does not read the stored references" in causes["dpo_reference"]


def test_a_teacher_that_is_read_at_the_students_positions_is_found(judge, monkeypatch):
    old, new = 'tensors["sdpo_teacher_index"]', 'tensors["sdpo_student_index"]'
    plant(monkeypatch, separate, "score_hint_sites", old, new)
    assert "Another row of the teacher" in failed(judge(), "gradient_rows")["gradient_rows"]


def test_a_divergence_whose_gradient_lacks_a_factor_is_found(judge, monkeypatch):
    plant(monkeypatch, divergence, "_mixture_terms_", ".mul_(beta - 1)", ".neg_()")
    assert "100% away" in failed(judge(), "gradient_rows")["gradient_rows"]


def test_a_collator_without_index_lists_fails_every_check_of_sdpo_in_words(judge, monkeypatch):
    old = '"sdpo_student_index": student_index,'
    plant(monkeypatch, collate.ComposerDataCollator, "_collate_sites", old, "")
    names = ("channels_live/sdpo", "hint_effect", "gradient_rows", "token_alignment")
    assert "no action token" in failed(judge(), *names)["hint_effect"]
