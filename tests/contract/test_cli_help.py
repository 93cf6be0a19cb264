"""The command line's help is a contract, and it starts nothing heavy."""

import subprocess
import sys

import pytest

from composer_replication.cli import main

HELP = """\
usage: composer-replication VERB [CONFIG.toml] [--set KEY=VALUE ...] [--out DIR] [--resume] [--json]

Trains a small agent. One optimizer step minimises
  GRPO + alpha_sdpo * SDPO (hint self-distillation) + beta_replay * DPO (trace replay, our addition)

verbs:
  smoke    do the channels run end to end on my model; how much memory, how long a step
  plan     where to run it: memory, time and dollars in each place, before anything runs
  train    the run that a configuration file describes
  evaluate does a model do the task on held-out episodes; before against after
  sweep    many runs of one configuration, side by side, and their ranked table
  runs     launched jobs: list, logs, cancel, fetch, resume
  report   what finished runs say: predicted against measured, or two side by side
  doctor   what this machine can run, and what is missing

examples:
  composer-replication doctor
  composer-replication smoke
  composer-replication smoke configs/smoke_qwen2.5_0.5b.toml --set alpha_sdpo=0.2 --json
  composer-replication train configs/train_qwen2.5_7b.toml --out runs/first
  composer-replication evaluate runs/first --against Qwen/Qwen2.5-7B-Instruct

exit codes: 0 done, 1 failed, 2 your input, 130 stopped with Ctrl-C
Each verb has its own help: composer-replication VERB --help
"""

SMOKE_HELP = """\
usage: composer-replication smoke [-h] [--model M] [--data DIR] [--steps N] [--fixed-shapes B,T]
                                  [--set KEY=VALUE] [--out DIR] [--resume] [--json] [--on WHERE]
                                  [--gpu NAME[:N]] [--budget USD] [--yes] [--dry-run] [--detach]
                                  [--hub-secret NAME] [--ledger FILE]
                                  [CONFIG.toml]

Runs the three channels end to end and reports memory, step time and every check.

positional arguments:
  CONFIG.toml

options:
  -h, --help          show this help message and exit
  --model M           Hugging Face id or local folder; sets model
  --data DIR          folder of prompts, hint sites and pairs; sets data
  --steps N           optimizer steps, at least 1; sets smoke.steps
  --fixed-shapes B,T  B rows of T tokens at every step, nothing sampled; such as 2,1024
  --set KEY=VALUE     set one key, such as sdpo.top_k=20; may be repeated
  --out DIR           run directory; default runs/<name>, numbered where that is taken
  --resume            go on in the run directory of --out, or in the latest of this name
  --json              print the summary as one JSON object on stdout, all else on stderr
  --on WHERE          local: in a process of its own; modal: on a rented card
  --gpu NAME[:N]      on modal: this card, such as L4 or H100!:2; default: the plan's
  --budget USD        on modal: cap on the worst case, and the run's deadline
  --yes               on modal: spend without asking
  --dry-run           on modal: print what would be created; sends nothing
  --detach            on modal: start it and return
  --hub-secret NAME   on modal: secret there that holds HF_TOKEN
  --ledger FILE       on modal: accounts of jobs that share --budget

Writes runs/<name>/: config.toml, metrics.jsonl, summary.json, rollouts/. --resume runs it again
in the same folder. Where a key is given twice, options win over --set, and --set over the file.

examples:
  composer-replication smoke
  composer-replication smoke --model Qwen/Qwen2.5-0.5B-Instruct --steps 50
  composer-replication smoke --fixed-shapes 2,1024 --set beta_replay=0

exit codes: 0 every check passed, 1 a check or the run failed, 2 your input, 130 Ctrl-C
"""

TRAIN_HELP = """\
usage: composer-replication train [-h] [--set KEY=VALUE] [--out DIR] [--resume] [--json]
                                  [--on WHERE] [--gpu NAME[:N]] [--budget USD] [--yes] [--dry-run]
                                  [--detach] [--hub-secret NAME] [--ledger FILE]
                                  CONFIG.toml

Trains the model that CONFIG.toml describes and saves it.

positional arguments:
  CONFIG.toml

options:
  -h, --help         show this help message and exit
  --set KEY=VALUE    set one key, such as sdpo.top_k=20; may be repeated
  --out DIR          run directory; default runs/<name>, numbered where that is taken
  --resume           go on in the run directory of --out, or in the latest of this name
  --json             print the summary as one JSON object on stdout, all else on stderr
  --on WHERE         local: in a process of its own; modal: on a rented card
  --gpu NAME[:N]     on modal: this card, such as L4 or H100!:2; default: the plan's
  --budget USD       on modal: cap on the worst case, and the run's deadline
  --yes              on modal: spend without asking
  --dry-run          on modal: print what would be created; sends nothing
  --detach           on modal: start it and return
  --hub-secret NAME  on modal: secret there that holds HF_TOKEN
  --ledger FILE      on modal: accounts of jobs that share --budget

Writes runs/<name>/: config.toml, metrics.jsonl, summary.json, rollouts/, checkpoints/, model/.
--resume continues from the newest whole checkpoint, or starts where there is none; only the length
of the run and what is kept of it may have changed.

examples:
  composer-replication train configs/train_qwen2.5_7b.toml --out runs/first
  composer-replication train runs/first/config.toml --out runs/first --resume

exit codes: 0 done, 1 failed, 2 your input, 130 Ctrl-C
"""

PLAN_HELP = """\
usage: composer-replication plan [-h] [--on PLACE] [--gpu NAME[:N]] [--budget USD] [--solve KEY]
                                 [--simulate] [--probe] [--refresh] [--set KEY=VALUE] [--json]
                                 [CONFIG.toml]

Says where a run fits, how long it takes and what it costs, and which place to take.

positional arguments:
  CONFIG.toml

options:
  -h, --help       show this help message and exit
  --on PLACE       local, modal or all; default all
  --gpu NAME[:N]   look at this card alone, such as L4 or H100:2
  --budget USD     cap on the worst case, every attempt at its time-out
  --solve KEY      the largest value that fits: max_length or any whole number
  --simulate       run the step on fake tensors instead of formulas; some seconds
  --probe          run ten steps here first and take their seconds
  --refresh        read today's prices from Modal; needs its credentials
  --set KEY=VALUE  set one key, such as sdpo.top_k=20; may be repeated
  --json           print the summary as one JSON object on stdout, all else on stderr

Runs nothing and writes nothing but, with --refresh, the fetched prices. A file whose [grpo] sets
max_steps is planned as a train run, any other as a smoke (1,800 s and 5 USD by default).

examples:
  composer-replication plan configs/smoke_qwen2.5_0.5b.toml
  composer-replication plan configs/train_qwen2.5_7b.toml --on modal --gpu H100 --budget 150
  composer-replication plan configs/smoke_qwen2.5_0.5b.toml --gpu L4 --solve max_length

exit codes: 0 there is a place, 1 nothing fits or would end, 2 your input, or all is over the cap
"""

REPORT_HELP = """\
usage: composer-replication report [-h] [--json] KIND FOLDER [FOLDER ...]

Sets figures of finished runs side by side.

positional arguments:
  KIND
  FOLDER

options:
  -h, --help  show this help message and exit
  --json      print the summary as one JSON object on stdout, all else on stderr

kinds:
  planner RUNS   predicted against measured: seconds of a step, peak of tensors, the whole run
  compare A B    two runs side by side: first-step loss, seconds, memory, dollars

examples:
  composer-replication report planner runs
  composer-replication report compare runs/local runs/remote --json

Writes nothing.

exit codes: 0 done, 2 your input
"""

EVALUATE_HELP = """\
usage: composer-replication evaluate [-h] [--task NAME] [--data DIR] [--against MODEL]
                                     [--split NAME] [--episodes N] [--turns N] [--action-tokens N]
                                     [--samples K] [--temperature T] [--seed N] [--set KEY=VALUE]
                                     [--out DIR] [--resume] [--json] [--on WHERE] [--gpu NAME[:N]]
                                     [--budget USD] [--yes] [--dry-run] [--detach]
                                     [--hub-secret NAME] [--ledger FILE]
                                     MODEL

Plays held-out episodes, greedy and sampled, and says what changed and how surely.

positional arguments:
  MODEL

options:
  -h, --help         show this help message and exit
  --task NAME        shipped task: api_drift, call_format, fix_call, reasoning_gym
  --data DIR         data folder of yours with heldout/, or a run that has one
  --against MODEL    the model before; measured on the same prompts
  --split NAME       heldout (default), train, or of a task validation
  --episodes N       prompts of the task; default its own number
  --turns N          actions of an episode; default the run's, or 8
  --action-tokens N  where an action is cut; default the run's, or 48
  --samples K        sampled episodes of each prompt; default 4
  --temperature T    of the sampled episodes; default 1
  --seed N           of the task's data and of sampling; default 0
  --set KEY=VALUE    one knob of the task, or modal.KEY; may be repeated
  --out DIR          default runs/evaluate-<task>, numbered where taken
  --resume           go on in the run directory of --out, or in the latest of this name
  --json             print the summary as one JSON object on stdout, all else on stderr
  --on WHERE         local: in a process of its own; modal: on a rented card
  --gpu NAME[:N]     on modal: this card, such as L4 or H100!:2; default: the plan's
  --budget USD       on modal: cap on the worst case, and the run's deadline
  --yes              on modal: spend without asking
  --dry-run          on modal: print what would be created; sends nothing
  --detach           on modal: start it and return
  --hub-secret NAME  on modal: secret there that holds HF_TOKEN
  --ledger FILE      on modal: accounts of jobs that share --budget

MODEL is what a configuration's model is, a run directory (its model/, or its newest checkpoint), or
a folder with a LoRA adapter. Without --task and --data, a run directory is measured on the held-out
split of its own data. Nothing of a held-out split is in the training data.

Writes --out: evaluation.json, every episode in episodes_after.jsonl and episodes_before.jsonl,
config.toml, summary.json. --resume runs what is missing there; what is finished is printed.

examples:
  composer-replication evaluate smollm2-135m --task api_drift
  composer-replication evaluate runs/first --against smollm2-135m
  composer-replication evaluate runs/first --task call_format --set num_demos=1 --episodes 100
  composer-replication evaluate Qwen/Qwen2.5-7B-Instruct --task api_drift --on modal --dry-run

exit codes: 0 done, 1 failed, 2 your input, 130 Ctrl-C
"""

SWEEP_HELP = """\
usage: composer-replication sweep [-h] [--grid KEY=V1,V2] [--point KEY=V,KEY=V] [--seeds N]
                                  [--parallel N] [--set KEY=VALUE] [--out DIR] [--resume] [--json]
                                  [--on WHERE] [--gpu NAME[:N]] [--budget USD] [--yes]
                                  [--hub-secret NAME] [--ledger FILE] [--dry-run]
                                  CONFIG.toml

Runs CONFIG.toml at every point of a grid or a list, and ranks what came out.

positional arguments:
  CONFIG.toml

options:
  -h, --help           show this help message and exit
  --grid KEY=V1,V2     one axis; every combination of axes is run
  --point KEY=V,KEY=V  one point of a list, in place of --grid
  --seeds N            runs of each point, from the configuration's seed on; default 1
  --parallel N         members at a time, as far as memory allows; default 1, on modal 10
  --set KEY=VALUE      set one key, such as sdpo.top_k=20; may be repeated
  --out DIR            run directory; default runs/<name>, numbered where that is taken
  --resume             go on in the run directory of --out, or in the latest of this name
  --json               print the summary as one JSON object on stdout, all else on stderr
  --on WHERE           local: in a process of its own; modal: on a rented card
  --gpu NAME[:N]       on modal: this card, such as L4 or H100!:2; default: the plan's
  --budget USD         on modal: cap on the worst case, and the run's deadline
  --yes                on modal: spend without asking
  --hub-secret NAME    on modal: secret there that holds HF_TOKEN
  --ledger FILE        on modal: accounts of jobs that share --budget
  --dry-run            print the members as they would start; runs nothing

Writes runs/<name>-sweep/: members/ with a run directory each, logs/, sweep.json (the table),
report.html (the picture). A member that fails is retried once and stops no other. --resume runs
what is not done, and takes a wider grid.

examples:
  composer-replication sweep configs/train_qwen2.5_7b.toml --grid alpha_sdpo=0,0.1 --seeds 3
  composer-replication sweep runs/first/config.toml --grid alpha_sdpo=0,0.05,0.1,0.2 \\
      --grid beta_replay=0,0.05 --parallel 4 --out runs/weights
  composer-replication sweep configs/train_qwen2.5_7b.toml --seeds 4 --on modal --dry-run

exit codes: 0 every member passed, 1 one failed twice, 2 your input, 130 Ctrl-C
"""

RUNS_HELP = """\
usage: composer-replication runs [-h] [--yes] [--budget USD] [--set KEY=VALUE] [--json] ACTION [ID]

Lists launched jobs, follows, ends, fetches or resumes one.

positional arguments:
  ACTION
  ID

options:
  -h, --help       show this help message and exit
  --yes            resume: spend without asking
  --budget USD     resume: another cap, on all that the job has cost and may cost
  --set KEY=VALUE  resume: another limit, such as modal.timeout_s=7200
  --json           print the summary as one JSON object on stdout, all else on stderr

actions:
  list        every launched job, and every run directory in runs/
  logs ID     what the job has printed, and prints until it ends
  cancel ID   end it; what it committed stays
  fetch ID    bring its run directory home and settle what it cost
  resume ID   go on from its newest checkpoint, under the cap that it was launched with or --budget

The id of a sweep on Modal stands for all of its members.

examples:
  composer-replication runs list
  composer-replication runs resume first-3f2a1b --yes

exit codes: 0 done, 1 failed, 2 your input
"""

DOCTOR_HELP = """\
usage: composer-replication doctor [-h] [--json]

Says what this machine can run, and what is missing.

options:
  -h, --help  show this help message and exit
  --json      print the summary as one JSON object on stdout, all else on stderr

Writes nothing.

exit codes: 0 ready, 1 something that a smoke needs is missing
"""

HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "pydantic", "rich", "tomlkit")

LIST_HEAVY_IMPORTS = f"""
import contextlib, sys
import composer_replication.cli
with contextlib.suppress(SystemExit):
    composer_replication.cli.main(sys.argv[1:])
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_is_the_pinned_one(flag, capsys):
    assert main([flag]) == 0
    assert capsys.readouterr().out == HELP


@pytest.mark.parametrize(
    ("verb", "text"),
    [
        ("smoke", SMOKE_HELP),
        ("train", TRAIN_HELP),
        ("evaluate", EVALUATE_HELP),
        ("sweep", SWEEP_HELP),
        ("runs", RUNS_HELP),
        ("doctor", DOCTOR_HELP),
        ("plan", PLAN_HELP),
    ],
)
def test_the_help_of_a_verb_is_the_pinned_one(verb, text, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("arguments", [["--help"], ["smoke", "--help"], ["smok"]])
def test_help_and_misspellings_import_nothing_heavy(arguments):
    result = subprocess.run(
        [sys.executable, "-c", LIST_HEAVY_IMPORTS, *arguments], capture_output=True, text=True
    )
    assert result.stderr.splitlines()[-1] == "[]", result.stderr


def test_the_module_runs_as_the_command_does():
    result = subprocess.run(
        [sys.executable, "-m", "composer_replication", "--help"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, HELP, "")
