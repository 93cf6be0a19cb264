"""A reader sees a file whole or not at all."""

import os

import pytest

from composer_replication.runs.atomic_files import is_temporary, write_text_atomically
from composer_replication.runs.json_text import to_json_text


def test_a_writer_that_dies_midway_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text_atomically(path, "old")

    def die(_descriptor):
        raise OSError("disk gone")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="disk gone"):
        write_text_atomically(path, "new, but never whole")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_the_target_is_synced_before_it_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text_atomically(path, "old")
    seen = []

    def look(_descriptor):
        seen.append((path.read_text(), sum(is_temporary(e.name) for e in tmp_path.iterdir())))

    monkeypatch.setattr(os, "fsync", look)
    write_text_atomically(path, "new")
    assert seen == [("old", 1)]
    assert path.read_text() == "new"


def test_a_written_file_follows_the_umask(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    write_text_atomically(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def test_non_finite_floats_are_null_at_any_depth():
    payload = {"loss": float("nan"), "norms": [float("inf"), (1.5, -float("inf"))], "text": "nan"}
    assert to_json_text(payload) == '{"loss": null, "norms": [null, [1.5, null]], "text": "nan"}'


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        to_json_text({"set": {1}})
