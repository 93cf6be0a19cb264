"""The verbs, and the help that lists them."""

from composer_replication.cli.doctor_verb import DOCTOR
from composer_replication.cli.evaluate_verb import EVALUATE
from composer_replication.cli.plan_verb import PLAN
from composer_replication.cli.report_verb import REPORT
from composer_replication.cli.runs_verb import RUNS
from composer_replication.cli.sweep_verb import SWEEP
from composer_replication.cli.training_verbs import SMOKE, TRAIN

VERBS = (SMOKE, PLAN, TRAIN, EVALUATE, SWEEP, RUNS, REPORT, DOCTOR)

_LIST = "\n".join(f"  {verb.name:<8} {verb.summary}" for verb in VERBS)

HELP = f"""\
usage: composer-replication VERB [CONFIG.toml] [--set KEY=VALUE ...] [--out DIR] [--resume] [--json]

Trains a small agent. One optimizer step minimises
  GRPO + alpha_sdpo * SDPO (hint self-distillation) + beta_replay * DPO (trace replay, our addition)

verbs:
{_LIST}

examples:
  composer-replication doctor
  composer-replication smoke
  composer-replication smoke configs/smoke_qwen2.5_0.5b.toml --set alpha_sdpo=0.2 --json
  composer-replication train configs/train_qwen2.5_7b.toml --out runs/first
  composer-replication evaluate runs/first --against Qwen/Qwen2.5-7B-Instruct

exit codes: 0 done, 1 failed, 2 your input, 130 stopped with Ctrl-C
Each verb has its own help: composer-replication VERB --help
"""
