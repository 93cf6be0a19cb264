"""One of two gloo processes: the same run with and without diagnostics; rank 0 writes what it saw.

python two_process_gradients.py MODEL_DIR OUT_DIR, with torchrun's environment variables.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from datasets import Dataset
from tiny_training import PAIRS, PROMPTS, SITES, even_tokens, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from composer_replication import ComposerConfig, ComposerReplicationTrainer
from composer_replication.errors import ConfigError
from composer_replication.runs.credit_files import read_credit

MODEL_DIR, OUT_DIR = sys.argv[1], Path(sys.argv[2])


def build(name, **changes):
    args = ComposerConfig(
        output_dir=str(OUT_DIR / name),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=6,
        max_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        learning_rate=1e-2,
        optim="sgd",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        hint_site_actions="recorded",
        hint_sites_per_step=2,
        pairs_per_step=2,
        alpha_sdpo=30.0,
        beta_replay=1.0,
        ddp_broadcast_buffers=False,
        **{"gradient_checkpointing": False, **changes},
    )
    return ComposerReplicationTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32),
        even_tokens,
        args,
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        hint_sites=SITES,
        pairs=PAIRS,
    )


def main():
    runs = []
    for every in (None, 1):
        trainer = build(f"every_{every}", gradients_every=every, credit_every=every)
        rows = run(trainer)
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        runs.append((rows, weights))
    try:
        build(
            "reentrant",
            gradients_every=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    if trainer.accelerator.is_main_process:
        credit = read_credit(OUT_DIR / "every_1" / "credit" / "step_000002.jsonl")
        found = {
            "rows": runs[1][0],
            "weights_are_equal": all(map(torch.equal, runs[0][1], runs[1][1])),
            "reentrant": refusal,
            "credit": credit,
        }
        (OUT_DIR / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


main()
