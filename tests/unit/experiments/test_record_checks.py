"""Records are rendered with the model's tokenizer before its weights load; errors name the line."""

import copy
import json

import pytest

from composer_replication.config.loading import load_config
from composer_replication.errors import ConfigError, DataError
from composer_replication.experiments import record_checks
from composer_replication.experiments.record_checks import check_records, check_row_length
from composer_replication.experiments.run_data import load_run_data
from composer_replication.training.model_source import ModelFacts, model_facts


def turn(role, content):
    return {"role": role, "content": content}


STATE = [turn("system", "You call tools."), turn("user", "Read it.")]
LONG = [turn("system", "You call tools."), turn("user", "word " * 60)]


@pytest.fixture(scope="module")
def facts(tiny_model_dir):
    return model_facts(str(tiny_model_dir))


@pytest.fixture
def check(tmp_path, facts):
    """`check(*overrides, prompts=, sites=, pairs=)`: the notes of a folder with these records."""

    def run(
        *overrides,
        prompts=({"prompt": STATE},),
        sites=({"state": STATE, "hint": "h", "action": "a"},),
        pairs=({"state": STATE, "chosen": "a", "rejected": "b"},),
        facts=facts,
        max_completion_length=8,
    ):
        for name, rows in (("prompts", prompts), ("hint_sites", sites), ("pairs", pairs)):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = load_run_data(str(tmp_path))
        config = load_config(None, list(overrides))
        return check_records(config, data, facts, max_completion_length=max_completion_length)

    return run


def site(**changes):
    return {"state": STATE, "hint": "h", "action": "a", **changes}


def pair(**changes):
    return {"state": STATE, "chosen": "a", "rejected": "b", **changes}


def test_records_that_can_be_used_leave_no_note(check):
    assert check() == []


def test_rows_over_the_limit_are_counted_and_the_longest_says_what_to_set(check, tmp_path):
    sites = (site(), site(state=LONG), site(state=LONG, action="a longer action"))
    with pytest.raises(DataError) as caught:
        check("batch.max_context_tokens=60", sites=sites)
    text = str(caught.value)
    path = tmp_path / "hint_sites.jsonl"
    assert text.startswith(
        f"2 of 3 rows of {path} are over batch.max_context_tokens = 60; the longest, {path}, line "
        "3, has "
    )
    longest = int(text.partition(" has ")[2].split()[0])
    assert text.endswith(
        f"has {longest} tokens. Set batch.max_context_tokens = {longest}, set batch.truncation = "
        "'middle', or drop the rows."
    )
    assert check(f"batch.max_context_tokens={longest}", sites=sites) == []
    with pytest.raises(DataError, match=r"^1 of 3 rows"):
        check(f"batch.max_context_tokens={longest - 1}", sites=sites)


def test_cutting_the_middle_makes_room_where_there_is_a_middle(check):
    options = ("batch.max_context_tokens=60", "batch.truncation=middle")
    assert check(*options, sites=(site(state=LONG),)) == []
    with pytest.raises(DataError, match="even without the middle of their states"):
        check(*options, pairs=(pair(chosen="word " * 60),))


def test_rows_longer_than_the_models_positions_are_refused(check, facts):
    short = ModelFacts(facts.tokenizer, facts.vocab_size, 60, facts.config)
    with pytest.raises(
        DataError, match=r"1 of 2 rows of .*pairs\.jsonl are longer than the model's"
    ):
        check(facts=short, pairs=(pair(), pair(state=LONG)))
    with pytest.raises(DataError) as caught:
        check(facts=short, max_completion_length=50)
    assert str(caught.value).startswith(
        "1 of 1 prompts leave no room for grpo.max_completion_length = 50 within the model's 60 "
    )


@pytest.mark.parametrize("file", ["prompts", "hint_sites", "pairs"])
def test_what_the_chat_template_refuses_names_the_line(check, tmp_path, facts, file):
    tokenizer = copy.deepcopy(facts.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('System role must come first') }}{% endif %}{% endfor %}"
        + tokenizer.chat_template
    )
    late = [turn("user", "Read it."), turn("system", "Be brief."), turn("user", "Now.")]
    rows = {
        "prompts": {"prompts": ({"prompt": STATE}, {"prompt": late})},
        "hint_sites": {"sites": (site(), site(state=late))},
        "pairs": {"pairs": (pair(), pair(state=late))},
    }[file]
    refused = ModelFacts(tokenizer, facts.vocab_size, facts.max_positions, facts.config)
    with pytest.raises(DataError) as caught:
        check(facts=refused, **rows)
    assert str(caught.value).startswith(
        f"{tmp_path / f'{file}.jsonl'}, line 2: The chat template refuses the turns user, system, "
        "user: System role must come first. "
    )


def test_a_channel_that_is_off_reads_no_record(check):
    too_long = {"sites": (site(state=LONG),), "pairs": (pair(state=LONG),)}
    limit = "batch.max_context_tokens=60"
    assert check(limit, "alpha_sdpo=0", "beta_replay=0", **too_long) == []
    for off in ("alpha_sdpo=0", "beta_replay=0"):
        with pytest.raises(DataError):
            check(limit, off, **too_long)


def test_what_there_is_no_time_for_is_noted_and_the_first_record_is_always_checked(
    check, monkeypatch
):
    monkeypatch.setattr(record_checks, "BUDGET_S", -1.0)
    assert check(prompts=({"prompt": STATE}, {"prompt": LONG}), pairs=(pair(), pair())) == [
        "Not checked with the tokenizer, to start in time: prompts.jsonl from row 2 of 2; "
        "pairs.jsonl from row 2 of 2."
    ]
    with pytest.raises(DataError):
        check("batch.max_context_tokens=60", sites=(site(state=LONG), site()))


def test_no_more_records_are_rendered_than_the_number_that_is_stated(check, monkeypatch):
    monkeypatch.setattr(record_checks, "MAX_RECORDS", 2)
    assert check(sites=(site(), site(), site(), site())) == [
        "Not checked with the tokenizer, to start in time: hint_sites.jsonl from row 3 of 4."
    ]


def test_more_teacher_tokens_than_the_vocabulary_has_are_refused(check):
    with pytest.raises(
        ConfigError, match=r"sdpo\.top_k is 49153 and the model's vocabulary has 49152"
    ):
        check("sdpo.top_k=49153")
    assert check("sdpo.top_k=49152") == []


def test_row_lengths_hold_a_template_a_hint_and_an_action_within_the_positions(facts, check):
    with pytest.raises(ConfigError, match=r"^--fixed: A row of 16 tokens cannot hold this model's"):
        check_row_length(16, facts, "--fixed")
    with pytest.raises(
        ConfigError, match=r"^--fixed asks for rows of 2049 tokens and the model has"
    ):
        check_row_length(2049, facts, "--fixed")
    check_row_length(96, facts, "--fixed")
    for setting in ("smoke.fixed_shapes=[2, 16]", "smoke.max_shape_tokens=16"):
        with pytest.raises(ConfigError, match=rf"^{setting.partition('=')[0]}: A row of 16"):
            check(setting)
