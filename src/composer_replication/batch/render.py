"""Messages to token ids with the model's own chat template: states, actions, hints, next turns.

Text that was sampled as ids is never rendered again: a hint is inserted by applying to the exact
ids the same edit that inserting it makes to the rendered ids.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from composer_replication.errors import AlignmentError, DataError
from composer_replication.traces.hints import HintSite, demonstrations_in
from composer_replication.traces.trace import Message

HintPlacement = Literal["append", "user_turn", "restate", "demonstrate"]

# Differ in their first character, so that the first token of the content differs too.
_PROBES = ("A probe text.", "9 other words")


def render_state(tokenizer: PreTrainedTokenizerBase, state: Sequence[Message]) -> list[int]:
    """Token ids of the context in which the model acts: the messages and the generation prompt."""
    return _render(tokenizer, state, add_generation_prompt=True)


def render_action(
    tokenizer: PreTrainedTokenizerBase, state: Sequence[Message], action: str
) -> list[int]:
    """Token ids of an action given as text, end-of-turn token included, as sampling would give.

    Raises:
        DataError: the template does not render the state as a prefix, or renders no action.
    """
    state_ids = render_state(tokenizer, state)
    full_ids = _render(
        tokenizer, (*state, Message("assistant", action)), add_generation_prompt=False
    )
    if full_ids[: len(state_ids)] != state_ids:
        raise DataError(
            f"The chat template does not render the state as a prefix of state and action "
            f"({action[:60]!r}), so the action's tokens cannot be told apart. "
            "Give the site's state_ids and action_ids as they were sampled."
        )
    action_ids = full_ids[len(state_ids) :]
    ends = [i for i, token in enumerate(action_ids) if token in end_of_turn_ids(tokenizer)]
    # Templates write a line break after the end of the turn; no model samples it.
    action_ids = action_ids[: ends[-1] + 1] if ends else action_ids
    if not action_ids:
        raise DataError(f"The chat template renders the action {action[:60]!r} as no tokens.")
    return action_ids


def with_hint(state: Sequence[Message], hint: str, placement: HintPlacement) -> tuple[Message, ...]:
    """The state as the teacher sees it; the empty hint changes nothing.

    `append` adds the hint to the last message after a blank line; `restate` then says that message
    once more, so that the request and not the hint is what the model reads last; `user_turn` puts
    the hint in a user turn of its own after the state. `demonstrate` shows the hint's example as a
    turn of its own before a restated last message; a hint without one, or a state that a tool
    result ends, is restated. Where the hint says which request an example answers, the example's
    turn is written as the last one is, with that request, which SmolLM2-135M follows best; after a
    tool result the first of them stands in the result's turn, and the user's request ends it all.
    """
    if not hint:
        return tuple(state)
    if placement == "user_turn":
        return (*state, Message("user", hint))
    last = state[-1]
    if placement == "demonstrate":
        advice, shown = demonstrations_in(hint)
        request = next((m for m in reversed(state) if m.role == "user"), None)
        says_requests = any(asked for asked, _ in shown)
        if shown and request is not None and (request is last or says_requests):
            turns = _demonstrated(shown, advice)
            if request is not last:
                turns[0] = replace(last, content=f"{last.content}\n\n{turns[0].content}")
            return (*state[:-1], *turns, *with_hint([request], advice, "restate"))
        placement = "restate"
    hinted = f"{last.content}\n\n{hint}"
    if placement == "restate":
        hinted += f"\n\n{last.content}"
    return (*state[:-1], replace(last, content=hinted))


def _demonstrated(shown: Sequence[tuple[str, str]], advice: str) -> list[Message]:
    turns: list[Message] = []
    for request, action in shown:
        asked = with_hint([Message("user", request)], advice, "restate")
        turns += asked if request else [Message("user", advice)]
        turns.append(Message("assistant", action))
    return turns


def insert_hint(
    tokenizer: PreTrainedTokenizerBase,
    site: HintSite,
    state_ids: Sequence[int],
    placement: HintPlacement,
) -> list[int]:
    """Token ids of the state with the hint, equal to `state_ids` up to the place of the hint.

    Raises:
        AlignmentError: the end of `state_ids` is not what the template renders for the state, so
            the hint has no exact place in it.
    """
    rendered_ids = render_state(tokenizer, site.state)
    hinted_ids = render_state(tokenizer, with_hint(site.state, site.hint, placement))
    edit_start = common_prefix_length(rendered_ids, hinted_ids)
    # The whole last message must agree, not just what follows the hint: every template closes a
    # turn with the same few tokens.
    other_ids = render_state(tokenizer, _with_other_text(site.state, len(site.state) - 1))
    tail = rendered_ids[common_prefix_length(rendered_ids, other_ids) :]
    if list(state_ids[-len(tail) :]) != tail:
        raise AlignmentError(
            f"Hint site {site.source!r}: the last {len(tail)} tokens of its state_ids differ from "
            "what the chat template renders for the state's last message, so the hint cannot be "
            "inserted exactly. Give the messages that the state_ids were made from."
        )
    num_kept = len(state_ids) - (len(rendered_ids) - edit_start)
    return [*state_ids[:num_kept], *hinted_ids[edit_start:]]


def render_next_turn(
    tokenizer: PreTrainedTokenizerBase, observation: Message, has_ended: bool
) -> list[int]:
    """Token ids that lead from a sampled action to the next one: observation, generation prompt.

    Args:
        tokenizer: of the policy.
        observation: what the environment answered.
        has_ended: False where the action was cut off; its end-of-turn token is then written here.
    """
    dummy = (Message("user", _PROBES[0]), Message("assistant", _PROBES[1]))
    action_end = _render(tokenizer, dummy, add_generation_prompt=False)
    ends = end_of_turn_ids(tokenizer)
    position = max((i for i, token in enumerate(action_end) if token in ends), default=None)
    full_ids = _render(tokenizer, (*dummy, observation), add_generation_prompt=True)
    if position is None or full_ids[: position + 1] != action_end[: position + 1]:
        raise DataError(
            "The chat template does not close an assistant turn with an end-of-turn token that "
            "stays in place when a turn follows, so multi-turn rollouts cannot keep exact ids. "
            "Set rollout.max_turns = 1."
        )
    return full_ids[position + 1 if has_ended else position :]


def system_prefix_length(
    tokenizer: PreTrainedTokenizerBase, state: Sequence[Message], state_ids: Sequence[int]
) -> int:
    """How many leading tokens of `state_ids` belong to the system prompt and the turn header.

    Found by changing the first other message and comparing, so it holds for templates that add a
    default system prompt or fold it into the first user turn.
    """
    first = next((i for i, message in enumerate(state) if message.role != "system"), None)
    if first is None:
        return len(state_ids)
    return common_prefix_length(state_ids, render_state(tokenizer, _with_other_text(state, first)))


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an assistant turn: eos, and ChatML's or Llama's turn ends where known."""
    names = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"]
    ids = cast(list[int | None], tokenizer.convert_tokens_to_ids(names))
    known = {token_id for token_id in ids if token_id is not None}
    # A tokenizer answers with its unknown token where it does not have the asked-for one.
    known.discard(cast(int, tokenizer.unk_token_id))
    return frozenset(known | {cast(int, tokenizer.eos_token_id)})


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    # Templates without tool support know no tool role; models see tool results as user turns there.
    takes_tools = "tool" in str(tokenizer.chat_template)
    rows = [
        {"role": "user" if m.role == "tool" and not takes_tools else m.role, "content": m.content}
        for m in messages
    ]
    try:
        ids = tokenizer.apply_chat_template(
            rows, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise DataError(
            f"The chat template refuses the turns {', '.join(row['role'] for row in rows)}: "
            f"{error}. Give records with the turns that the model knows (Gemma 2 knows no system "
            'turn), and hint_placement = "append" where two user turns may not follow each other.'
        ) from error
    return cast(list[int], ids)


def _with_other_text(state: Sequence[Message], index: int) -> tuple[Message, ...]:
    """The state with one message's text changed from its first character on."""
    message = state[index]
    probe = _PROBES[1] if message.content.startswith(_PROBES[0][0]) else _PROBES[0]
    return (*state[:index], replace(message, content=probe), *state[index + 1 :])


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
