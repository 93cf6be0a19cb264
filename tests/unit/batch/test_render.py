"""Rendering with SmolLM2's own template: actions, hints and next turns as exact token ids."""

import pytest

from composer_replication.batch.render import (
    insert_hint,
    render_action,
    render_next_turn,
    render_state,
    system_prefix_length,
    with_hint,
)
from composer_replication.errors import AlignmentError
from composer_replication.traces.hints import HintSite, hint_from_error
from composer_replication.traces.trace import Message, TurnError

STATE = (Message("system", "You call tools."), Message("user", "Read /src/app.py."))
ACTION = '{"tool": "read", "path": "/src/app.py"}'


def site(**changes):
    fields = {"state": STATE, "hint": 'Use "file".', "action": ACTION}
    return HintSite(**(fields | changes))


def test_a_rendered_action_ends_with_its_end_of_turn_token_and_no_line_break(smollm2_tokenizer):
    ids = render_action(smollm2_tokenizer, STATE, ACTION)
    assert smollm2_tokenizer.decode(ids) == ACTION + "<|im_end|>"


def test_state_and_action_together_are_what_the_template_renders(smollm2_tokenizer):
    text = smollm2_tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in (*STATE, Message("assistant", ACTION))],
        tokenize=False,
    )
    ids = render_state(smollm2_tokenizer, STATE) + render_action(smollm2_tokenizer, STATE, ACTION)
    assert smollm2_tokenizer.decode(ids) + "\n" == text


def test_an_appended_hint_follows_the_last_message_after_a_blank_line(smollm2_tokenizer):
    ids = insert_hint(smollm2_tokenizer, site(), render_state(smollm2_tokenizer, STATE), "append")
    text = smollm2_tokenizer.decode(ids)
    assert 'Read /src/app.py.\n\nUse "file".<|im_end|>\n<|im_start|>assistant\n' in text


def test_a_hint_in_a_user_turn_of_its_own_leaves_the_last_message_alone(smollm2_tokenizer):
    ids = insert_hint(
        smollm2_tokenizer, site(), render_state(smollm2_tokenizer, STATE), "user_turn"
    )
    text = smollm2_tokenizer.decode(ids)
    assert 'Read /src/app.py.<|im_end|>\n<|im_start|>user\nUse "file".<|im_end|>' in text


def test_a_restated_message_stands_on_both_sides_of_the_hint(smollm2_tokenizer):
    state_ids = render_state(smollm2_tokenizer, STATE)
    ids = insert_hint(smollm2_tokenizer, site(), state_ids, "restate")
    text = smollm2_tokenizer.decode(ids)
    assert 'Read /src/app.py.\n\nUse "file".\n\nRead /src/app.py.<|im_end|>' in text
    before, _, _ = smollm2_tokenizer.decode(state_ids).rpartition("<|im_end|>")
    assert text.startswith(before)


def test_an_example_is_demonstrated_before_the_restated_message(smollm2_tokenizer):
    state_ids = render_state(smollm2_tokenizer, STATE)
    hinted = site(hint='Use "file". Example of a correct call: {"file": "/b"}')
    text = smollm2_tokenizer.decode(
        insert_hint(smollm2_tokenizer, hinted, state_ids, "demonstrate")
    )
    before, _, _ = smollm2_tokenizer.decode(state_ids).rpartition("Read /src/app.py.<|im_end|>")
    assert text == (
        f'{before}Use "file".<|im_end|>\n<|im_start|>assistant\n{{"file": "/b"}}<|im_end|>\n'
        '<|im_start|>user\nRead /src/app.py.\n\nUse "file".\n\nRead /src/app.py.<|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_a_demonstrated_request_is_asked_as_the_last_one_is(smollm2_tokenizer):
    shown = (("Read /b.py.", '{"file": "/b.py"}'), ("Read /c.py.", '{"file": "/c.py"}'))
    error = TurnError("unknown_key", 'Use "file".', demonstrations=shown)
    state_ids = render_state(smollm2_tokenizer, STATE)
    hinted = site(hint=hint_from_error(error))
    text = smollm2_tokenizer.decode(
        insert_hint(smollm2_tokenizer, hinted, state_ids, "demonstrate")
    )
    before, _, _ = smollm2_tokenizer.decode(state_ids).rpartition("Read /src/app.py.<|im_end|>")
    asked = 'Read {0}.\n\nHint: Use "file".\n\nRead {0}.<|im_end|>\n<|im_start|>assistant\n'
    answered = '{{"file": "{0}"}}<|im_end|>\n<|im_start|>user\n'
    assert text == before + "".join(
        (
            asked.format("/b.py"),
            answered.format("/b.py"),
            asked.format("/c.py"),
            answered.format("/c.py"),
            asked.format("/src/app.py"),
        )
    )


def test_after_a_tools_answer_the_first_demonstration_follows_it_and_the_request_ends_it():
    answered = (*STATE, Message("assistant", ACTION), Message("tool", "red"))
    shown = (("Read /b.py.", "b"), ("Read /c.py.", "c"))
    hint = hint_from_error(TurnError("", "Now move it.", demonstrations=shown))
    asked = "Read {0}.\n\nHint: Now move it.\n\nRead {0}."
    assert with_hint(answered, hint, "demonstrate") == (
        *answered[:-1],
        Message("tool", "red\n\n" + asked.format("/b.py")),
        Message("assistant", "b"),
        Message("user", asked.format("/c.py")),
        Message("assistant", "c"),
        Message("user", asked.format("/src/app.py")),
    )


def test_without_a_user_turn_the_last_message_is_restated():
    state = (Message("system", "You call tools."), Message("tool", "red"))
    hint = hint_from_error(TurnError("", "Go on.", demonstrations=(("Read b.", "b"),)))
    assert with_hint(state, hint, "demonstrate") == with_hint(state, hint, "restate")


def test_without_an_example_or_after_a_tools_answer_the_message_is_restated(smollm2_tokenizer):
    answered = (*STATE, Message("assistant", ACTION), Message("tool", "error: no"))
    for state, hint in (
        (STATE, 'Use "file".'),
        (answered, "Use it. Example of a correct call: {}"),
    ):
        assert with_hint(state, hint, "demonstrate") == with_hint(state, hint, "restate")


@pytest.mark.parametrize("placement", ["append", "user_turn", "restate", "demonstrate"])
def test_the_empty_hint_inserts_nothing(smollm2_tokenizer, placement):
    state_ids = render_state(smollm2_tokenizer, STATE)
    assert insert_hint(smollm2_tokenizer, site(hint=""), state_ids, placement) == state_ids
    assert with_hint(STATE, "", placement) == STATE


def test_a_hint_keeps_sampled_ids_that_the_tokenizer_would_not_produce(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    state = (*STATE, Message("assistant", "ab"), Message("tool", "error: no"))
    # "ab" sampled as two tokens, though the tokenizer would write one.
    sampled = [tokenizer.convert_tokens_to_ids(t) for t in ("a", "b")]
    assert tokenizer("ab").input_ids != sampled
    eos = tokenizer.eos_token_id
    state_ids = [
        *render_state(tokenizer, STATE),
        *sampled,
        eos,
        *render_next_turn(tokenizer, state[-1], has_ended=True),
    ]
    ids = insert_hint(tokenizer, site(state=state), state_ids, "append")
    assert (
        ids[: len(render_state(tokenizer, STATE)) + 3]
        == state_ids[: len(render_state(tokenizer, STATE)) + 3]
    )
    assert 'error: no\n\nUse "file".<|im_end|>' in tokenizer.decode(ids)


def test_a_hint_whose_messages_do_not_match_its_ids_is_refused(smollm2_tokenizer):
    other = render_state(smollm2_tokenizer, (Message("user", "Another question entirely?"),))
    with pytest.raises(AlignmentError, match="cannot be inserted exactly"):
        insert_hint(smollm2_tokenizer, site(), other, "append")


@pytest.mark.parametrize("has_ended", [True, False])
def test_the_next_turn_continues_exactly_what_the_template_renders(smollm2_tokenizer, has_ended):
    tokenizer = smollm2_tokenizer
    observation = Message("user", "error: unknown key")
    whole = render_state(tokenizer, (*STATE, Message("assistant", ACTION), observation))
    action = render_action(tokenizer, STATE, ACTION)
    sampled = action if has_ended else action[:-1]
    joined = [
        *render_state(tokenizer, STATE),
        *sampled,
        *render_next_turn(tokenizer, observation, has_ended),
    ]
    assert joined == whole


def test_a_tool_turn_is_a_user_turn_where_the_template_has_no_tools(smollm2_tokenizer):
    as_tool = render_state(smollm2_tokenizer, (*STATE, Message("tool", "ok")))
    as_user = render_state(smollm2_tokenizer, (*STATE, Message("user", "ok")))
    assert as_tool == as_user


@pytest.mark.parametrize("state", [STATE, STATE[1:]])
def test_the_system_prefix_ends_where_the_first_user_text_begins(smollm2_tokenizer, state):
    ids = render_state(smollm2_tokenizer, state)
    kept = smollm2_tokenizer.decode(ids[: system_prefix_length(smollm2_tokenizer, state, ids)])
    assert kept.startswith("<|im_start|>system\nYou ")
    assert kept.endswith("<|im_start|>user\n")
