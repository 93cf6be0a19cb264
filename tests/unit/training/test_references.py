"""Reference log-probs: what they equal, when the cache answers, and when it must not."""

import contextlib
import dataclasses
import json

import pytest
import torch

from composer_replication import ComposerDataCollator, Message, PreferencePair
from composer_replication.errors import DataError
from composer_replication.training.references import reference_key, with_references
from composer_replication.training.teacher import PolicyTeacher

STATE = (Message("user", "Read /src/app.py."),)
PAIRS = [PreferencePair(STATE, f'{{"file": {i}}}', '{"path": 1}', source=f"p{i}") for i in range(3)]


def fill(pairs, policy, tokenizer, folder, **changes):
    options = {"precision": "no/float32", "batch_size": 2, "cache_dir": folder}
    return with_references(
        pairs,
        PolicyTeacher(policy, contextlib.nullcontext, without_adapters=False),
        policy,
        ComposerDataCollator(tokenizer),
        **(options | changes),
    )


def test_references_are_the_policys_own_log_probs_at_the_start(
    tiny_llama, smollm2_tokenizer, tmp_path
):
    policy = tiny_llama(dtype=torch.float64)
    filled, _ = fill(PAIRS, policy, smollm2_tokenizer, tmp_path)
    collator = ComposerDataCollator(smollm2_tokenizer)
    for pair in filled:
        for row, stored in zip(
            collator.pair_rows(pair)[:2],
            (pair.ref_chosen_logp, pair.ref_rejected_logp),
            strict=True,
        ):
            with torch.no_grad():
                logp = policy(input_ids=torch.tensor([row.token_ids])).logits[0].log_softmax(-1)
            at = range(len(row.context_ids) - 1, len(row.token_ids) - 1)
            expected = sum(logp[i, row.token_ids[i + 1]].item() for i in at)
            assert stored == pytest.approx(expected, rel=1e-9)


def test_the_second_time_the_cache_answers_with_the_same_numbers(
    tiny_llama, smollm2_tokenizer, tmp_path
):
    first, was_cached = fill(PAIRS, tiny_llama(), smollm2_tokenizer, tmp_path)
    again, is_cached = fill(PAIRS, tiny_llama(), smollm2_tokenizer, tmp_path)
    assert (was_cached, is_cached) == (False, True)
    assert first == again


def test_the_key_moves_with_everything_the_numbers_depend_on(tiny_llama, smollm2_tokenizer):
    def key(policy=None, pairs=PAIRS, precision="no", batch_size=2, **collator):
        return reference_key(
            pairs,
            policy or tiny_llama(),
            ComposerDataCollator(smollm2_tokenizer, **collator),
            precision=precision,
            batch_size=batch_size,
        )

    nudged = tiny_llama()
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    longer = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    other_text = [dataclasses.replace(PAIRS[0], chosen="x"), *PAIRS[1:]]
    limit = (
        max(
            len(r.token_ids)
            for r in ComposerDataCollator(smollm2_tokenizer).pair_rows(PAIRS[0])[:2]
        )
        - 1
    )
    keys = [
        key(),
        key(policy=nudged),
        key(policy=longer),
        key(pairs=other_text),
        key(precision="bf16"),
        key(batch_size=1),
        key(max_length=limit, truncation="middle"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_pairs_that_carry_references_keep_them(tiny_llama, smollm2_tokenizer, tmp_path):
    given = dataclasses.replace(PAIRS[0], ref_chosen_logp=-1.0, ref_rejected_logp=-2.0)
    filled, _ = fill([given, PAIRS[1]], tiny_llama(), smollm2_tokenizer, tmp_path)
    assert filled[0] == given
    assert filled[1].ref_chosen_logp is not None


@pytest.mark.parametrize("content", ["{", '{"chosen": [1.0]}', '{"chosen": [1], "rejected": [1]}'])
def test_a_broken_cache_file_is_named_and_not_used(
    tiny_llama, smollm2_tokenizer, tmp_path, content
):
    fill(PAIRS, tiny_llama(), smollm2_tokenizer, tmp_path)
    (cache_file,) = tmp_path.glob("*.json")
    cache_file.write_text(content)
    with pytest.raises(DataError, match=cache_file.stem):
        fill(PAIRS, tiny_llama(), smollm2_tokenizer, tmp_path)


def test_the_cache_holds_the_sums_under_a_schema(tiny_llama, smollm2_tokenizer, tmp_path):
    filled, _ = fill(PAIRS, tiny_llama(), smollm2_tokenizer, tmp_path)
    payload = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert payload["schema"] == 1
    assert payload["chosen"] == [pair.ref_chosen_logp for pair in filled]
