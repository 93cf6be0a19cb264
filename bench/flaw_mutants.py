"""Plants known flaws in a copy of the tree and sees the named tests and smoke checks fail.

`bench/flaw_patches.toml` holds each flaw, the edits that plant it and what must catch it. Every
named test and smoke passes on an unchanged copy first; then each mutant gets a copy of its own.
A test counts only if it fails by an assertion or by an error of this package, not because the copy
does not import. A smoke counts by the names of its failed checks.

    python bench/flaw_mutants.py --only 3,10
    python bench/flaw_mutants.py --write
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "bench" / "flaw_patches.toml"
RESULTS = ROOT / "bench" / "results" / "flaw_mutants.json"

COPIED = ("src", "tests", "bench", "configs", "docs", "examples", ".ci")

CATCHES = {"AssertionError", "Failed", "ComposerError", "GradcheckError"}
"""Kinds of failure that catch a flaw; any other means that the copy itself is broken."""

MAX_JOB_S = 400

SMOKE = (
    "--steps", "2", "--json",
    "--set", "rollout.environment=letters_environment:EvenLetters",
    "--set", "grpo.num_generations=4",
    "--set", "grpo.per_device_train_batch_size=4",
    "--set", "grpo.max_completion_length=40",
    "--set", "grpo.learning_rate=1e-3",
    "--set", "grpo.bf16=false",
    "--set", "rollout.max_action_tokens=8",
)  # fmt: skip

ERROR = "error: "
"""Stands before the sentence of a smoke that stopped instead of judging."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One edit: `old` occurs exactly once in `file`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A flaw planted in this code, and what must catch it."""

    flaw: int
    name: str
    planted: str
    """What was planted, in words."""
    patches: tuple[Patch, ...]
    tests: tuple[str, ...]
    """Pytest ids; without `[...]`, one failing case is enough."""
    smoke: tuple[str, ...]
    """Checks of the smoke that must fail."""

    @property
    def is_in_the_code(self) -> bool:
        """Whether a smoke could see it; a flaw of the tests it cannot."""
        return any(patch.file.startswith("src/") for patch in self.patches)


def load_flaws(path: Path = PATCHES) -> tuple[dict[int, str], list[Mutant]]:
    """The flaws' titles by number, and every mutant in order."""
    table = tomllib.loads(path.read_text())
    mutants = [
        Mutant(
            flaw["number"],
            row["name"],
            row["planted"],
            tuple(Patch(**patch) for patch in row["patches"]),
            tuple(row["tests"]),
            tuple(row.get("smoke", ())),
        )
        for flaw in table["flaw"]
        for row in flaw["mutant"]
    ]
    return {flaw["number"]: flaw["title"] for flaw in table["flaw"]}, mutants


def plant(root: Path, mutant: Mutant) -> None:
    """Apply a mutant's edits to the tree at `root`.

    Raises:
        ValueError: a text that does not occur exactly once, so the flaw would not be this one.
    """
    for patch in mutant.patches:
        path = root / patch.file
        source = path.read_text()
        if source.count(patch.old) != 1:
            raise ValueError(
                f"{mutant.name}: {patch.file} has {source.count(patch.old)} times {patch.old!r}; "
                "it must be there once. Write the patch for today's source."
            )
        path.write_text(source.replace(patch.old, patch.new))


def copy_tree(source: Path, target: Path) -> Path:
    """What tests and smoke read, without what earlier runs left."""
    target.mkdir()
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source / name, target / name, ignore=ignored)
    for file in (path for path in source.iterdir() if path.is_file()):
        shutil.copy(file, target / file.name)
    return target


def preload() -> None:
    """Import what every job needs, so that a fork of this process starts in a second."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import datasets
    import peft
    import pytest
    import rich
    import transformers
    import trl

    # Looking a lazy name up imports its module.
    del datasets, peft, pytest, rich
    _ = transformers.LlamaForCausalLM, trl.GRPOTrainer, trl.GRPOConfig
    assert "composer_replication" not in sys.modules, "every job must import its own copy"


def in_fork(root: Path, work: Callable[[], object]) -> object:
    """What `work` returns in a fork whose package is the copy at `root`.

    Raises:
        RuntimeError: the fork died; the end of what it printed is in the message.
    """
    answer, log = root / "answer.json", root / "log.txt"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        signal.alarm(MAX_JOB_S)
        try:
            with log.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            os.chdir(root)
            folders = [str(root / name) for name in ("src", "tests/smoke", "bench")]
            sys.path[:0] = folders
            os.environ["PYTHONPATH"] = os.pathsep.join(folders)
            found = importlib.util.find_spec("composer_replication")
            assert Path(str(found and found.origin)).is_relative_to(root), found
            answer.write_text(json.dumps(work()))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
    if not answer.is_file():
        raise RuntimeError(f"A job in {root} died:\n{log.read_text()[-3000:]}")
    return json.loads(answer.read_text())


def kind_of_failure(error: type[BaseException]) -> str:
    """The kind that catches a flaw, or that the test could not run."""
    kinds = [kind.__name__ for kind in error.__mro__]
    return next((kind for kind in kinds if kind in CATCHES), f"broken by {kinds[0]}")


def run_tests(root: Path, tests: Iterable[str]) -> dict[str, str]:
    """For each test case `passed`, `skipped`, or the kind of its failure."""

    def work() -> dict[str, str]:
        import pytest

        outcomes: dict[str, str] = {}

        class Recorder:
            @pytest.hookimpl(wrapper=True)
            def pytest_runtest_makereport(
                self, item: pytest.Item, call: pytest.CallInfo[None]
            ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
                report = yield
                if report.failed and call.excinfo is not None:
                    outcomes[item.nodeid] = kind_of_failure(call.excinfo.type)
                elif report.when == "call" or report.skipped:
                    outcomes[item.nodeid] = report.outcome
                return report

            def pytest_collectreport(self, report: pytest.CollectReport) -> None:
                if report.failed:
                    outcomes[report.nodeid] = "broken before it ran"

        # Preloaded packages bring plugins whose asserts are not rewritten any more.
        quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        options = ["-q", "-p", "no:cacheprovider", "--basetemp", str(root / "pytest"), *quiet]
        pytest.main([*options, *tests], plugins=[Recorder()])
        return outcomes

    return in_fork(root, work)  # pyright: ignore[reportReturnType]


def smoke_failures(root: Path, model: Path) -> list[str]:
    """Names of the failed checks of a smoke on the tiny model, or the error it stopped with."""

    def work() -> list[str]:
        from composer_replication.cli import main

        out = root / "smoke"
        main(["smoke", "--model", str(model), "--out", str(out), *SMOKE])
        summary = json.loads((out / "summary.json").read_text())
        failed = [check["name"] for check in summary["checks"] if not check["passed"]]
        if summary["error"] is None:
            return failed
        return [*failed, ERROR + summary["error"].partition(". ")[0]]

    return in_fork(root, work)  # pyright: ignore[reportReturnType]


def outcome_of(test: str, outcomes: dict[str, str]) -> str:
    """`caught`, or why the test did not catch the flaw."""
    cases = {v for case, v in outcomes.items() if case == test or case.startswith(f"{test}[")}
    if cases & CATCHES:
        return "caught"
    return ", ".join(sorted(cases)) or "not run: " + ", ".join(sorted(set(outcomes.values())))


def check_unchanged(root: Path, mutants: list[Mutant], model: Path) -> None:
    """Every killer must pass where nothing is planted; none may be skipped."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    outcomes = run_tests(root, tests)
    lost = {test: outcome_of(test, outcomes) for test in tests}
    lost = {test: outcome for test, outcome in lost.items() if outcome != "passed"}
    assert not lost, f"on the unchanged tree: {lost}"
    if any(mutant.is_in_the_code for mutant in mutants):
        failed = smoke_failures(root, model)
        assert not failed, f"the smoke of the unchanged tree: {failed}"


def try_mutant(unchanged: Path, mutant: Mutant, model: Path, scratch: Path) -> dict[str, object]:
    """Plant one flaw in a copy; who caught it, who did not, and the seconds it took."""
    started_s = time.perf_counter()
    root = copy_tree(unchanged, scratch / mutant.name)
    plant(root, mutant)
    outcomes = run_tests(root, mutant.tests)
    missed = {test: outcome_of(test, outcomes) for test in mutant.tests}
    missed = {test: outcome for test, outcome in missed.items() if outcome != "caught"}
    failed = smoke_failures(root, model) if mutant.is_in_the_code else []
    missed |= {f"smoke {check}": "passed" for check in mutant.smoke if check not in failed}
    shutil.rmtree(root)
    return {
        "flaw": mutant.flaw,
        "name": mutant.name,
        "files": sorted({patch.file for patch in mutant.patches}),
        "planted": mutant.planted,
        "tests": list(mutant.tests),
        "smoke": failed,
        "missed": missed,
        "seconds": round(time.perf_counter() - started_s, 1),
    }


def make_model(root: Path, folder: Path) -> None:
    """The tiny random model of the kill test."""

    def work() -> None:
        import kill_resume

        kill_resume.make_model(folder)

    in_fork(root, work)


def write_results(rows: list[dict[str, object]]) -> None:
    """Keep these rows in the results, beside those of the other mutants that still exist."""
    stored = json.loads(RESULTS.read_text())["mutants"] if RESULTS.is_file() else []
    by_name = {row["name"]: row for row in [*stored, *rows]}
    _, mutants = load_flaws()
    kept = [by_name[mutant.name] for mutant in mutants if mutant.name in by_name]
    RESULTS.write_text(json.dumps({"schema": 1, "mutants": kept}, indent=2) + "\n")


def main() -> int:
    """Run it; 1 where a flaw was not caught by everything that was named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="numbers of flaws or names of mutants, with commas between")
    parser.add_argument("--write", action="store_true", help="keep the result in bench/results")
    options = parser.parse_args()
    _, mutants = load_flaws()
    if options.only:
        wanted = set(options.only.split(","))
        mutants = [m for m in mutants if {str(m.flaw), m.name} & wanted]
    preload()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        unchanged = copy_tree(ROOT, scratch / "unchanged")
        model = scratch / "model"
        make_model(unchanged, model)
        check_unchanged(copy_tree(unchanged, scratch / "baseline"), mutants, model)
        rows = []
        for mutant in mutants:
            row = try_mutant(unchanged, mutant, model, scratch)
            rows.append(row)
            verdict = "caught" if not row["missed"] else f"MISSED by {row['missed']}"
            seen = f"; smoke: {', '.join(row['smoke']) or 'passes'}" * mutant.is_in_the_code
            print(
                f"{mutant.flaw:>2} {mutant.name}: {verdict}{seen} ({row['seconds']} s)", flush=True
            )
    survivors = [row["name"] for row in rows if row["missed"]]
    print(f"{len(rows) - len(survivors)} of {len(rows)} caught. Survivors: {survivors or 'none'}")
    if options.write and not survivors:
        write_results(rows)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
