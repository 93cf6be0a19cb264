"""The simulated step holds what the real one holds, in every phase."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from composer_replication.cli.entry import main
from composer_replication.errors import ConfigError, ModelError
from composer_replication.experiments import simulate as simulation
from composer_replication.experiments.case_step import CaseStep, case_policy, case_tensors
from composer_replication.experiments.simulate import measure, simulate
from composer_replication.losses import head, head_pass, sdpo
from composer_replication.losses.head import tempered_logits
from composer_replication.planner.forwards import forwards_of
from composer_replication.planner.step_case import StepCase
from composer_replication.step import tree_forward
from composer_replication.step.trie import PrefixTree, num_unique_tokens
from composer_replication.units import gib

LAYERS = 4
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip
LLAMA = QWEN2 | {"model_type": "llama", "tie_word_embeddings": False}
WIDE_HEAD = QWEN2 | {"hidden_size": 256, "vocab_size": 8192}
GEMMA3 = QWEN2 | {
    "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
ROWS = {
    "num_rollouts": 4, "prompt_tokens": 40, "completion_tokens": 24,
    "num_sites": 2, "state_tokens": 50, "hint_tokens": 9, "action_tokens": 12,
    "num_pairs": 2, "pair_state_tokens": 45, "pair_action_tokens": 11,
}  # fmt: skip
TURNS = {"num_prompts": 2, "num_sites": 3, "num_rollout_sites": 3}
BF16_LORA = {"lora_r": 4, "weights_dtype": "bfloat16", "autocasts": True}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (QWEN2, {}),
        (QWEN2, {"teacher": "frozen", "autocasts": True, "optimizer": "adamw_torch"}),
        (LLAMA, {"autocasts": True, "checkpoints": True, "accumulates": True}),
        (LLAMA, {"teacher": "ema", "checkpoints": True, **BF16_LORA}),
        (QWEN2, {"num_rollouts": 0, "num_sites": 0, "optimizer": "sgd"}),
        (GEMMA3, {"teacher": "live"}),
        (QWEN2, {"teacher": "live", "executor": "packed"}),
        (LLAMA, {"autocasts": True, "checkpoints": True, "executor": "packed"}),
        (QWEN2, {"teacher": "frozen", "executor": "packed", **TURNS}),
        # A tree in four parts, which are computed again one after the other.
        (QWEN2, {"executor": "packed", "tree_max_tokens": 120}),
        (LLAMA, {"teacher": "live", "executor": "packed", "autocasts": True, "checkpoints": True,
                 "tree_max_tokens": 150}),
        (QWEN2, {"teacher": "ema", "executor": "packed", "tree_max_tokens": 90, **BF16_LORA}),
        # The largest is the head with the teacher's beside it, which is a copy.
        (WIDE_HEAD, {"num_rollouts": 0, "num_pairs": 0, "state_tokens": 200,
                     "executor": "packed", "accumulates": True}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:A step is cut")
def test_two_shallow_fakes_give_what_the_deep_step_holds(model, options):
    case = StepCase(model, **(ROWS | options))
    real = measure(case, case_policy(case, device="cpu"))
    simulated = simulate(case)
    assert simulated.peak_gib == pytest.approx(real.peak_gib, rel=0.01)
    assert simulated.phases_gib.keys() == real.phases_gib.keys()
    for phase, peak_gib in real.phases_gib.items():
        assert simulated.phases_gib[phase] == pytest.approx(peak_gib, rel=0.03), phase
    for part, held_gib in real.persistent_gib.items():
        assert simulated.persistent_gib[part] == pytest.approx(held_gib, rel=1e-3), part


@pytest.mark.parametrize("teacher", ["live", "frozen"])
@pytest.mark.parametrize("turns", [{}, TURNS, TURNS | {"num_sites": 5}, {"num_rollouts": 0}])
def test_the_counted_tokens_are_the_rows_of_the_trees(turns, teacher):
    case = StepCase(QWEN2, teacher=teacher, executor="packed", **(ROWS | turns))
    tensors = case_tensors(case)
    rows = [row for name in ("input_ids", "dpo_chosen_input_ids", "dpo_rejected_input_ids")
            for row in tensors[name]]  # fmt: skip
    if case.num_rollouts:
        rows += list(torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1))
    hinted = list(tensors["ctx_teacher_input_ids"])
    (forward,) = forwards_of(case)

    def num_unique(sequences):
        return num_unique_tokens([sequence.numpy() for sequence in sequences])

    # Drawn ids meet by chance: a branch may share a token or two more than it was given.
    if teacher == "live":
        assert num_unique(rows + hinted) == pytest.approx(forward.num_tokens, abs=3)
        assert forward.num_teacher_tokens == 0
    else:
        assert num_unique(rows) == pytest.approx(forward.num_tokens, abs=3)
        assert num_unique(hinted) == pytest.approx(forward.num_teacher_tokens, abs=3)


@pytest.mark.parametrize("max_tokens", [100, 128, 200, 400])
@pytest.mark.parametrize("teacher", ["live", "frozen"])
@pytest.mark.parametrize("turns", [{}, TURNS, TURNS | {"num_sites": 5}])
@pytest.mark.filterwarnings("ignore:A step is cut")
def test_the_counted_parts_are_those_that_the_step_cuts(turns, teacher, max_tokens, monkeypatch):
    """No part of the step has more tokens than the most that is planned for one, nor all more."""
    case = StepCase(
        QWEN2, teacher=teacher, executor="packed", tree_max_tokens=max_tokens, **(ROWS | turns)
    )
    trees = []

    def noted(sequences):
        trees.append(PrefixTree(sequences).num_rows)
        return PrefixTree(sequences)

    monkeypatch.setattr(tree_forward, "PrefixTree", noted)
    with torch.no_grad():
        CaseStep(case, case_tensors(case), case_policy(case, device="cpu")).loss()
    (forward,) = forwards_of(case)
    teacher_parts = forward.teacher_cuts or (forward.num_teacher_tokens,) * (teacher != "live")
    parts = [piece.num_tokens for piece in forward.pieces]
    found = len(teacher_parts)
    for planned, real in ((teacher_parts, trees[:found]), (parts, trees[found:])):
        # The order of the groups is that of their ids, and last tokens are not read.
        assert abs(len(real) - len(planned)) <= 2
        assert max(real, default=0) <= max(planned, default=0)
        assert sum(real) == pytest.approx(sum(planned), rel=0.35)


def test_a_simulation_loads_no_trainer_and_no_adapter_library():
    """Each takes tenths of a second of the eight that `plan --simulate` has."""
    code = "import sys, composer_replication.experiments.simulate; print('\\n'.join(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "transformers" in loaded.stdout.split()
    assert not {"transformers.trainer_callback", "peft", "trl"} & set(loaded.stdout.split())


def test_an_architecture_whose_layers_do_not_repeat_is_refused():
    kinds = ["full_attention"] * 7 + ["sliding_attention"]
    model = GEMMA3 | {"num_hidden_layers": 8, "layer_types": kinds}
    with pytest.raises(ModelError, match=r"repeat after 8.*without --simulate"):
        simulate(StepCase(model, **ROWS))


def test_a_gpus_larger_tiles_of_the_head_are_simulated():
    """512 rows of fp32 logits at once in place of 64, twice: the logits and their gradient."""
    rows = {"num_pairs": 4, "pair_state_tokens": 8, "pair_action_tokens": 128}
    heads = {"num_key_value_heads": QWEN2["num_attention_heads"]}
    case = StepCase(QWEN2 | heads | {"vocab_size": 8192}, **rows)
    on_cpu, on_gpu = (simulate(replace(case, device_type=kind)) for kind in ("cpu", "cuda"))
    more_gib = on_gpu.phases_gib["loss"] - on_cpu.phases_gib["loss"]
    assert more_gib == pytest.approx(gib((512 - 64) * 8192 * 4 * 2), rel=0.05)


def test_a_gpus_larger_blocks_of_a_divergence_are_simulated():
    """Of 8,192 entries a CPU's block holds 512 rows in 7 arrays, and a GPU's all 600 of these."""
    rows = {"num_sites": 1, "state_tokens": 4, "hint_tokens": 1, "action_tokens": 600}
    model = QWEN2 | {"vocab_size": 8192}
    case = StepCase(model, teacher="live", executor="packed", **rows)
    on_cpu, on_gpu = (simulate(replace(case, device_type=kind)) for kind in ("cpu", "cuda"))
    more_gib = on_gpu.phases_gib["loss"] - on_cpu.phases_gib["loss"]
    assert more_gib == pytest.approx(gib((600 - 512) * 8192 * 4 * 7), rel=0.02)


@pytest.mark.parametrize("executor", ["packed", "separate"])
def test_leaving_out_alike_tiles_changes_nothing_but_the_time(executor, monkeypatch):
    rows = ROWS | {"completion_tokens": 200, "num_pairs": 0}
    model = QWEN2 | {"vocab_size": 131_072, "num_hidden_layers": 2}
    case = StepCase(model, teacher="frozen", executor=executor, **rows)
    projections: list[int] = []

    def counted(hidden, head, temperature):
        projections.append(hidden.shape[0])
        return tempered_logits(hidden, head, temperature)

    for module in (head, head_pass, sdpo):
        monkeypatch.setattr(module, "tempered_logits", counted)
    fewer = simulate(case)
    num_fewer = len(projections)
    monkeypatch.setattr(simulation, "alike_tiles_skipped", nullcontext)
    assert simulate(case) == fewer
    assert num_fewer < (len(projections) - num_fewer) / 2


def test_an_optimizer_of_another_device_is_refused():
    with pytest.raises(ConfigError, match=r"adamw_8bit.*without --simulate"):
        simulate(StepCase(QWEN2, optimizer="adamw_8bit", **ROWS))


def test_attention_that_keeps_its_softmax_on_cuda_alone_is_refused():
    case = StepCase(QWEN2, device_type="cuda", **ROWS)
    with pytest.raises(ConfigError, match=r"keeps its softmax on CUDA.*without --simulate"):
        simulate(case)
    for change in ({"executor": "packed"}, {"autocasts": True}):
        assert simulate(replace(case, **change)).peak_gib > 0


def test_the_plan_takes_the_simulation_in_place_of_formulas(tiny_model_dir, tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text(f'model = "{tiny_model_dir}"\n')
    terms: list[dict[str, float]] = []
    for options in ([], ["--simulate"]):
        assert main(["plan", str(config), "--on", "local", "--json", *options]) == 0
        terms.append(json.loads(capsys.readouterr().out)["chosen"]["terms_gib"])
    formula, simulated = terms
    assert simulated != formula
    assert simulated["weights"] == pytest.approx(formula["weights"], rel=1e-3)
    assert sum(simulated.values()) == pytest.approx(sum(formula.values()), rel=0.07)
