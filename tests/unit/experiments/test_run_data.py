"""Data folders: what ships loads, and a mistake names file and line."""

import json

import pytest

from composer_replication.errors import DataError
from composer_replication.experiments.run_data import load_run_data

PROMPT = json.dumps({"prompt": [{"role": "user", "content": "x"}]})
SITE = json.dumps({"state": [{"role": "user", "content": "x"}], "hint": "h", "action": "a"})


def folder(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    return str(tmp_path)


def test_the_shipped_data_feeds_every_channel():
    data = load_run_data(None)
    assert data.task == "api_drift"
    assert (len(data.prompts), len(data.hint_sites), len(data.pairs)) == (64, 64, 44)


def test_hint_sites_and_pairs_may_be_missing_and_blank_lines_are_skipped(tmp_path):
    data = load_run_data(folder(tmp_path, prompts=f"{PROMPT}\n\n", hint_sites=SITE))
    assert (len(data.prompts), len(data.hint_sites), len(data.pairs)) == (1, 1, 0)
    assert data.task is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no prompts\.jsonl with at least one row"),
        ({"prompts": "{"}, r"prompts\.jsonl, line 1 is not JSON"),
        ({"prompts": "[1]"}, "write one JSON object a line"),
        ({"prompts": '{"prompt": "x"}'}, "must be a list of chat messages"),
        ({"prompts": PROMPT, "hint_sites": f"{SITE}\n{{}}"}, r"hint_sites\.jsonl, line 2: 'state'"),
        ({"prompts": PROMPT, "pairs": SITE}, r"pairs\.jsonl, line 1 has the unknown key 'hint'"),
    ],
)
def test_a_mistake_names_the_file_the_line_and_what_to_write(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load_run_data(folder(tmp_path, **files))


def test_a_manifest_of_another_schema_is_refused(tmp_path):
    path = folder(tmp_path, prompts=PROMPT)
    (tmp_path / "manifest.json").write_text('{"schema": 9, "task": "api_drift"}')
    with pytest.raises(DataError, match="schema 9 and this version reads 1"):
        load_run_data(path)


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(DataError, match="/does/not/exist does not exist"):
        load_run_data("/does/not/exist")
