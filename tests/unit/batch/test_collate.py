"""The collator on hand-built batches: names, shapes, masks, alignment, truncation."""

import copy
import dataclasses

import pytest
import torch

from composer_replication import ComposerDataCollator, HintSite, Message, PreferencePair, StepBatch
from composer_replication.batch.batches import Rollout
from composer_replication.batch.collate import check_alignment
from composer_replication.errors import AlignmentError, DataError, RecordTooLongError

SYSTEM = Message("system", "You call tools.")
STATE = (SYSTEM, Message("user", "Read /src/app.py."))
LONG = (SYSTEM, Message("user", "word " * 60 + "Read /src/app.py."))
ACTION = '{"tool": "read", "path": "/src/app.py"}'


def make_site(state=STATE, hint='Use "file".', action=ACTION):
    return HintSite(state=state, hint=hint, action=action, source="s1")


def make_pair(state=STATE, **changes):
    fields = {
        "state": state,
        "chosen": '{"tool": "read", "file": "/src/app.py"}',
        "rejected": ACTION,
        "ref_chosen_logp": -12.5,
        "ref_rejected_logp": -7.25,
        "source": "p1",
    }
    return PreferencePair(**(fields | changes))


@pytest.fixture
def collator(smollm2_tokenizer):
    return ComposerDataCollator(smollm2_tokenizer)


def test_student_and_teacher_index_name_equal_tokens_at_shifted_positions(collator):
    sites = (make_site(), make_site(hint="A much longer hint, to shift the teacher further."))
    out = collator(StepBatch(hint_sites=sites))
    student, teacher = out["sdpo_student_index"], out["sdpo_teacher_index"]
    tokens = out["input_ids"][student[:, 0], student[:, 1]]
    assert torch.equal(tokens, out["ctx_teacher_input_ids"][teacher[:, 0], teacher[:, 1]])
    assert torch.equal(student[:, 0], teacher[:, 0])
    shift = (teacher[:, 1] - student[:, 1]).unique()
    assert len(shift) == 2  # one shift a site: its hint's length
    assert (shift > 0).all()


def test_the_loss_mask_covers_the_action_and_nothing_else(collator, smollm2_tokenizer):
    out = collator(StepBatch(hint_sites=(make_site(), make_site(state=LONG))))
    assert out["sdpo_loss_mask"].shape == out["input_ids"].shape
    for ids, mask in zip(out["input_ids"], out["sdpo_loss_mask"], strict=True):
        assert smollm2_tokenizer.decode(ids[mask]) == ACTION + "<|im_end|>"


def test_the_student_context_is_the_untouched_state(collator, smollm2_tokenizer):
    out = collator(StepBatch(hint_sites=(make_site(),)))
    context = out["input_ids"][0][~out["sdpo_loss_mask"][0]]
    expected = smollm2_tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in STATE],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert context.tolist() == expected


def test_an_empty_hint_gives_the_teacher_the_students_row(collator):
    out = collator(StepBatch(hint_sites=(make_site(hint=""),)))
    assert torch.equal(out["input_ids"], out["ctx_teacher_input_ids"])
    assert torch.equal(out["sdpo_student_index"], out["sdpo_teacher_index"])


def test_an_off_by_one_teacher_index_is_refused(collator):
    out = collator(StepBatch(hint_sites=(make_site(),)))
    moved = out["sdpo_teacher_index"].clone()
    moved[:, 1] -= 1
    with pytest.raises(AlignmentError, match="compare different tokens"):
        check_alignment(
            out["input_ids"], out["sdpo_student_index"], out["ctx_teacher_input_ids"], moved
        )
    with pytest.raises(AlignmentError, match="action tokens and teachers"):
        check_alignment(
            out["input_ids"], out["sdpo_student_index"], out["ctx_teacher_input_ids"], moved[1:]
        )


def test_pairs_carry_their_own_reference_sums_and_response_masks(collator, smollm2_tokenizer):
    pair = make_pair(weight=0.5)
    out = collator(StepBatch(pairs=(pair, make_pair(state=LONG))))
    assert out["dpo_chosen_ref_logprobs"].tolist() == [-12.5, -12.5]
    assert out["dpo_rejected_ref_logprobs"].tolist() == [-7.25, -7.25]
    assert out["dpo_pair_weights"].tolist() == [0.5, 1.0]
    for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        ids, mask = out[f"dpo_{side}_input_ids"], out[f"dpo_{side}_response_mask"]
        assert ids.shape == mask.shape
        for row in range(2):
            assert smollm2_tokenizer.decode(ids[row][mask[row]]) == text + "<|im_end|>"


def test_a_pair_without_references_is_refused_rather_than_given_a_placeholder(collator):
    with pytest.raises(DataError, match="1 of 2 pairs have no reference log-probs"):
        collator(StepBatch(pairs=(make_pair(), make_pair(ref_rejected_logp=None))))


def test_rollouts_keep_their_ids_and_mark_what_the_environment_wrote(collator):
    long = Rollout((5, 6, 7), (8, 9, 10), (True, False, True), advantage=0.5)
    short = Rollout((5,), (8,), (True,), advantage=-0.5)
    out = collator(StepBatch(rollouts=(long, short)))
    assert out["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]  # left-padded, as TRL has it
    assert out["completion_ids"][0].tolist() == [8, 9, 10]
    assert out["completion_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert out["tool_mask"].tolist() == [[1, 0, 1], [1, 0, 0]]
    assert out["advantages"].tolist() == [0.5, -0.5]
    assert "old_per_token_logps" not in out


def test_a_rollout_whose_mask_and_tokens_differ_in_length_is_refused():
    with pytest.raises(DataError, match="must be equal in number"):
        Rollout((5,), (8, 9), (True,), advantage=0.0)


def test_exact_sampled_ids_are_used_as_they_are(collator, smollm2_tokenizer):
    state_ids = tuple(
        smollm2_tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in STATE],
            add_generation_prompt=True,
            return_dict=False,
        )
    )
    odd = tuple(smollm2_tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "c"))
    site = dataclasses.replace(make_site(action="abc"), state_ids=state_ids, action_ids=odd)
    out = collator(StepBatch(hint_sites=(site,)))
    assert out["input_ids"][0].tolist() == [*state_ids, *odd]
    assert out["ctx_teacher_input_ids"][0, -3:].tolist() == list(odd)


def test_a_row_over_the_limit_is_refused_by_default_and_says_what_to_set(smollm2_tokenizer):
    collator = ComposerDataCollator(smollm2_tokenizer, max_length=60)
    with pytest.raises(DataError, match=r"needs \d+ tokens and max_length is 60.*truncation"):
        collator(StepBatch(hint_sites=(make_site(state=LONG),)))


def test_cutting_the_middle_keeps_system_prompt_hint_and_action_and_is_counted(smollm2_tokenizer):
    collator = ComposerDataCollator(smollm2_tokenizer, max_length=60, truncation="middle")
    batch = StepBatch(hint_sites=(make_site(state=LONG),), pairs=(make_pair(state=LONG),))
    out = collator(batch)
    assert out["num_truncated_rows"] == 4
    student = smollm2_tokenizer.decode(out["input_ids"][0])
    teacher = smollm2_tokenizer.decode(out["ctx_teacher_input_ids"][0])
    assert out["ctx_teacher_input_ids"].shape[1] == 60
    for text in (student, teacher):
        assert text.startswith("<|im_start|>system\nYou call tools.<|im_end|>")
        assert text.endswith(ACTION + "<|im_end|>")
    assert 'Use "file".' in teacher
    assert teacher.replace('\n\nUse "file".', "") == student  # both lost the same tokens
    assert out["dpo_chosen_input_ids"].shape[1] <= 60


def test_what_cannot_fit_without_touching_the_action_is_refused(smollm2_tokenizer):
    collator = ComposerDataCollator(smollm2_tokenizer, max_length=20, truncation="middle")
    with pytest.raises(DataError, match="system prompt, hint and action are kept"):
        collator(StepBatch(hint_sites=(make_site(state=LONG),)))


def test_an_untruncated_batch_says_so(collator):
    assert collator(StepBatch(hint_sites=(make_site(),)))["num_truncated_rows"] == 0
    assert list(collator(StepBatch())) == ["num_truncated_rows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": ()}, "empty state"),
        ({"state": (*STATE, Message("assistant", "x"))}, "ends with an assistant turn"),
        ({"action": ""}, "no action"),
    ],
)
def test_a_hint_site_that_could_not_train_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make_site(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": ACTION}, "over itself"),
        ({"rejected": ""}, "empty rejected action"),
        ({"weight": 0.0}, "must be above 0"),
        ({"weight": float("nan")}, "must be above 0"),
    ],
)
def test_a_pair_that_could_not_train_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make_pair(**changes)


@pytest.mark.parametrize("token", [-1, 49152])
def test_ids_without_an_embedding_are_refused_by_name(smollm2_tokenizer, token):
    collator = ComposerDataCollator(smollm2_tokenizer, vocab_size=49152)
    site = dataclasses.replace(make_site(), action="", action_ids=(5, token))
    with pytest.raises(DataError, match=rf"'s1': action_ids holds {token}, and the model's vocab"):
        collator(StepBatch(hint_sites=(site,)))
    site = dataclasses.replace(make_site(), state_ids=(5, token))
    with pytest.raises(DataError, match=rf"'s1': state_ids holds {token}, and the model's vocab"):
        collator(StepBatch(hint_sites=(site,)))


def test_ids_beyond_the_tokenizer_are_kept_where_the_embedding_is_padded(smollm2_tokenizer):
    collator = ComposerDataCollator(smollm2_tokenizer, vocab_size=49160)
    site = dataclasses.replace(make_site(), action="", action_ids=(5, 49159))
    out = collator(StepBatch(hint_sites=(site,)))
    assert out["input_ids"][0, -2:].tolist() == [5, 49159]


def test_action_ids_that_say_another_action_are_refused(collator, smollm2_tokenizer):
    other = tuple(smollm2_tokenizer.encode('{"tool": "list"}', add_special_tokens=False))
    site = dataclasses.replace(make_site(), action_ids=other)
    with pytest.raises(AlignmentError, match=r"action_ids say '\{\"tool\": \"list\"\}'. Student"):
        collator(StepBatch(hint_sites=(site,)))


def test_actions_that_render_alike_are_refused_though_their_texts_differ(smollm2_tokenizer):
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'] | trim"
    )
    pair = make_pair(chosen="read", rejected=" read ")
    with pytest.raises(DataError, match="'p1': the chat template renders both actions as the same"):
        ComposerDataCollator(tokenizer)(StepBatch(pairs=(pair,)))


def test_a_row_over_the_limit_says_how_long_it_is(smollm2_tokenizer):
    collator = ComposerDataCollator(smollm2_tokenizer, max_length=60)
    with pytest.raises(RecordTooLongError) as caught:
        collator.site_rows(make_site(state=LONG))
    unlimited = ComposerDataCollator(smollm2_tokenizer).site_rows(make_site(state=LONG))
    assert caught.value.num_tokens == len(unlimited[1].token_ids) > 60
