"""Data folders: what ships loads, and a mistake names file and line."""

import json

import pytest

from composer_replication.errors import DataError
from composer_replication.experiments.run_data import load_run_data

PROMPT = json.dumps({"prompt": [{"role": "user", "content": "x"}]})
SITE = json.dumps({"state": [{"role": "user", "content": "x"}], "hint": "h", "action": "a"})
PAIR = json.dumps({"state": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"})


def folder(tmp_path, **files):
    for name, content in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path)


def refusal(data):
    with pytest.raises(DataError) as caught:
        load_run_data(data)
    return str(caught.value)


def test_the_shipped_data_feeds_every_channel():
    data = load_run_data(None)
    assert data.task == "api_drift"
    assert (len(data.prompts), len(data.hint_sites), len(data.pairs)) == (64, 64, 44)
    assert data.notes == []


def test_hint_sites_and_pairs_may_be_missing_and_blank_lines_are_skipped(tmp_path):
    data = load_run_data(folder(tmp_path, prompts=f"{PROMPT}\n\n", hint_sites=f"\n{SITE}\n"))
    assert (len(data.prompts), len(data.hint_sites), len(data.pairs)) == (1, 1, 0)
    assert data.task is None
    assert data.place("hint_sites.jsonl", 0) == f"{tmp_path / 'hint_sites.jsonl'}, line 2"


def test_a_missing_file_and_an_empty_one_are_told_apart(tmp_path):
    data = load_run_data(folder(tmp_path, prompts=PROMPT, hint_sites="\n", pair=PAIR))
    assert data.lack_of("hint_sites.jsonl") == f"{tmp_path / 'hint_sites.jsonl'} has no row"
    assert data.lack_of("pairs.jsonl") == (
        f"{tmp_path} has no pairs.jsonl (it has hint_sites.jsonl, pair.jsonl, prompts.jsonl)"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"prompts": "{"}, "prompts.jsonl, line 1, is not JSON: Expecting property name enclosed"),
        (
            {"prompts": "[\n{}\n]"},
            "prompts.jsonl, line 1, is not JSON: Expecting value at column 2. Write one object a "
            "line; `jq -c '.[]'` does that to a whole file.",
        ),
        ({"prompts": "[1]"}, "prompts.jsonl, line 1, is [1], and a row is an object."),
        ({"prompts": '{"prompt": "x"}'}, "prompts.jsonl, line 1: 'prompt' is 'x'; it must be"),
        ({"prompts": '{"promt": []}'}, "prompts.jsonl, line 1: unknown key 'promt'. Did you mean"),
        (
            {"prompts": PROMPT.replace("user", "assistant")},
            "prompts.jsonl, line 1: the prompt ends with an assistant turn, 'x'",
        ),
        (
            {"prompts": PROMPT, "hint_sites": f"{SITE}\n{{}}"},
            "hint_sites.jsonl, line 2: there is no 'state'",
        ),
        ({"prompts": PROMPT, "pairs": SITE}, "pairs.jsonl, line 1: there is no 'chosen'"),
        (
            {"prompts": PROMPT, "pairs": PAIR[:-1] + ', "weight": NaN}'},
            "pairs.jsonl, line 1: NaN is no number that training could use. Correct the value",
        ),
        (
            {"prompts": PROMPT, "pairs": PAIR[:-1] + ', "weight": 1e999}'},
            "pairs.jsonl, line 1: 1e999 is beyond the range of a float. Correct the value",
        ),
        (
            {"prompts": f"{PROMPT}\n".encode() + b'{"\xff"}'},
            "prompts.jsonl, line 2, is not UTF-8 (byte 0xff). Save the file as UTF-8.",
        ),
        (
            {"prompts": PROMPT.encode("utf-16")},
            "prompts.jsonl, line 1, is not UTF-8 (byte 0xff). It looks like UTF-16. Save the file",
        ),
    ],
)
def test_a_mistake_names_the_file_the_line_and_what_to_write(tmp_path, files, message):
    assert refusal(folder(tmp_path, **files)).startswith(str(tmp_path / message))


@pytest.mark.parametrize("files", [{}, {"prompts": ""}])
def test_a_folder_without_a_prompt_is_refused(tmp_path, files):
    assert "no prompts.jsonl with at least one row" in refusal(folder(tmp_path, **files))


def test_a_byte_order_mark_and_unicode_line_separators_are_no_mistake(tmp_path):
    prompt = '{"prompt": [{"role": "user", "content": "a\u2028b\u0085c"}]}'
    data = load_run_data(folder(tmp_path, prompts=b"\xef\xbb\xbf" + f"{prompt}\r\n".encode()))
    assert data.prompts == [{"prompt": [{"role": "user", "content": "a\u2028b\u0085c"}]}]


def test_keys_that_nothing_reads_are_noted_once_a_file(tmp_path):
    extra = SITE[:-1] + ', "session": 1}'
    data = load_run_data(folder(tmp_path, prompts=PROMPT, hint_sites=f"{extra}\n{extra}\n{SITE}"))
    assert data.notes == ["hint_sites.jsonl has keys that nothing reads: 'session' (2 rows)."]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"schema": 9, "task": "api_drift"}', "schema 9 and this version reads 1"),
        ("{", "is not JSON"),
        ("[]", "holds [], and a manifest is an object"),
        ('{"schema": 1, "task": 3}', "'task' is 3; it names an environment"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, manifest, message):
    (tmp_path / "manifest.json").write_text(manifest)
    assert message in refusal(folder(tmp_path, prompts=PROMPT))


def test_a_folder_that_does_not_exist_and_a_file_are_told_apart(tmp_path):
    assert "/does/not/exist does not exist." in refusal("/does/not/exist")
    path = tmp_path / "pairs.jsonl"
    path.touch()
    assert refusal(str(path)).startswith(f"The data directory {path} is a file, not a folder.")
