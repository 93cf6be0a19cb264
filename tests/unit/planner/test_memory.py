from dataclasses import replace

import pytest

from composer_replication.errors import ModelError
from composer_replication.planner.forwards import dear_cut, forwards_of
from composer_replication.planner.layer_memory import layer_memory
from composer_replication.planner.memory import MemoryEstimate, persistent_bytes, predict
from composer_replication.planner.model_files import shipped_config as shape_config
from composer_replication.planner.model_shape import model_shape
from composer_replication.planner.step_case import StepCase

SMALL = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "tie_word_embeddings": True,
}
HALF_B, SEVEN_B = shape_config("qwen2.5-0.5b"), shape_config("qwen2.5-7b")
NOTE = StepCase(
    HALF_B,
    num_rollouts=2,
    prompt_tokens=768,
    completion_tokens=256,
    num_sites=2,
    state_tokens=960,
    hint_tokens=32,
    action_tokens=32,
    num_pairs=2,
    pair_state_tokens=992,
    pair_action_tokens=32,
)


@pytest.mark.parametrize(
    ("name", "millions"), [("0.5b", 494.03), ("1.5b", 1543.71), ("3b", 3085.94), ("7b", 7615.62)]
)
def test_parameters_are_those_that_the_makers_publish(name, millions):
    shape = model_shape(shape_config(f"qwen2.5-{name}"))
    assert shape.num_parameters / 1e6 == pytest.approx(millions, abs=0.01)


def test_a_layer_keeps_what_its_operations_save():
    """Llama, fp32: per norm its input and output, x and y, 4H each, and the matrices' input 4H."""
    hidden, q, kv, inner, heads = 64, 64, 32, 160, 4
    by_hand = 4 * (6 * hidden + 2 * q + 2 * kv + 4 * inner + heads)
    case = StepCase(SMALL, num_rollouts=1, prompt_tokens=8, completion_tokens=8)
    assert layer_memory(case).saved_per_token == by_hand
    # bf16: the norm's fp32 copy, 4H, and 2H for its output and 2H for the matrices' input.
    halved = layer_memory(replace(case, weights_dtype="bfloat16"))
    assert halved.saved_per_token == 16 * hidden + 4 * q + 4 * kv + 8 * inner + 4 * heads
    # Autocast: fp32 norms as in fp32, and each of the five matrices after them casts its own input.
    cast = layer_memory(replace(case, autocasts=True))
    assert cast.saved_per_token == 26 * hidden + 4 * q + 4 * kv + 8 * inner + 4 * heads
    assert cast.weight_copies == 2 * model_shape(SMALL).layer_linear_parameters


def test_an_adapters_layer_keeps_the_cast_inputs_of_every_adapter():
    case = StepCase(
        SMALL,
        num_rollouts=1,
        prompt_tokens=8,
        completion_tokens=8,
        weights_dtype="bfloat16",
        autocasts=True,
        lora_r=8,
    )
    hidden, q, kv, inner, heads = 64, 64, 32, 160, 4
    by_hand = 18 * hidden + 6 * q + 4 * kv + 8 * inner + 2 * 7 * 8 + 4 * heads
    assert layer_memory(case).saved_per_token == by_hand


def test_what_stays_is_weights_moments_teacher_and_gradients_that_accumulate():
    parameters = 494_032_768
    assert persistent_bytes(NOTE) == {
        "weights": 4 * parameters,
        "teacher": 4 * parameters,
        "optimizer": 8 * parameters,
        "gradients": 0,
    }
    accumulating = persistent_bytes(replace(NOTE, accumulates=True, teacher="live"))
    assert accumulating["gradients"] == 4 * parameters
    assert accumulating["teacher"] == 0


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_parameter"),
    [("adamw_torch_fused", 8), ("adamw_torch", 8), ("adamw_8bit", 2 + 8 / 256), ("sgd", 0)],
)
def test_moments_are_those_of_the_optimizer(optimizer, bytes_a_parameter):
    parts = persistent_bytes(replace(NOTE, optimizer=optimizer))
    assert parts["optimizer"] == pytest.approx(bytes_a_parameter * 494_032_768)


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix():
    case = StepCase(SMALL, num_rollouts=1, prompt_tokens=4, completion_tokens=4)
    hidden, q, kv, inner = 64, 64, 32, 160
    matrices = (hidden + q) + 2 * (hidden + kv) + (q + hidden) + 3 * (hidden + inner)
    by_hand = 4 * (3 * (matrices + 2 * hidden) + 1000 + hidden + hidden)
    assert persistent_bytes(replace(case, optimizer="adafactor"))["optimizer"] == by_hand


def test_an_adapter_of_7b_takes_its_base_in_bf16_and_little_else():
    case = StepCase(
        SEVEN_B,
        num_sites=1,
        state_tokens=64,
        hint_tokens=8,
        action_tokens=8,
        weights_dtype="bfloat16",
        autocasts=True,
        lora_r=32,
        teacher="frozen",
    )
    # q, k, v, o, gate, up, down: 32 (inputs + outputs) of each, in 28 layers.
    sizes = (3584 + 3584, 3584 + 512, 3584 + 512, 3584 + 3584, *(3 * [3584 + 18944]))
    adapter = 28 * 32 * sum(sizes)
    parts = persistent_bytes(case)
    assert parts["weights"] == 2 * 7_615_616_512 + 4 * adapter
    assert parts["optimizer"] == 8 * adapter
    assert parts["teacher"] == 0
    # The average of the adapter's product is a full fp32 matrix for each one it sits on.
    averaged = persistent_bytes(replace(case, teacher="ema"))["teacher"]
    assert averaged == 4 * 28 * (model_shape(SEVEN_B).layer_linear_parameters - 3584 - 1024)


def test_the_peak_is_an_instant_and_not_the_sum_of_phases():
    estimate = predict(NOTE)
    assert estimate.peak_gib == max(estimate.phases_gib.values())
    assert estimate.peak_gib < sum(estimate.phases_gib.values()) / 2
    assert estimate.peak_phase == "backward"


def test_graphs_of_all_forwards_add_up_and_checkpointing_keeps_layer_inputs():
    alone = StepCase(HALF_B, num_rollouts=2, prompt_tokens=768, completion_tokens=256)
    per_token = layer_memory(alone).saved_per_token
    assert per_token == 4 * (6 * 896 + 2 * 896 + 2 * 128 + 4 * 4864 + 14)
    more = predict(replace(alone, prompt_tokens=1792)).phases_gib["policy_forward"]
    less = predict(alone).phases_gib["policy_forward"]
    ends = 4 * (2 * 896 + 2 * 64)
    assert (more - less) * 2**30 == pytest.approx(2 * 1024 * (24 * per_token + ends))
    checkpointed = replace(alone, checkpoints=True)
    assert predict(checkpointed).peak_gib < predict(alone).peak_gib


def test_a_tree_reads_each_shared_prefix_once():
    packed = replace(NOTE, executor="packed", num_rollouts=4, num_prompts=2, teacher="live")
    (tree,) = forwards_of(packed)
    rollouts = 2 * 768 + 4 * 256
    sites = 2 * (960 + 32 + 32 + 32)
    pairs = 2 * (992 + 2 * 32)
    assert tree.num_tokens == rollouts + sites + pairs
    assert tree.num_scored == 4 * 256 + 2 * 32 + 4 * 32
    # Another teacher's rows are a tree of their own, without gradient.
    (policy,) = forwards_of(replace(packed, teacher="ema"))
    assert policy.num_tokens == tree.num_tokens - 2 * (32 + 32)
    assert policy.num_teacher_tokens == 2 * (960 + 32 + 32)


def test_a_tree_over_its_budget_is_read_in_parts_that_keep_nothing():
    """Two groups of two rollouts, then two sites and two pairs of 1,024, 1,056 tokens."""
    packed = replace(NOTE, executor="packed", num_rollouts=4, num_prompts=2, tree_max_tokens=1500)
    (tree,) = forwards_of(packed)
    # A group is 768 + 2 x 256; nothing but a part's own rows is in it, so no prefix is repeated.
    whole = [2 * 256 + 768] * 2 + [992] * 2 + [1056] * 2
    assert tree.cuts == (1500, *whole[1:])
    assert tree.num_tokens == sum(whole)
    # A budget under a group repeats its prompt; a longer row is a part by itself.
    (tree,) = forwards_of(replace(packed, tree_max_tokens=1024, num_sites=0, num_pairs=0))
    assert tree.cuts == (1024,) * 4
    assert tree.num_tokens == 4 * 1024
    (tree,) = forwards_of(replace(packed, tree_max_tokens=100, num_sites=0, num_pairs=0))
    assert tree.cuts == (1024,) * 4
    (tree,) = forwards_of(replace(packed, tree_max_tokens=sum(whole)))
    assert tree.cuts == ()


def test_a_cut_that_repeats_more_than_it_saves_is_told_in_tokens():
    """Two groups of two rollouts of 1,024 tokens, 768 of them their prompt."""
    rows = {"num_rollouts": 4, "num_prompts": 2, "num_sites": 0, "num_pairs": 0}
    packed = replace(NOTE, executor="packed", **rows)
    # Each part is computed twice: without and with its graph.
    assert dear_cut(replace(packed, tree_max_tokens=1024)) == (2 * 4 * 1024, 4 * 1024)
    # A group in each part repeats nothing, and one part is no cut.
    assert dear_cut(replace(packed, tree_max_tokens=1280)) is None
    assert dear_cut(packed) is None
    assert dear_cut(replace(packed, executor="separate", tree_max_tokens=1024)) is None
    # A prompt repeated once for four rollouts each: 2 x 2 x 4,864, and 8 x 4,096 one by one.
    long = replace(packed, prompt_tokens=3840, num_rollouts=8, num_prompts=1)
    assert dear_cut(replace(long, tree_max_tokens=3840 + 4 * 256)) is None


def test_a_cut_tree_keeps_one_parts_graph_at_a_time():
    """What a larger budget costs is the graph of its more tokens, whatever the tree has in all."""
    rows = {"num_rollouts": 8, "num_prompts": 1, "prompt_tokens": 768, "completion_tokens": 256}
    tree = StepCase(HALF_B, executor="packed", **rows)
    # A part has one rollout, or two.
    small, large = (predict(replace(tree, tree_max_tokens=tokens)) for tokens in (1024, 1280))
    per_token = 24 * layer_memory(tree).saved_per_token
    assert (large.peak_gib - small.peak_gib) * 2**30 == pytest.approx(256 * per_token, rel=0.02)
    assert large.peak_gib < predict(tree).peak_gib
    more = replace(tree, num_rollouts=80, tree_max_tokens=1280)
    stays = 3 * 4 * 896 * 72 * 256
    assert (predict(more).peak_gib - large.peak_gib) * 2**30 == pytest.approx(stays, rel=0.4)
    # The forward keeps the scored rows alone.
    forward = small.phases_gib["policy_forward"] - sum(small.persistent_gib.values())
    assert forward * 2**30 < 0.1 * 1024 * per_token


def test_one_tree_keeps_less_than_a_forward_for_each_role():
    separate = replace(NOTE, autocasts=True, device_type="cuda")
    packed = replace(separate, executor="packed")
    assert predict(packed).peak_gib < 0.8 * predict(separate).peak_gib


def test_several_forwards_hold_a_second_set_of_gradients_while_accumulating():
    """Autograd sums a weight's gradients of all forwards before it adds them to the stored ones."""
    one = StepCase(SMALL, num_rollouts=1, prompt_tokens=2, completion_tokens=2, accumulates=True)
    two = replace(one, num_pairs=1, pair_state_tokens=2, pair_action_tokens=2)
    gradients = 4 * model_shape(SMALL).num_parameters
    difference = (predict(two).peak_gib - predict(one).peak_gib) * 2**30
    assert difference > 0.5 * gradients


def test_the_phase_with_the_most_is_named():
    estimate = MemoryEstimate({"teacher": 1.0, "backward": 3.0}, {"weights": 0.5})
    assert (estimate.peak_gib, estimate.peak_phase) == (3.0, "backward")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "mixtral"}, "type is 'mixtral'"),
        ({"model_type": None}, "type is None"),
        ({"hidden_size": 0}, "hidden_size as 0"),
        ({"vocab_size": "many"}, "vocab_size as 'many'"),
        ({"intermediate_size": None}, "intermediate_size as None"),
        ({"num_key_value_heads": 3}, "must be a multiple of the second"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "does not divide it"),
    ],
)
def test_an_impossible_architecture_is_refused(change, text):
    with pytest.raises(ModelError, match=text):
        model_shape(SMALL | change)
