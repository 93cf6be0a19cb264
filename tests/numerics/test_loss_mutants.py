"""Break each loss on purpose and see the named claims fail, so that a green suite means something.

A mutant is the module's source with one change, executed as a module; modules that import it are
executed again on top of it. The same machinery runs unchanged source first, so a claim that fails
for another reason is not counted as a kill.
"""

import importlib
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import dpo_checks
import grpo_checks
import head_checks
import pytest
import sdpo_checks

PACKAGE = "composer_replication.losses"
FAMILIES = {
    "head": ("head",),
    "sdpo": ("head", "divergence", "sdpo"),
    "dpo": ("dpo",),
    "grpo": ("grpo",),
}
"""Modules of each loss in import order; the checks get the last one."""


@dataclass(frozen=True)
class Mutant:
    family: str
    name: str
    edits: tuple[tuple[str, str, str], ...]
    """Module, text in it, replacement."""
    killers: tuple
    """Checks that must fail, each on its own."""


def mutant(module, name, old, new, *killers):
    family = module if module in FAMILIES else "sdpo"
    return Mutant(family, name, ((module, old, new),), killers)


def load(monkeypatch, family, edits=()):
    """The family's last module, executed from its edited sources."""
    for name in FAMILIES[family]:
        full_name = f"{PACKAGE}.{name}"
        path = Path(importlib.import_module(full_name).__file__)
        source = path.read_text()
        for edited, old, new in edits:
            if edited == name:
                assert source.count(old) == 1, f"{path.name} has {source.count(old)} times: {old}"
                source = source.replace(old, new)
        module = types.ModuleType(full_name)
        # Modules that are executed after this one import from it, not from the original.
        monkeypatch.setitem(sys.modules, full_name, module)
        exec(compile(source, str(path), "exec"), module.__dict__)
    return module


HEAD = (
    mutant(
        "head",
        "temperature_dropped",
        "logits /= temperature",
        "pass",
        head_checks.equals_the_plain_python_oracle,
        head_checks.equals_values_worked_out_by_hand,
    ),
    mutant(
        "head",
        "softcap_slope_forgotten",
        "    if head.softcap is None:\n        return scale\n    # d/dx",
        "    return scale\n    # d/dx",
        head_checks.gradient_equals_finite_differences,
        head_checks.unused_output_costs_no_gradient,
    ),
    mutant(
        "head",
        "entropy_without_its_mean",
        ".add_(probs * entropy[rows, None])",
        "",
        head_checks.gradient_equals_finite_differences,
        head_checks.unused_output_costs_no_gradient,
    ),
    mutant(
        "head",
        "garbage_rows_not_zeroed",
        "logit_grad.masked_fill_(~is_finite[:, None], 0.0)",
        "pass",
        head_checks.garbage_rows_leave_the_other_rows_and_the_head_alone,
    ),
    mutant(
        "head",
        "infinite_hidden_states_not_zeroed",
        ".nan_to_num(0.0, posinf=0.0, neginf=0.0)",
        "",
        head_checks.garbage_rows_leave_the_other_rows_and_the_head_alone,
    ),
    mutant(
        "head",
        "weight_gradient_summed_in_bf16",
        "torch.zeros_like(tensor, dtype=dtype) if",
        "torch.zeros_like(tensor) if",
        head_checks.weight_gradient_is_summed_in_fp32,
    ),
    mutant(
        "head",
        "autocast_left_on",
        "        with torch.autocast(hidden.device.type, enabled=False):\n"
        "            for rows in tiles(hidden.shape[0], tile_rows):",
        "        if True:\n            for rows in tiles(hidden.shape[0], tile_rows):",
        head_checks.half_precision_inputs_give_fp32_results_under_autocast_too,
    ),
    mutant(
        "head",
        "last_tile_skipped",
        "enumerate(range(0, num_rows, tile_rows))",
        "enumerate(range(0, num_rows - tile_rows + 1, tile_rows))",
        head_checks.equals_the_plain_python_oracle,
    ),
)

SDPO = (
    mutant(
        "divergence",
        "kl_reversed",
        "_kl_terms_(t, p, log_ratio)",
        "_kl_terms_(p, t, log_ratio.neg_())",
        sdpo_checks.equals_the_plain_python_oracle,
        sdpo_checks.equals_values_worked_out_by_hand,
    ),
    mutant(
        "divergence",
        "mixture_weights_swapped",
        ".mul_(1 - 2 * beta).add_(beta)",
        ".mul_(2 * beta - 1).add_(1 - beta)",
        sdpo_checks.equals_the_plain_python_oracle,
        sdpo_checks.equals_values_worked_out_by_hand,
    ),
    Mutant(
        "sdpo",
        "teacher_not_detached",
        (
            ("sdpo", "teacher_logits.detach().flatten(0, -2)", "teacher_logits.flatten(0, -2)"),
            (
                "divergence",
                "(policy_logits.dtype), None, None, None",
                "(policy_logits.dtype), -grad, None, None",
            ),
        ),
        (sdpo_checks.teacher_gets_no_gradient,),
    ),
    mutant(
        "divergence",
        "teacher_temperature_dropped",
        "teacher_logits[rows].to(dtype, copy=True).div_(options.temperature)",
        "teacher_logits[rows].to(dtype, copy=True)",
        sdpo_checks.equals_the_plain_python_oracle,
    ),
    mutant(
        "divergence",
        "gradient_not_divided_by_temperature",
        "grad[rows] = policy.div_(options.temperature)",
        "grad[rows] = policy",
        sdpo_checks.gradient_equals_finite_differences,
        sdpo_checks.fused_equals_slow_for_every_option_and_head,
    ),
    mutant(
        "divergence",
        "kl_without_its_second_order_form",
        "return (a * log_ratio).add_(excess).clamp_(min=0), excess",
        "return a * log_ratio, excess",
        sdpo_checks.bf16_inputs_keep_one_percent_of_fp64,
        sdpo_checks.almost_equal_distributions_are_never_negative,
    ),
    mutant(
        "divergence",
        "mixture_without_its_second_order_form",
        "    return terms, log_m_over_p.mul_(p).mul_(beta - 1)",
        "    log_ps = p.log(), t.log()\n"
        "    log_m = (beta * t + (1 - beta) * p).log()\n"
        "    terms = beta * t * (log_ps[1] - log_m) + (1 - beta) * p * (log_ps[0] - log_m)\n"
        "    return terms, log_m_over_p.mul_(p).mul_(beta - 1)",
        sdpo_checks.bf16_inputs_keep_one_percent_of_fp64,
        sdpo_checks.almost_equal_distributions_are_never_negative,
    ),
    mutant(
        "divergence",
        "rounding_below_zero_not_clamped",
        "terms.mul_(larger).clamp_(min=0)",
        "terms.mul_(larger)",
        sdpo_checks.almost_equal_distributions_are_never_negative,
    ),
    mutant(
        "divergence",
        "entropy_weight_left_out_of_the_gradient",
        "        grad *= weight[:, None]\n",
        "",
        sdpo_checks.gradient_equals_finite_differences,
        sdpo_checks.a_token_counts_as_much_as_its_teacher_is_sure,
    ),
    mutant(
        "divergence",
        "entropy_multiplied_by_its_scale",
        ".div_(scale)",
        ".mul_(scale)",
        sdpo_checks.equals_the_plain_python_oracle,
        sdpo_checks.a_token_counts_as_much_as_its_teacher_is_sure,
    ),
    mutant(
        "divergence",
        "tail_dropped",
        "    if not options.tail:\n        return chosen, chosen[:, :1]",
        "    return chosen, chosen[:, :1]",
        sdpo_checks.equals_the_plain_python_oracle,
    ),
    mutant(
        "divergence",
        "tail_without_gradient",
        "rest_share.mul_(support[:, options.top_k :])",
        "rest_share.zero_()",
        sdpo_checks.gradient_equals_finite_differences,
    ),
    mutant(
        "divergence",
        "top_k_of_the_wrong_side",
        'if options.top_k_from == "teacher" else policy_logits',
        'if options.top_k_from == "policy" else policy_logits',
        sdpo_checks.equals_the_plain_python_oracle,
    ),
    mutant(
        "divergence",
        "rows_after_the_first_block_skipped",
        "return tiles(logits.shape[0], max(",
        "return tiles(min(logits.shape[0], 2), max(",
        sdpo_checks.a_vocabulary_larger_than_a_block_changes_nothing,
    ),
    mutant(
        "sdpo",
        "token_clip_not_a_constant",
        "constant = divergence.detach()",
        "constant = divergence",
        sdpo_checks.token_clip_scales_value_and_gradient,
    ),
    mutant(
        "divergence",
        "entry_clip_lets_gradient_through",
        "grad.masked_fill_(terms > clip_value, 0.0)",
        "pass",
        sdpo_checks.entry_clip_reproduces_the_sign_quirks_of_opsd,
        sdpo_checks.gradient_equals_finite_differences,
    ),
    mutant(
        "divergence",
        "gradient_of_garbage_not_zeroed",
        "p.masked_fill_(~values.isfinite()[:, None], 0.0)",
        "pass",
        sdpo_checks.garbage_shows_in_its_own_token_and_masked_changes_nothing,
        sdpo_checks.an_infinite_divergence_is_infinite_with_zero_gradient,
    ),
    mutant(
        "divergence",
        "nan_logits_hidden",
        " + 0.0 * (policy_lse + teacher_lse).squeeze(-1)",
        "",
        sdpo_checks.garbage_shows_in_its_own_token_and_masked_changes_nothing,
    ),
    mutant(
        "sdpo",
        "ignored_labels_multiplied_away",
        "token_BT = torch.where(loss_mask, token_BT, 0.0)",
        "token_BT = token_BT * loss_mask",
        sdpo_checks.zero_valid_labels_give_zero_loss_and_zero_gradient,
    ),
    mutant(
        "sdpo",
        "no_guard_for_zero_tokens",
        "return token_BT.sum() / num_batch.clamp(min=1)",
        "return token_BT.sum() / num_batch",
        sdpo_checks.zero_valid_labels_give_zero_loss_and_zero_gradient,
    ),
    mutant(
        "sdpo",
        "head_gradient_ignores_incoming_weights",
        "logit_grad *= value_grad[rows, None]",
        "pass",
        sdpo_checks.fused_equals_slow_for_every_option_and_head,
    ),
    mutant(
        "sdpo",
        "fused_soft_cap_slope_forgotten",
        "            block *= slope",
        "            block *= policy_head.logit_scale / options.temperature",
        sdpo_checks.fused_equals_slow_for_every_option_and_head,
    ),
    mutant(
        "sdpo",
        "frozen_head_recomputed",
        "num_rows = policy_hidden.shape[0] if needed[1] or needed[2] else 0",
        "num_rows = policy_hidden.shape[0]",
        sdpo_checks.fused_never_builds_tokens_by_vocabulary,
    ),
)

DPO = (
    mutant(
        "dpo",
        "sign_swapped",
        "beta * (chosen_log_ratio - rejected_log_ratio)",
        "beta * (rejected_log_ratio - chosen_log_ratio)",
        dpo_checks.equals_the_plain_python_oracle,
        dpo_checks.equals_values_worked_out_by_hand,
        dpo_checks.only_the_policy_gets_a_gradient,
    ),
    Mutant(
        "dpo",
        "smoothing_reversed",
        (
            ("dpo", "-(1 - label_smoothing) * logsigmoid(", "-label_smoothing * logsigmoid("),
            ("dpo", "pair_losses - label_smoothing *", "pair_losses - (1 - label_smoothing) *"),
        ),
        (dpo_checks.equals_the_plain_python_oracle, dpo_checks.equals_values_worked_out_by_hand),
    ),
    mutant(
        "dpo",
        "weights_ignored",
        "(pair_weights.detach() * pair_losses).sum()",
        "pair_losses.sum()",
        dpo_checks.equals_the_plain_python_oracle,
        dpo_checks.equals_values_worked_out_by_hand,
    ),
    mutant(
        "dpo",
        "references_swapped",
        "    chosen_log_ratio = _single(",
        "    ref_chosen_logp, ref_rejected_logp = ref_rejected_logp, ref_chosen_logp\n"
        "    chosen_log_ratio = _single(",
        dpo_checks.equals_the_plain_python_oracle,
        dpo_checks.equals_values_worked_out_by_hand,
    ),
    mutant(
        "dpo",
        "reference_not_detached",
        "_single(ref_chosen_logp.detach())",
        "_single(ref_chosen_logp)",
        dpo_checks.only_the_policy_gets_a_gradient,
    ),
    mutant(
        "dpo",
        "mean_instead_of_sum",
        "(pair_weights.detach() * pair_losses).sum()",
        "(pair_weights.detach() * pair_losses).mean()",
        dpo_checks.micro_batches_sum_to_one_large_batch,
        dpo_checks.no_pairs_give_zero_in_the_graph,
    ),
    mutant(
        "dpo",
        "masked_by_multiplying",
        "scaled_margin = torch.where(pair_weights != 0, scaled_margin, 0.0)",
        "pass",
        dpo_checks.garbage_in_a_pair_of_weight_zero_changes_nothing,
    ),
)

GRPO = (
    mutant(
        "grpo",
        "optimistic_instead_of_pessimistic",
        "-torch.minimum(",
        "-torch.maximum(",
        grpo_checks.equals_the_plain_python_oracle,
        grpo_checks.equals_values_worked_out_by_hand,
    ),
    mutant(
        "grpo",
        "mask_ignored",
        "advantages_BC = torch.where(mask_BC, advantages_BC.detach(), 0.0)",
        "advantages_BC = advantages_BC.detach()",
        grpo_checks.equals_the_plain_python_oracle,
        grpo_checks.without_old_policy_the_gradient_is_the_policy_gradient,
    ),
    mutant(
        "grpo",
        "masked_by_multiplying",
        "log_ratio_BC = torch.where(mask_BC, policy_BC - old_BC, 0.0)",
        "log_ratio_BC = (policy_BC - old_BC) * mask_BC",
        grpo_checks.masked_garbage_changes_nothing,
    ),
    mutant(
        "grpo",
        "mean_of_each_micro_batch",
        '    elif loss_type == "dapo":\n'
        "        loss_sum, denominator = token_loss_BC.sum(), num_tokens",
        '    elif loss_type == "dapo":\n'
        "        loss_sum = token_loss_BC.sum() / num_tokens.clamp(min=1)\n"
        "        denominator = torch.ones_like(num_tokens)",
        grpo_checks.micro_batches_sum_to_one_large_batch,
        grpo_checks.equals_values_worked_out_by_hand,
    ),
    mutant(
        "grpo",
        "sequence_mean_over_padding",
        "(log_ratio_BC.sum(-1) / lengths_B)",
        "log_ratio_BC.mean(-1)",
        grpo_checks.equals_the_plain_python_oracle,
        grpo_checks.equals_values_worked_out_by_hand,
    ),
    mutant(
        "grpo",
        "old_policy_not_detached",
        "(policy_BC if old_logp is None else old_logp).detach()",
        "(policy_BC if old_logp is None else old_logp)",
        grpo_checks.only_the_policy_gets_a_gradient,
        grpo_checks.without_old_policy_the_gradient_is_the_policy_gradient,
    ),
    mutant(
        "grpo",
        "epsilons_swapped",
        "ratio_BC.clamp(1 - epsilon_low, 1 + epsilon_high)",
        "ratio_BC.clamp(1 - epsilon_high, 1 + epsilon_low)",
        grpo_checks.equals_the_plain_python_oracle,
    ),
    mutant(
        "grpo",
        "delta_ignored",
        "ratio_BC = ratio_BC.clamp(max=delta)",
        "pass",
        grpo_checks.equals_the_plain_python_oracle,
    ),
    mutant(
        "grpo",
        "biased_deviation",
        "(squares / (num_valid - 1)).sqrt()",
        "(squares / num_valid).sqrt()",
        grpo_checks.advantages_equal_values_worked_out_by_hand,
    ),
)

MUTANTS = (*HEAD, *SDPO, *DPO, *GRPO)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.family}-{m.name}")
def test_mutant_dies(mutant, monkeypatch):
    module = load(monkeypatch, mutant.family, mutant.edits)
    for check in mutant.killers:
        with pytest.raises((AssertionError, RuntimeError)):
            check(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_source_passes_the_same_way(family, monkeypatch):
    module = load(monkeypatch, family)
    killers = {check for mutant in MUTANTS if mutant.family == family for check in mutant.killers}
    assert killers
    for check in killers:
        check(module)
