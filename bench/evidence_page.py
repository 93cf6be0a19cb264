"""docs/evidence.md and its curves, from the result files."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from composer_replication.environments.api_drift_rules import drift_from_seed
from composer_replication.experiments.evidence_arms import (
    ARMS,
    CHOICE_DRIFTS,
    SETTINGS,
    planned_runs,
)
from composer_replication.experiments.evidence_claims import claims_table, tokens_to_reach
from composer_replication.experiments.evidence_report import Cell, load_cells, rule_table, table
from composer_replication.experiments.hint_controls import CONTROLS

TITLES = {
    "api_drift": "Task A: API drift, from a cold start",
    "call_format": "Task B: call format, fair to GRPO",
}

INTRO = """# Evidence

Does training make the model better, and is it the hints that do it? The claims, tables and curves
come from `bench/results/evidence/`, one file a run; what is quoted from trials before them says so
and is in [log.md](log.md). `python bench/evidence.py --max-runs 1` makes the next run that is
missing and writes this page again. The model is
SmolLM2-135M-Instruct, every weight trained in fp32, on the kind of device that each file names.

- All arms of a task have the same settings, prompts, seeds and number of rollouts, so they
  sample the same number of episodes, which is what is matched. Tokens differ with how long the
  episodes are, by up to a quarter on task A, and are in the table; seconds are below each table by
  arm. Error turns of a rollout are the only hint sites: no arm samples anything besides.
- Settings are those of trials (log.md) on training prompts and on a validation split, whose files,
  folders and words are in neither of the other two. No grid was searched. All were chosen twice.
  Task A's first ones, found on the shipped drift alone, took all three channels to 90 % of its
  held-out prompts and to 70, 30 and 45 % of those of three other drifts. That look is why they were
  chosen again: on validation prompts of drifts 0, 1, 4 and 7, under seed 0. What changed is how a
  hint demonstrates, Adam's constants, the rate, its warm-up and the number of steps. Task B's first
  ones (16 steps, Adam's usual constants, hints with one example) took GRPO to 61 % and all three
  channels to 69 %; it then got task A's rate, constants and demonstrations, tried on validation
  prompts of seeds 0 and 1, and 36 steps, so that one point of its curve lies below a quarter of the
  tokens. log.md has the trials. So held-out prompts of seeds 0 to 4 had been seen before the last
  change; *fresh seeds* are those from 5 on. They draw from the same held-out files, folders and
  words: no prompt of theirs is one of seeds 0 to 4, and of their last requests 12, 15 and 23 of 40
  are (task B: 15 of 56). Drifts other than those four had never been tried. No held-out string is
  in a hint, a pair or a prompt of training.
- *greedy* and *at T*, that of the rollouts: exact success on held-out prompts, the first action
  right and the request carried out. The interval is 95 %: over seeds (Student's t) where there are
  three or more that are not all equal, else over the prompts of all of them (Wilson), which says
  nothing about other seeds. Of three seeds it is wide. A claim holds, or does not, where its whole
  interval (of drifts and of shares of tokens: from the lowest value to the highest) is on one side
  of its bound; *by its mean* says that the bound is inside.
- *rules with pairs*: held-out success on tools whose rule some training pair shows; *rules
  without*: on tools that only hints and rewards tell about.
- *old convention*: success at 24 prompts that ask for the convention from before the drift, in an
  environment that keeps it. *nats a token*: loss on everyday replies, and its change from the
  base.
"""

LIMITS = """## What this can and cannot show

- It shows whether a dense channel moves a small model where the outcome reward alone cannot,
  under one budget of rollouts, and whether that needs the right hint. It does not show that the
  same holds for a model that can already explore: SDPO is reported to fall behind GRPO on
  Qwen2.5-1.5B, to gain slightly at 0.6B and more with size (arXiv:2601.20802).
- It does not say that SDPO is the best use of these hints. What the hinted base model does greedily
  is a ceiling of sorts: 0.97 of failed training prompts of four drifts (`bench/hinted_teacher.py`).
  Fine-tuning on its right answers, the obvious rival, was not run.
- Task A is built so that GRPO starts without a right answer to reinforce: the new convention is
  in no prompt. A policy that never samples a right call gives GRPO nothing; that is the case
  dense channels are for, and it is not the usual case.
- The old convention's claim is of the shipped drift, where it is 24 prompts a seed; under drift 7,
  of which there is no base run, 58 % are right.
- What it costs: a model that learns today's rules uses them everywhere unless something tells the
  two apart. Every fifth training prompt asks for the old convention, in the words of the probe and
  on other requests; in a trial of earlier settings without such prompts (one seed, log.md) it fell
  from 92 % to 4 %, and with twice as many it kept more of the old and learned less of the new.
  Nothing of everyday replies is in training; their loss says what else was lost.
- At T = 1 this model writes prose or code at most prompts (2 nats a token): in one trial of other
  settings (log.md) 8 % were right after training. Greedy figures are what a user of it would see.
- Rules are drawn at random, and some are harder. The shipped drift's four tools have the easy
  kinds: a key with another name, a value, a flag. Rooted paths are in drifts 3 and 7 alone, at 60
  and 70 %, where over half of the misses are; in trials `edit` and `write` got their folder wrong
  half of the time (log.md). A tool whose file has to be read first is in no table: in trials its
  first turn was learned and its second never, since this model answers a tool's result in prose.
  The hinted model is not sure of either itself, and SDPO teaches no more than its teacher knows.
- Of the drifts that the settings were chosen on, 0 and 7 have rows; on validation prompts 1 and 4
  came to 72 and 82 % (log.md), and 1 is the one with a tool that reads first.
- The intervals of GRPO + SDPO and of all three channels overlap: that pairs add something here is
  not shown. Under the first settings, with one example in a hint, GRPO + SDPO had never learned the
  flag of `delete`, which pairs taught; three demonstrations teach it. Pairs alone spread `read`'s
  new key to every tool in four seeds, and took the form of a call from most answers in the fifth;
  nothing is left of the old convention in any.
- Whose weights the teacher has matters less than that they do not run after the policy: with an EMA
  the interval overlaps the frozen teacher's, with the live policy itself half is learned and much
  of the old convention lost. The EMA alone, as a KL without hints, teaches nothing: it is the hint.
- A DPO pair's chosen side holds the answer, a hint does not. That is why pairs cover only every
  second rule: columns *rules with pairs* and *rules without* tell the channels apart.
- Shuffled hints are those of other tools, of all eight, so that some half of them are about a tool
  that no prompt asks for; each rule is still shown, at another tool's turns. That makes no greedy
  call right in any seed, and a few sampled ones: the claim is of greedy calls. Wrong hints show the
  old call under a key that no tool has, and so nothing of today's rules.
- Tasks are procedural and short: four to eight tools, calls of some 25 tokens, one turn. They say
  nothing about long episodes or about code. With all eight tools of task A a trial of SDPO alone at
  an early rate had learned 3 of 16 validation calls after 8 steps and no more after 12 (log.md);
  today's settings were not tried on them.
- Task B is fair to GRPO, and GRPO learns it. All three channels have its last score after a third
  to a half of its tokens, or never: the aim of a quarter is not met. They are ahead in between (see
  the curves), and nothing shows that they end above GRPO. Rollouts are right at 40 % from the
  start, and a hint tells little that the prompt does not show: there is less to gain than where
  none is right. A point of the curve is 28 prompts, 4 points of a hundred each, and there is one at
  every fourth step.
- A wrong hint is followed against the reward: on task B, whose rollouts start right at 40 %, wrong
  hints end at 0 % in every seed. Shuffled ones keep GRPO from most of what it learns alone, and
  lower what is sampled. SDPO is as good as its hints, and nothing in the loss doubts them.
- The EMA alone explains nothing on task B either: as a KL without hints it holds GRPO back, far
  below GRPO alone. As the teacher of hints it ends highest of all arms there, three seeds within
  a few points; the frozen teacher's interval reaches as high. A live teacher differs by seed: two
  end beside GRPO, and one had 82 % and fell to 20.
- Sampled at T = 0.6, GRPO + SDPO has less than GRPO alone on task B, by 12 points in the mean of
  five seeds: what is said of the two is of greedy calls.
- GRPO's groups are of two rollouts, so that a step of 10 has a prompt of each tool. Larger groups
  would not help it here while no rollout is right; they would where some are.
- The hints are written by the environment, which knows the rule. A weaker source of hints would
  teach less.
"""


def page(results: Path) -> str:
    """The text of docs/evidence.md."""
    cells, stale = load_cells(results)
    lines = [INTRO]
    lines += ["## Claims", "", *claims_table(cells), ""]
    if not cells:
        lines += ["No run is in the table yet, so nothing here is a result.", ""]
    lines += [f"Not measured yet: {_missing(cells)}. {_devices(cells)}", ""]
    for task, title in TITLES.items():
        own = [cell for cell in cells if cell.task == task and cell.drift == 0]
        lines += [f"## {title}", "", _settings(task), ""]
        if own and task == "api_drift":
            lines += [f"The shipped drift: {_changes(0, own)}", ""]
        if own:
            lines += [*table(own), "", *_train_seconds(own), *_by_tool(own)]
        if own and task == "call_format":
            lines += _own_last_score(own)
        if _have_curves(own):
            lines += [f"![held-out success]({plot_name(task)})", ""]
        for drift in sorted({c.drift for c in cells if c.task == task and c.drift}):
            other = [cell for cell in cells if cell.task == task and cell.drift == drift]
            lines += [f"### Another drift: {drift}", "", _rules(drift, other), ""]
            lines += [*table(other), "", *_by_tool(other)]
    lines += ["## Arms", "", "| arm | differs from GRPO + SDPO + DPO in |", "| --- | --- |"]
    lines += [f"| {arm.title} | {_difference(name)} |" for name, arm in ARMS.items()]
    lines += ["", LIMITS]
    if stale:
        lines += [f"Results of other settings, not counted: {', '.join(stale)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def plot_name(task: str) -> str:
    """The curve's file, beside the page."""
    return f"evidence_{task}.svg"


def write_page(results: Path, docs: Path) -> None:
    """Write the page, and the curves of the tasks that have any."""
    (docs / "evidence.md").write_text(page(results))
    cells, _ = load_cells(results)
    for task in TITLES:
        own = [cell for cell in cells if cell.task == task and cell.drift == 0]
        if _have_curves(own):
            plot(own, docs / plot_name(task))


def _have_curves(cells: list[Cell]) -> bool:
    return any(result["curve"] for cell in cells for result in cell.results)


def plot(cells: list[Cell], path: Path) -> None:
    """Held-out success over sampled tokens: a line an arm, a band from worst to best seed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "evidence"
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    axes = figure.add_subplot()
    start = _start(cells)
    for cell in cells:
        by_step: dict[int, list[tuple[float, float]]] = {}
        for result in cell.results:
            for point in result["curve"]:
                pair = (point["generated_tokens"], point["heldout_success"])
                by_step.setdefault(point["step"], []).append(pair)
        # A step that some seed has not measured would move the band, not the arm.
        whole = [p for _, p in sorted(by_step.items()) if len(p) == len(cell.results)]
        if not whole:
            continue
        tokens = [sum(t for t, _ in points) / len(points) for points in whole]
        rates = [[rate for _, rate in points] for points in whole]
        if start:
            tokens, rates = [0.0, *tokens], [start, *rates]
        means = [sum(values) / len(values) for values in rates]
        (line,) = axes.plot(tokens, means, marker="o", ms=3, label=ARMS[cell.arm].title)
        low, high = [min(values) for values in rates], [max(values) for values in rates]
        axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.1, lw=0)
    axes.set_xlabel("tokens sampled in rollouts")
    axes.set_ylabel("held-out success, greedy")
    axes.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def _start(cells: list[Cell]) -> list[float]:
    """Success before any training, by seed, on the prompts of the curve; empty: not measured."""
    return [
        sum(outcomes) / len(outcomes)
        for cell in cells
        if cell.arm == "base"
        for outcomes in (seed[: SETTINGS[cell.task].num_curve] for seed in cell.outcomes("greedy"))
    ]


def _settings(task: str) -> str:
    settings = SETTINGS[task]
    grpo, sdpo = settings.config["grpo"], settings.config["sdpo"]
    assert isinstance(grpo, dict)
    assert isinstance(sdpo, dict)
    size = int(grpo["per_device_train_batch_size"])
    divergence = {0.0: "KL(teacher || policy)", 1.0: "KL(policy || teacher)"}
    return (
        f"{grpo['max_steps']} steps of {size} rollouts "
        f"({size // int(grpo['num_generations'])} prompts "
        f"x {grpo['num_generations']}), T = {grpo['temperature']}, learning rate "
        f"{grpo['learning_rate']} ({grpo['lr_scheduler_type']}{_warmup(grpo)}), "
        f"{_adam(grpo)}"
        f"alpha_sdpo {settings.config['alpha_sdpo']}, beta_replay "
        f"{settings.config['beta_replay']}, teacher `{settings.config['teacher']}`, SDPO with "
        f"{divergence.get(sdpo['beta'], 'JSD')} and hints placed `{sdpo['hint_placement']}`; "
        f"{settings.num_heldout} held-out prompts, {settings.num_curve} at each point of the curve."
        + _tools_sentence(settings.num_tools)
        + _demonstrations_sentence(task, settings.knobs)
        + _old_convention_sentence(settings.old_convention_every)
    )


def _warmup(grpo: Mapping[str, object]) -> str:
    return f" after {grpo['warmup_steps']} steps of warm-up" if "warmup_steps" in grpo else ""


def _adam(grpo: Mapping[str, object]) -> str:
    """Adam's constants where they are not the usual ones."""
    if "adam_beta1" not in grpo:
        return ""
    return (
        f"Adam's beta1 {grpo['adam_beta1']}, beta2 {grpo['adam_beta2']} and epsilon "
        f"{grpo['adam_epsilon']}, "
    )


def _train_seconds(cells: list[Cell]) -> list[str]:
    """How long training takes, by device; runs on one of the machine's threads shared it."""
    by_device: dict[str, dict[str, list[float]]] = {}
    whole_runs: dict[str, list[float]] = {}
    for cell in cells:
        for result in cell.results:
            if result["steps"]:
                arms = by_device.setdefault(result["device"], {})
                arms.setdefault(ARMS[cell.arm].title, []).append(result["train_s"])
                whole_runs.setdefault(result["device"], []).append(result["total_s"])
    lines: list[str] = []
    for device, arms in sorted(by_device.items()):
        found = [seconds for times in arms.values() for seconds in times]
        medians = ", ".join(f"{arm} {median(times):.0f}" for arm, times in arms.items())
        runs = "1 run" if len(found) == 1 else f"{len(found)} runs"
        start = f"Training took {_span(found)} s on {device} ({runs})"
        if device == "1-thread CPU":
            lines.append(
                f"{start}, beside other work, which was more for some than for others; medians by "
                f"arm: {medians}. One thread is half of a 2-core CPU."
            )
        else:
            lines.append(
                f"{start}, with nothing beside it, and whole runs with their evaluations "
                f"{_span(whole_runs[device])} s; medians of training by arm: {medians}."
            )
    return [*lines, ""] if lines else []


def _span(values: list[float]) -> str:
    low, high = (f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _own_last_score(cells: list[Cell]) -> list[str]:
    """When GRPO has its last score itself: what all three channels are compared with."""
    grpo = next((cell for cell in cells if cell.arm == "grpo"), None)
    if grpo is None:
        return []
    shares = ", ".join(f"{share:.0%}" for share in tokens_to_reach(grpo, grpo))
    return [f"GRPO alone first has its own last score after {shares} of its tokens (by seed).", ""]


def _by_tool(cells: list[Cell]) -> list[str]:
    rules = rule_table(cells)
    return ["Greedy, by the tool of the prompt:", "", *rules, ""] if rules else []


def _rules(drift: int, cells: list[Cell]) -> str:
    """When the drift was tried, and what each tool of the prompts wants under it."""
    history = (
        "One of the four drifts on whose validation prompts the settings were chosen."
        if drift in CHOICE_DRIFTS
        else "The settings as they are; this drift had never been tried."
    )
    return f"{history} {_changes(drift, cells)}"


def _changes(drift: int, cells: list[Cell]) -> str:
    tools = {tool for cell in cells for result in cell.results for tool in result["tools"]}
    words = {
        "renamed_key": "`{old}` became `{new}`",
        "required_flag": "`{new}` has to be set",
        "changed_value": "`{old}` became `{new}`",
        "absolute_path": "paths begin with /",
        "read_first": "the file has to be read first, which takes a second turn",
    }
    rules = [
        f"`{rule.tool}`: {words[rule.kind].format(old=rule.old, new=rule.new)}"
        for rule in drift_from_seed(drift).rules
        if rule.tool in tools
    ]
    return f"{'; '.join(rules)}."


def _tools_sentence(num_tools: int | None) -> str:
    if num_tools is None:
        return ""
    return (
        f" {num_tools} of the eight tools, half of them with pairs; prompts go through the tools "
        "in turn, so that every step has all of them."
    )


def _demonstrations_sentence(task: str, knobs: Mapping[str, object]) -> str:
    if not knobs.get("num_hint_demos"):
        return ""
    which = {
        "api_drift": "requests of the prompt in today's convention",
        "call_format": "further requests for the tool",
    }[task]
    return f" A hint answers {knobs['num_hint_demos']} {which}, never the one that was asked."


def _old_convention_sentence(every: int | None) -> str:
    if every is None:
        return ""
    return (
        f" After every {every} training prompts one of them comes again and asks for the old "
        "convention, which its environment keeps."
    )


def _difference(name: str) -> str:
    arm = ARMS[name]
    if not arm.is_trained:
        return "not trained"
    parts = [f"`{key} = 0`" for key in arm.switches_off]
    if arm.teacher:
        parts.append(f'`teacher = "{arm.teacher}"`')
    if arm.control:
        parts.append(CONTROLS[arm.control])
    return ", ".join(parts) or "nothing"


def _devices(cells: list[Cell]) -> str:
    """How many runs each kind of machine and torch made."""
    kinds = Counter(
        "CPU" if result["device"].endswith("CPU") else result["device"]
        for cell in cells
        for result in cell.results
    )
    counts = ", ".join(f"{number} on {kind}" for kind, number in sorted(kinds.items()))
    return f"Runs: {counts}." if counts else ""


def _missing(cells: list[Cell]) -> str:
    have = {(cell.task, cell.arm): len(cell.results) for cell in cells if cell.drift == 0}
    wanted = Counter((run.task, run.arm) for run in planned_runs())
    lacking = sum(max(0, number - have.get(key, 0)) for key, number in wanted.items())
    return f"{lacking} of {sum(wanted.values())} runs" if lacking else "nothing"
