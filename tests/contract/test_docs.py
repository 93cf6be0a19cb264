"""Docs and code agree: pages that are written by a script, commands, imports, make targets."""

import ast
import importlib
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from composer_replication.cli import main
from composer_replication.cli.evaluate_options import asked_evaluation
from composer_replication.cli.verb import find_verb, parse_options
from composer_replication.cli.verbs import HELP, VERBS
from composer_replication.config.loading import load_config
from composer_replication.experiments.evaluation_data import task_data

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

sys.path.insert(0, str(ROOT / "bench"))
render_docs = importlib.import_module("render_docs")
evidence_page = importlib.import_module("evidence_page")


def code_blocks(language):
    found = []
    for page in PAGES:
        pattern = rf"```{language}\n(.*?)```"
        found += re.findall(pattern, page.read_text(), flags=re.DOTALL)
    return found


def command_lines():
    lines = [line for block in code_blocks("bash") for line in block.splitlines()]
    inline = [text for page in PAGES for text in re.findall(r"`([^`\n]+)`", page.read_text())]
    commands = [*lines, *inline]
    return [part.strip() for line in commands for part in line.split("#")[0].split("&&")]


OURS = sorted({c for c in command_lines() if c.startswith("composer-replication ")})
MAKE = sorted({c for c in command_lines() if c.startswith("make ")})
SCRIPTS = sorted({c for c in command_lines() if c.startswith("python ")})


def test_the_configuration_page_is_what_the_code_says():
    assert (ROOT / "docs/configuration.md").read_text() == render_docs.configuration()


def test_every_figure_of_the_measurements_page_comes_from_a_stored_result():
    assert (ROOT / "docs/measurements.md").read_text() == render_docs.measurements()


def test_every_figure_of_the_performance_page_comes_from_a_stored_result():
    assert (ROOT / "docs/performance.md").read_text() == render_docs.performance()


def test_the_evidence_page_is_what_the_stored_results_say():
    results = ROOT / "bench" / "results" / "evidence"
    assert (ROOT / "docs/evidence.md").read_text() == evidence_page.page(results)


def test_the_table_of_planted_flaws_is_what_the_stored_results_say():
    page = (ROOT / "docs/checks.md").read_text()
    assert page == render_docs.checks(page)


def test_what_the_readme_says_was_measured_comes_from_stored_results():
    page = (ROOT / "README.md").read_text()
    assert page == render_docs.readme(page)


def test_the_table_of_the_founding_note_is_what_the_planner_says():
    page = (ROOT / "docs/planner.md").read_text()
    assert page == render_docs.planner(page)


@pytest.mark.parametrize("command", OURS)
def test_a_documented_command_is_one_the_program_takes(command):
    arguments = shlex.split(command)[1:]
    if arguments[0] in ("VERB", "--help"):
        return
    options = parse_options(find_verb(arguments, VERBS), arguments[1:])
    config = getattr(options, "config", None)
    if config is not None and config.parts[0] == "configs":
        load_config(ROOT / config, options.set)


def evaluate_lines():
    """Every `evaluate` that a page, a help text or an error advises."""
    helps = [HELP, *(verb.epilog for verb in VERBS)]
    lines = [*OURS, *(line.strip() for text in helps for line in text.splitlines())]
    return sorted({line for line in lines if line.startswith("composer-replication evaluate ")})


@pytest.mark.parametrize("command", evaluate_lines())
def test_a_documented_evaluation_has_episodes_to_play(command):
    arguments = shlex.split(command)[1:]
    asked = asked_evaluation(parse_options(find_verb(arguments, VERBS), arguments[1:]))
    if asked.task is not None:
        assert len(asked.episodes().prompts) == (asked.num_episodes or 24)


def test_the_knob_that_an_error_advises_is_one(capsys):
    assert main(["evaluate", "m", "--task", "call_format", "--set", "demos"]) == 2
    advised = re.search(r"Write for example --set (\w+)=(\w+)\.", capsys.readouterr().err)
    assert task_data("call_format", knobs={advised[1]: json.loads(advised[2])}).prompts


@pytest.mark.parametrize("command", MAKE)
def test_a_documented_make_target_exists(command):
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_documented_script_exists(command):
    assert (ROOT / command.split()[1]).is_file()


def imported_packages(script):
    """Of others, by name."""
    nodes = list(ast.walk(ast.parse(script.read_text())))
    modules = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    modules += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    packages = {module.partition(".")[0] for module in modules}
    return packages - sys.stdlib_module_names - {"composer_replication"}


def test_the_readme_installs_what_its_commands_need():
    readme = (ROOT / "README.md").read_text()
    (extras,) = re.findall(r'pip install -e "\.\[(.+?)\]"', readme)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [r for extra in extras.split(",") for r in project["optional-dependencies"][extra]]
    installed = {re.split(r"[<>=]", text)[0] for text in [*project["dependencies"], *wanted]}
    scripts = re.findall(r"python (examples/\S+\.py)", readme)
    assert len(scripts) >= 2
    for script in scripts:
        assert imported_packages(ROOT / script) <= installed, script
    if "lora." in readme:
        assert "peft" in installed


@pytest.mark.parametrize("block", code_blocks("python"))
def test_the_imports_of_a_documented_example_work(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_docs_name_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_readme_and_the_docs_were_found():
    assert len(OURS) >= 5
    assert len(MAKE) >= 2
    assert len(SCRIPTS) >= 2
