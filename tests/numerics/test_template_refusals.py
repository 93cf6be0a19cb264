"""A chat template that refuses a conversation ends in words, not in a template engine's trace."""

import pytest
import tiny_families

from composer_replication import ComposerDataCollator, HintSite, Message
from composer_replication.errors import DataError

# Gemma's: no system turn, users and model strictly in turn.
STRICT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def collator(placement="append"):
    tokenizer = tiny_families.chat_tokenizer()
    tokenizer.chat_template = STRICT_TEMPLATE
    return ComposerDataCollator(tokenizer, hint_placement=placement)


def site(*state):
    return HintSite(state, "use find", "ls", source="s")


USER = Message("user", "list src")


def test_a_template_without_system_turns_says_so_and_names_the_roles():
    with pytest.raises(
        DataError, match=r"refuses the turns system, user: System role not supported"
    ):
        collator().site_rows(site(Message("system", "call tools"), USER))


def test_a_hint_turn_that_breaks_the_alternation_names_the_other_placement():
    with pytest.raises(DataError, match=r"user, user: Conversation roles.*hint_placement"):
        collator("user_turn").site_rows(site(USER))
    student, teacher, _ = collator().site_rows(site(USER))
    assert len(teacher.token_ids) == len(student.token_ids) + len("\n\nuse find")
