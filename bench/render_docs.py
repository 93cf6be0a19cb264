"""Write docs/configuration.md from docstrings, and the pages of figures from bench results.

Also the table of planted flaws in docs/checks.md, that of the founding note in docs/planner.md and
what README.md says was measured, each between its two marks.

python bench/render_docs.py          # writes all; a test compares them with what this gives
"""

import json
from pathlib import Path
from typing import get_args

from flaw_mutants import ERROR, load_flaws
from headline import headline_lines
from launching import launching_lines
from performance_page import performance
from plan_memory_page import memory_lines
from probe_accuracy import probe_lines
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from composer_replication.config.loading import load_config
from composer_replication.config.run_config import RunConfig
from composer_replication.planner.hardware import GPUS, parse_gpu
from composer_replication.planner.local_machine import LocalCard, LocalMachine
from composer_replication.planner.plan import PlanRequest, make_plan
from composer_replication.planner.prices import shipped_prices

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

FLAWS_BEGIN = "<!-- flaws: written by bench/render_docs.py -->"
FLAWS_END = "<!-- flaws: end -->"
NOTE_BEGIN = "<!-- note: written by bench/render_docs.py -->"
NOTE_END = "<!-- note: end -->"
MEMORY_BEGIN = "<!-- memory: written by bench/render_docs.py -->"
MEMORY_END = "<!-- memory: end -->"
PROBE_BEGIN = "<!-- probe: written by bench/render_docs.py -->"
PROBE_END = "<!-- probe: end -->"
SHIPPED_BEGIN = "<!-- shipped: written by bench/render_docs.py -->"
SHIPPED_END = "<!-- shipped: end -->"
HEADLINE_BEGIN = "<!-- measured: written by bench/render_docs.py -->"
HEADLINE_END = "<!-- measured: end -->"


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """The model class of a section's field, optional or not; None for a plain key."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def key_rows(model: type[BaseModel]) -> list[str]:
    """A table row for each plain key of a model."""
    rows: list[str] = []
    for name, field in model.model_fields.items():
        if section_class(field) is None:
            default = field.get_default(call_default_factory=True)
            text = " ".join((field.description or "").split())
            text = text.replace("|", "\\|")
            shown = "none" if default is None else json.dumps(default)
            rows.append(f"| `{name}` | `{shown}` | {text} |")
    return rows


def configuration() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "One TOML file describes a run; `--set key=value` changes any key, such as",
        "`--set sdpo.top_k=100`. Unknown keys are refused, with the nearest known one. `configs/`",
        "has files to start from. This page is written by `bench/render_docs.py` from the code.",
        "",
        "| key | default | meaning |",
        "| --- | --- | --- |",
        *key_rows(RunConfig),
    ]
    for name, field in RunConfig.model_fields.items():
        section = section_class(field)
        if section is None:
            continue
        optional = " (optional: without it every weight is trained)" if name == "lora" else ""
        lines += [
            "",
            f"## `[{name}]`{optional}",
            "",
            "| key | default | meaning |",
            "| --- | --- | --- |",
            *key_rows(section),
        ]
    return "\n".join(lines) + "\n"


def result(name: str) -> dict:
    """What a script in `bench/` printed with `--json`, or a smoke's summary."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def smoke_lines() -> list[str]:
    """The smoke on the embedded model."""
    run = result("smoke_smollm2_135m")
    channels = run["channels"]
    phases = ", ".join(f"{name} {value:.1f}" for name, value in run["phases_s"].items())
    return [
        "## The smoke: SmolLM2-135M-Instruct, 2-core CPU",
        "",
        "`composer-replication smoke configs/smoke_smollm2_135m.toml --json`",
        "",
        "| figure | value |",
        "| --- | --- |",
        f"| optimizer steps | {run['steps']} |",
        f"| median step | {run['median_step_s']:.1f} s |",
        f"| p95 step | {run['p95_step_s']:.1f} s |",
        f"| total | {run['total_s']:.0f} s ({phases}) |",
        f"| peak memory of the process | {run['peak_gib']:.2f} GiB |",
        f"| the same after a step at the largest shape | {run['peak_gib_max_shape']:.2f} GiB |",
        f"| groups without reward spread | {channels['grpo']['frac_reward_zero_std']:.2f} |",
        f"| mean reward | {channels['grpo']['reward']:.3f} |",
        f"| SDPO, first step | {channels['sdpo']['loss_first']:.3e} nats a token |",
        f"| DPO, first step | {channels['dpo']['loss_first']:.4f} (log 2 is 0.6931) |",
    ]


def base_rate_lines() -> list[str]:
    """The task before any training."""
    lines = [
        "",
        "## The task before training: SmolLM2-135M-Instruct, groups of 4 at temperature 1",
        "",
        "`python bench/base_rates.py smollm2-135m --groups 32 --json`",
        "",
        "| split | groups | share of groups with reward spread | mean reward | exact success |",
        "| --- | --- | --- | --- | --- |",
    ]
    for split in ("train", "heldout"):
        rates = result(f"base_rates_{split}")
        lines.append(
            f"| {split} | {rates['groups']} | {rates['share_of_groups_with_spread']:.2f} | "
            f"{rates['mean_reward']:.3f} | {rates['exact_success']:.3f} |"
        )
    return lines


def fused_lines() -> list[str]:
    """Fused SDPO against TRL's two paths."""
    bench = result("fused_sdpo")
    shape = f"{bench['rows']} rows, hidden {bench['hidden']}, vocabulary {bench['vocab']:,}, fp32"
    lines = [
        "",
        f"## SDPO through the output head: {bench['machine']}",
        "",
        "`python bench/fused_sdpo.py --json`, forward and backward:",
        f"{shape}, beta {bench['beta']}.",
        "`full` is the full-logits path of TRL's experimental SDPO trainer, `chunked` is TRL's",
        "divergence kernel. Loss and gradients were compared first.",
    ]
    for case, title in (("frozen_head", "Frozen head"), ("trainable_head", "Trainable head")):
        found = bench[case]
        error = max(found["max_relative_errors"].values())
        lines += [
            "",
            f"{title}; equal within {error:.1e} of the largest value.",
            "",
            "| path | peak over base, MiB | median, s |",
            "| --- | --- | --- |",
            *(
                f"| {path} | {found['peak_mib'][path]:.0f} | {found['median_s'][path]:.1f} |"
                for path in found["median_s"]
            ),
            "",
            "| ratio | measured | target |",
            "| --- | --- | --- |",
        ]
        for name, value in found["ratios"].items():
            target = bench["targets"].get(name) if case == "frozen_head" else None
            aim = "" if target is None else f"at most {target:.2f}"
            lines.append(f"| {name} | {value:.3f} | {aim} |")
    return lines


def kill_lines() -> list[str]:
    """Runs killed at random instants and resumed."""
    run = result("kill_resume")
    return [
        "## Kills and resumes: a tiny model, 2-core CPU",
        "",
        "`python bench/kill_resume.py --kills 50 --write`",
        "",
        f"{run['kills']} kills at random instants, {run['kills_after_a_checkpoint']} of them after",
        f"a checkpoint, in {run['runs']} runs: every one ended equal to a run never killed.",
        "",
    ]


def measurements() -> str:
    """docs/measurements.md."""
    head = [
        "# Measurements",
        "",
        "Every figure here was printed by the command above it; the raw output is in",
        "`bench/results/` and `bench/render_docs.py` writes this page from it. The machines are",
        "shared: read ratios and medians.",
        "",
    ]
    launching = launching_lines()
    parts = [*smoke_lines(), *kill_lines(), *launching, *base_rate_lines(), *fused_lines()]
    return "\n".join([*head, *parts]) + "\n"


def flaw_lines() -> list[str]:
    """A table for each flaw: what was planted where, and which test and smoke check caught it."""
    titles, _ = load_flaws()
    rows = result("flaw_mutants")["mutants"]
    num_seen = sum(bool(row["smoke"]) for row in rows)
    lines = [
        "",
        f"{len(rows)} mutants of {len(titles)} flaws: each was caught by every test beside it, and "
        f"{num_seen} by the smoke.",
    ]
    for number, title in titles.items():
        lines += [
            "",
            f"**{number}. {title}**",
            "",
            "| planted | where | tests that fail | smoke |",
            "| --- | --- | --- | --- |",
            *(flaw_row(row) for row in rows if row["flaw"] == number),
        ]
    return lines


def flaw_row(row: dict) -> str:
    """One mutant's line of the table."""
    files = [file.removeprefix("src/composer_replication/") for file in row["files"]]
    tests = [test.partition("::")[2] for test in row["tests"]]
    checks = ["stops with an error" if c.startswith(ERROR) else f"`{c}`" for c in row["smoke"]]
    is_of_the_tests = all(file.startswith("tests/") for file in files)
    cells = [
        row["planted"],
        ", ".join(f"`{file}`" for file in files),
        ", ".join(f"`{test}`" for test in tests),
        "" if is_of_the_tests else ", ".join(checks) or "passes",
    ]
    return f"| {' | '.join(cells)} |"


def between(page: str, begin: str, lines: list[str], end: str) -> str:
    """The page with these lines between its two marks."""
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return before + "\n".join([begin, *lines, end]) + after


def checks(page: str) -> str:
    """docs/checks.md with the table of flaws of the stored results."""
    return between(page, FLAWS_BEGIN, [*flaw_lines(), ""], FLAWS_END)


def readme(page: str) -> str:
    """README.md with what was measured."""
    return between(page, HEADLINE_BEGIN, headline_lines(), HEADLINE_END)


def note_lines() -> list[str]:
    """The plan of the founding note's smoke on each card of its table and on a local 5090."""
    config = load_config(ROOT / "docs" / "note_smoke.toml", [])
    gpu = GPUS["RTX-5090"]
    card = LocalCard("NVIDIA GeForce RTX 5090", gpu.capacity_gib)
    machine = LocalMachine((card,), 16, frozenset({"avx2"}), 64.0)
    prices = shipped_prices()
    plan = make_plan(PlanRequest(config), machine, prices=prices, today=prices.as_of)
    rows = [
        "| where | card | GiB of | step, s | whole run, s | expected, USD | worst, USD |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in plan.candidates:
        low, expected, high = one.step_s
        total = one.clock.total_s
        rows.append(
            f"| {one.place.where} | {one.place.label}{' (chosen)' if one is plan.chosen else ''} "
            f"| {one.memory.peak_gib:.1f} of {one.place.capacity_gib:.1f} "
            f"| {expected:.2f} ({low:.2f} to {high:.2f}) "
            f"| {total.expected:.0f} ({total.low:.0f} to {total.high:.0f}) "
            f"| {one.expected_usd:.3f} | {one.worst_usd:.2f} |"
        )
    return ["", *rows, "", f"Why: {plan.decision.reason} Prices of {plan.prices_as_of}.", ""]


def shipped_lines() -> list[str]:
    """GiB of the shipped smoke on an L4, packed or not, with gradient checkpointing or not."""
    machine = LocalMachine((), 16, frozenset({"avx2"}), 64.0)
    prices = shipped_prices()
    rows = ["| tree | gradient checkpointing | GiB | fits 22.0 |", "| --- | --- | --- | --- |"]
    for tree in ("auto", "off"):
        for checkpoints in ("true", "false"):
            options = [f"tree={tree}", f"grpo.gradient_checkpointing={checkpoints}"]
            config = load_config(ROOT / "configs" / "smoke_qwen2.5_0.5b.toml", options)
            request = PlanRequest(config, on="modal", gpu=parse_gpu("L4"))
            plan = make_plan(request, machine, prices=prices, today=prices.as_of)
            (one,) = plan.candidates
            fits = "yes" if one.fits else "no"
            rows.append(f"| {tree} | {checkpoints} | {one.memory.peak_gib:.1f} | {fits} |")
    return ["", *rows, ""]


def planner(page: str) -> str:
    """docs/planner.md with the table of the founding note and that of the shipped smoke."""
    for begin, lines, end in (
        (NOTE_BEGIN, note_lines(), NOTE_END),
        (SHIPPED_BEGIN, shipped_lines(), SHIPPED_END),
        (MEMORY_BEGIN, memory_lines(), MEMORY_END),
        (PROBE_BEGIN, probe_lines(), PROBE_END),
    ):
        page = between(page, begin, lines, end)
    return page


def main() -> None:
    """Write the pages."""
    page = ROOT / "docs" / "planner.md"
    page.write_text(planner(page.read_text()))
    page = ROOT / "docs" / "checks.md"
    page.write_text(checks(page.read_text()))
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text()))
    (ROOT / "docs" / "configuration.md").write_text(configuration())
    (ROOT / "docs" / "measurements.md").write_text(measurements())
    (ROOT / "docs" / "performance.md").write_text(performance())


if __name__ == "__main__":
    main()
