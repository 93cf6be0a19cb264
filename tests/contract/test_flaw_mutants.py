"""The planted flaws fit today's source, and the stored results are of exactly these flaws."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT / "bench"))
flaw_mutants = importlib.import_module("flaw_mutants")

TITLES, MUTANTS = flaw_mutants.load_flaws()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_flaw_fits_the_source_and_leaves_it_python(mutant, tmp_path):
    for patch in mutant.patches:
        path = tmp_path / patch.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((ROOT / patch.file).read_text())
    flaw_mutants.plant(tmp_path, mutant)
    for patch in mutant.patches:
        planted = (tmp_path / patch.file).read_text()
        assert planted != (ROOT / patch.file).read_text()
        compile(planted, patch.file, "exec")


def test_every_flaw_has_a_mutant_and_every_mutant_a_test_that_must_fail():
    assert list(TITLES) == list(range(1, 16))
    assert {mutant.flaw for mutant in MUTANTS} == TITLES.keys()
    assert all(mutant.tests for mutant in MUTANTS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_the_stored_results_are_of_these_flaws_and_none_was_missed():
    rows = json.loads(flaw_mutants.RESULTS.read_text())["mutants"]
    assert [row["name"] for row in rows] == [mutant.name for mutant in MUTANTS]
    for row, mutant in zip(rows, MUTANTS, strict=True):
        assert row["missed"] == {}
        assert row["planted"] == mutant.planted
        assert row["tests"] == list(mutant.tests)
        assert row["files"] == sorted({patch.file for patch in mutant.patches})
        assert set(mutant.smoke) <= set(row["smoke"])
