"""docs/performance.md, written from what `bench/step.py` printed (`bench/results/step_*.json`)."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

HEAD = """# Performance

What one optimizer step of three channels costs, against what it costs otherwise. Written by
`bench/render_docs.py` from `bench/results/step_*.json`, which `python bench/step_sweep.py` makes;
one case by hand: `python bench/step.py --prefix 1024 --rollouts 4 --json`.

- **ours**: the packed executor. All sequences of a step are merged by common prefix, go through the
  model once, and rows that predict a scored token meet the output head once.
- **naive**: a padded forward with full logits for each role: rollouts, student again, teacher
  (without gradient), chosen, rejected.
- **good**: the student's forward is shared by GRPO and SDPO, teacher and pairs have padded forwards
  of their own, and scored rows alone go through TRL 1.16's chunked heads.
- **grpo_trl**: GRPO alone, by TRL's own loss on the same rollouts. On a CPU its head scores every
  position, prompts too.
- **grpo_ours**: GRPO alone, packed.

A step is forward and backward from cleared gradients, on a batch that is laid out. Loss and
gradients were compared with the `separate` executor first. All steps of a case take turns in one
process on the same random token ids; figures are medians. The machines are shared with other work,
which stretches wall time by more or less from one minute to the next: read ratios within a row, not
seconds between rows. *Processor* ratios are of processor seconds over all threads, which other work
hardly moves. FLOPs count what each step computes, padding and full logits included; the last column
is what the FLOPs alone allow.
"""


def performance() -> str:
    """The page."""
    reports = {
        path.stem.removeprefix("step_"): json.loads(path.read_text())
        for path in sorted(RESULTS.glob("step_*.json"))
    }
    growth, memory = reports.pop("growth"), reports.pop("memory")
    precision = reports.pop("precision", None)
    on_gpu = [report for name, report in reports.items() if name.startswith("cuda_")]
    timed = [report for name, report in reports.items() if not name.startswith("cuda_")]
    lines = [HEAD, *ratio_lines(timed), *memory_lines(timed), *whole_lines(timed)]
    lines += gpu_lines(on_gpu)
    lines += attention_lines(json.loads((RESULTS / "tree_attention.json").read_text()))
    lines += [*growth_lines(growth), *counted_memory_lines(memory), *equality_lines(timed)]
    lines += precision_lines(precision)
    lines += turn_lines(json.loads((RESULTS / "rollout_turns.json").read_text()))
    lines += system_lines(json.loads((RESULTS / "rollout_system.json").read_text()))
    return "\n".join(lines) + "\n"


def table(before: list[str], heads: list[str], rows: list[str]) -> list[str]:
    """A section with a table; nothing where no stored case has such figures."""
    if not rows:
        return []
    return [*before, "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *rows, ""]


def ratio_lines(reports: list[dict[str, Any]]) -> list[str]:
    """How many times longer the others take."""
    rows = []
    for report in reports:
        for step, ratio in report["ratios"].items():
            limit = report["flops"][step] / report["flops"]["ours"]
            max_rows = report["rows_per_forward"][step]
            split = "" if max_rows is None else f" ({max_rows} rows in a forward)"
            rows.append(
                f"| {described(report)} | {step}{split} | {ratio:.2f} | "
                f"{report['processor_ratios'][step]:.2f} | {limit:.2f} |"
            )
    machines = {f"{r['model']}, {r['machine']}, torch {r['torch']}" for r in reports}
    before = [
        "## Their step over ours",
        "",
        f"{'; '.join(sorted(machines))}. A step that did not fit in memory at once ran in the",
        "largest micro-batches that did.",
    ]
    return table(before, ["workload", "step", "wall", "processor", "FLOPs allow"], rows)


def described(report: dict[str, Any]) -> str:
    """The workload in words."""
    load = report["workload"]
    parts = [load["kind"], f"P = {load['prefix']}, G = {load['rollouts']}", f"b = {load['action']}"]
    if load["kind"] == "trajectories":
        parts.append(f"{load['turns']} turns")
    parts += [f"{load['pairs']} pairs", f"teacher {load['teacher']}", load["precision"]]
    if load.get("weights", "fp32") != "fp32":
        parts.append(f"weights {load['weights']}")
    if load.get("checkpoint"):
        parts.append("checkpointing")
    return ", ".join(parts)


def memory_lines(reports: list[dict[str, Any]]) -> list[str]:
    """Peaks of the cases whose baselines fit at once."""
    rows = [
        f"| {described(report)} | {step} | {report['peak_above_model_gib'][step]:.2f} | "
        f"{report['peak_tensor_gib'][step]:.2f} | {report['peak_above_model_gib']['ours']:.2f} | "
        f"{report['peak_tensor_gib']['ours']:.2f} |"
        for report in reports
        for step in report["ratios"]
        if report["rows_per_forward"][step] is None
    ]
    before = [
        "## Memory",
        "",
        "GiB at the peak above the loaded model, gradients included: what the operating system",
        "saw, and what tensors alone took.",
    ]
    heads = ["workload", "step", "system", "tensors", "ours, system", "ours, tensors"]
    return table(before, heads, rows)


def gpu_lines(reports: list[dict[str, Any]]) -> list[str]:
    """Steps on CUDA, with the rates that they reach; a table for each model and card."""
    rounds = [r["repeats"] for r in reports]
    rounding = [pair for r in reports for pair in (r.get("rounding_errors") or {}).items()]
    off = sorted(error for channels, error in rounding if channels == "grpo" and error)
    beside = f" ({off[0]:.0%} to {off[-1]:.0%} off fp32 for GRPO alone)" if off else ""
    lines = [
        "## On a GPU",
        "",
        f"bf16 autocast, medians of {min(rounds)} to {max(rounds)} rounds. *Of the card* is the "
        "share of a bf16 matrix",
        "product's rate there; what checkpointing computes again is not counted. Errors are "
        "against separate",
        "forwards of the same precision, whose roundings the other steps share: of the loss, and "
        "of all gradients",
        "as one vector. None was timed with more than 12 % of the latter, or twice what rounding "
        "does to separate",
        f"forwards{beside}. Padded rows need a mask, and the",
        "flash kernels that ours uses take none: with a long state the others are slower than "
        "their FLOPs say.",
        "With a short one the launches of a small model bound ours.",
        "",
    ]
    cards: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        name = f"{report['model']}, {report['machine']}, torch {report['torch']}"
        cards.setdefault(name, []).append(report)
    heads = ["workload", "step", "ms", "over ours", "FLOPs allow", "TFLOP/s", "of the card"]
    heads += ["peak GiB", "loss error", "gradient error"]
    for name, own in cards.items():
        peak_rate = own[0]["matmul_flops_per_s"]
        before = [f"{name}, {peak_rate / 1e12:.0f} TFLOP/s:"]
        lines += table(before, heads, [row for report in own for row in _gpu_rows(report)])
    return lines


def _gpu_rows(report: dict[str, Any]) -> list[str]:
    rows = []
    for step, seconds in report["step_s"].items():
        max_rows = report["rows_per_forward"][step]
        split = "" if max_rows is None else f" ({max_rows} rows in a forward)"
        limit = report["flops"][step] / report["flops"]["ours"]
        rate = report["flops_per_s"][step]
        rows.append(
            f"| {described(report)} | {step}{split} | {1e3 * seconds:.0f} | "
            f"{report['ratios'].get(step, 1.0):.2f} | {limit:.2f} | {rate / 1e12:.0f} | "
            f"{rate / report['matmul_flops_per_s']:.0%} | {report['peak_gib'][step]:.1f} | "
            f"{report['loss_errors'][step]:.1e} | {report['whole_grad_errors'][step]:.1e} |"
        )
    return rows


def attention_lines(report: dict[str, Any]) -> list[str]:
    """One layer's attention over a tree on CUDA."""
    sizes = report["sizes"]
    names = {
        "rows": "torch's flash attention on each sequence by itself",
        "flex": "FlexAttention with the tree's block mask",
        "ours": "ours: the tree's rectangles in a few launches of the flash kernel",
    }
    rows = [
        f"| {names[name]} | {1e3 * report['layer_s'][name]:.2f} | {ratio:.2f} | "
        f"{report['errors'][name]:.1e} |"
        for name, ratio in report["ratios"].items()
    ]
    before = [
        "## Attention of a tree on a GPU",
        "",
        f"{report['machine']}, torch {report['torch']}, by",
        "`python bench/tree_attention.py --json`:",
        f"forward and backward of one layer in bf16, {sizes['heads']} heads of "
        f"{sizes['head_size']} over {sizes['kv_heads']}, a state of",
        f"{sizes['prefix']} tokens, {sizes['rollouts']} actions of {sizes['action']} and more, "
        f"{report['tree_rows']} rows in place of {report['sequence_tokens']}",
        "tokens. Errors are against fp32. FlexAttention also needs its mask, "
        f"{1e3 * report['flex_mask_s']:.0f} ms a step, and, compiled",
        f"for fixed sizes, {report['flex_compile_s']:.0f} s for its first step with each number of "
        "rows.",
    ]
    return table(before, ["attention", "ms", "over ours", "error"], rows)


def growth_lines(growth: dict[str, Any]) -> list[str]:
    """Counted cost by prefix, rollouts and action length."""
    lines = [
        "## How cost grows: counted",
        "",
        "FLOPs of the others over ours, by `python bench/step_growth.py --json`; nothing runs,",
        "and shapes are public configurations. P tokens of state, G rollouts, actions of b tokens,",
        "hint 48, one site, one pair. `trajectories`: 8 turns that share a prompt of P tokens,",
        "each episode with a site and a pair at mid-trace. TRL as on CUDA, where its head",
        "scores completions alone. The last columns are with an EMA teacher, which walks a tree of",
        "its own.",
    ]
    for spec, rows in growth.items():
        lines += [
            "",
            f"### {spec}",
            "",
            "| grows | P | G | b | tokens, good | ours | TFLOP, ours | naive | good | grpo_trl "
            "| grpo_ours | EMA: naive | grpo_trl |",
            "| --- " * 13 + "|",
        ]
        for row, ema in zip(rows[::2], rows[1::2], strict=True):
            cells = [row["what"], row["prefix"], row["rollouts"], row["action"]]
            cells += [row["tokens"]["good"], row["tokens"]["ours"], f"{row['tflops_ours']:.2f}"]
            cells += [f"{ratio:.2f}" for ratio in row["ratios"].values()]
            cells += [f"{ema['ratios'][name]:.2f}" for name in ("naive", "grpo_trl")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def counted_memory_lines(memory: dict[str, Any]) -> list[str]:
    """Peaks counted on tensors without memory."""
    names = list(memory["cases"][0]["peak_tensor_gib"])
    rows = []
    for case in memory["cases"]:
        peaks = case["peak_tensor_gib"]
        cells = [str(case[key]) for key in ("prefix", "rollouts", "action")]
        cells += [f"{peaks[name]:.2f}" for name in names]
        rows.append(f"| {' | '.join(cells)} | {peaks['naive'] / peaks['ours']:.2f} |")
    before = [
        "## Memory: counted",
        "",
        f"GiB that the tensors of a step take at its peak above the weights ({memory['model']},",
        "fp32), gradients included, everything at once; by `python bench/step_memory.py --json`,",
        "which runs the same steps on tensors without memory. On a tiny model the count equals",
        "real tensors to the byte (a test).",
    ]
    return table(before, ["P", "G", "b", *names, "naive / ours"], rows)


def whole_lines(reports: list[dict[str, Any]]) -> list[str]:
    """The share of a whole training step."""
    rows = [
        f"| {described(report)} | {report['whole_step']['rollout_s']:.1f} | "
        f"{report['whole_step']['rollout_ours_s']:.1f} | "
        f"{report['whole_step']['optimizer_s']:.1f} | {step} | {report['step_s'][step]:.1f} | "
        f"{report['step_s']['ours']:.1f} | {share:.0%} |"
        for report in reports
        if "rollout_ours_s" in report.get("whole_step", {})
        for step, share in report["whole_step"]["saved_share"].items()
    ]
    before = [
        "## Of a whole training step",
        "",
        "Sampling the rollouts with transformers' own generation, the step, and AdamW; *ours*",
        "computes the prompt of a group once when sampling, too.",
    ]
    heads = ["workload", "sampling s", "ours s", "optimizer s"]
    heads += ["instead of", "step s", "ours s", "saved"]
    return table(before, heads, rows)


def equality_lines(reports: list[dict[str, Any]]) -> list[str]:
    """How exact ours is, and each case's command."""
    rows = [
        f"| {report['repeats']} | {report['loss_error']:.1e} | "
        f"{report['grad_error_vs_separate']:.1e} | `{report['command']}` |"
        for report in reports
    ]
    before = [
        "## Equality, and the command of each case",
        "",
        "Errors of ours against the `separate` executor: of the loss, relative to the sum of",
        "absolute row losses, and of the gradient, the largest over the parameters.",
    ]
    return table(before, ["rounds", "loss", "gradient", "command"], rows)


def precision_lines(report: dict[str, Any] | None) -> list[str]:
    """How far fp32 is from fp64 under both executors."""
    if report is None:
        return []
    rows = [
        f"| {name} | {report['loss_error'][name]:.1e} | {report['grad_error_max'][name]:.1e} | "
        f"{report['grad_error_median'][name]:.1e} |"
        for name in ("separate", "packed")
    ]
    before = [
        "## Precision: fp32 against fp64",
        "",
        f"{report['model']}, one state of {report['workload']['prefix']} tokens, by",
        "`python bench/step_precision.py --json`: a step in fp32 against separate forwards in",
        f"fp64. The largest error of packed is {report['ratio_of_max']:.2f} of that of separate.",
    ]
    return table(before, ["executor", "loss", "gradient, largest", "gradient, median"], rows)


def turn_lines(report: dict[str, Any]) -> list[str]:
    """Sampling rollouts of several turns."""
    sizes = report["sizes"]
    before = [
        "## Sampling rollouts of several turns",
        "",
        f"{report['model']}, {report['machine']}, by `python bench/rollout_turns.py --json`:",
        f"{sizes['prompts']} prompts of {sizes['prompt']} tokens, {sizes['rollouts']} rollouts",
        f"each, {sizes['turns']} turns of {sizes['action']} sampled tokens and {sizes['answer']}",
        "of the environment. *generate*: each turn computes every row's whole context again.",
        "*groups*: each distinct context once. *ours*: and of it only what the turn before has not",
        "computed. *copied*: ours, but for transformers' own cache, which copies all keys and",
        "values for each token; ours appends in place. All sampled the same tokens first;",
        f"medians of {sizes['repeats']} rounds.",
    ]
    return sampling_table(before, report)


def system_lines(report: dict[str, Any]) -> list[str]:
    """Sampling at prompts that begin alike."""
    sizes = report["sizes"]
    before = [
        f"One turn at {sizes['prompts']} prompts of {sizes['system'] + sizes['prompt']} tokens,",
        f"the first {sizes['system']} of them the same in all (a system prompt and tools), which",
        f"ours and *groups* compute once; {sizes['action']} sampled tokens:",
    ]
    return sampling_table(before, report)


def sampling_table(before: list[str], report: dict[str, Any]) -> list[str]:
    """Seconds and ratios of each way to sample."""
    seconds = report["rollout_s"]
    rows = [
        f"| {name} | {seconds[name]:.1f} | {report['ratios'].get(name, 1.0):.2f} | "
        f"{report['processor_ratios'].get(name, 1.0):.2f} |"
        for name in seconds
    ]
    return table(before, ["sampling", "seconds", "over ours", "processor"], rows)
