"""Runs every case on this process as one of two (RANK, WORLD_SIZE and so on are set outside).

`python two_process_run.py FOLDER` writes `FOLDER/CASE.RANK.pt`; `test_two_processes.py` starts two.
"""

import dataclasses
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny_families
import tiny_trainer
import torch
from torch.nn.parallel import DistributedDataParallel

from composer_replication import ComposerDataCollator, StepBatch
from composer_replication.step import step, total_loss
from composer_replication.step.settings import GRPOSettings, StepSettings

CASES = {
    # Places 0 and 1 are rank 0's, 2 and 3 rank 1's.
    "error turns on both": {"erring": (0, 3)},
    "error turns on one": {"erring": (0, 1)},
    "error turns on the other": {"erring": (2,)},
    "no error turns": {"erring": ()},
    "all error turns": {"erring": (0, 1, 2, 3)},
    "two micro-batches": {"erring": (0, 1), "gradient_accumulation_steps": 2},
    "alternating": {"erring": (0, 1), "channel_schedule": "alternate", "max_steps": 4},
    "buffers of scaled embeddings": {"erring": (2, 3), "family": "gemma3"},
    "checkpointing": {
        "erring": (0, 1),
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    # The auxiliary loss of the router is TRL's and not linear in the batch.
    "experts": {"erring": (0, 1), "family": "qwen3_moe", "router_aux_loss_coef": 0.0},
    "lora": {"erring": (0, 1), "lora": True, "learning_rate": 0.01},
    "packed": {"erring": (2,), "tree": "auto"},
    "packed, live": {"erring": (0, 3), "tree": "auto", "teacher": "live"},
    "packed, cut at nodes": {"erring": (0, 1), "tree": "auto", "tree_max_tokens": 60},
    "packed lora": {"erring": (0, 1), "lora": True, "learning_rate": 0.01, "tree": "auto"},
}
WEIGHTS = {"grpo": 1.0, "sdpo": 0.75, "dpo": 0.25}
SETTINGS = StepSettings(grpo=GRPOSettings(max_completion_length=16))


def lora_policy():
    """A random adapter on the first model."""
    from peft import LoraConfig, get_peft_model

    model = tiny_families.tiny_model("llama", dtype=torch.float32)
    torch.manual_seed(1)
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options))


def trainer_run(case, output_dir, num_processes):
    """Log rows and final weights of a case, this process having its share of each step."""
    changes = dict(CASES[case])
    model = lora_policy() if changes.pop("lora", False) else None
    accumulation = changes.get("gradient_accumulation_steps", 1)
    trainer = tiny_trainer.build_trainer(
        output_dir,
        model=model,
        per_device_train_batch_size=tiny_trainer.NUM_ROLLOUTS // accumulation // num_processes,
        hint_sites_per_step=4 // num_processes,
        pairs_per_step=4 // num_processes,
        **changes,
    )
    return tiny_trainer.train(trainer)


def resumed_run(output_dir):
    """A whole run of four steps, and the same gone on with from inside its first generation."""
    options = {
        "hint_sites_per_step": 2,
        "pairs_per_step": 2,
        "per_device_train_batch_size": 2,
        "steps_per_generation": 2,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "teacher": "ema",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = tiny_trainer.train(tiny_trainer.build_trainer(output_dir, **options))
    again = tiny_trainer.build_trainer(output_dir, **options)
    return whole, tiny_trainer.train(again, checkpoint=output_dir / "checkpoint-1")


def run_with_nan(output_dir, rank):
    """A run whose DPO loss is nan on process 1 alone."""
    trainer = tiny_trainer.build_trainer(
        output_dir, per_device_train_batch_size=2, hint_sites_per_step=2, pairs_per_step=2
    )
    if rank == 1:
        trainer._compute_trace_replay_loss = lambda model, inputs: torch.tensor(float("nan"))
    trainer.train()


def plain_loop(shares, counts, wrap=lambda model: model, num_processes=1):
    """Two SGD steps of `step` alone; `shares` are this process's batches of the two steps."""
    model = tiny_families.tiny_model("llama_untied", dtype=torch.float32)
    wrapped = wrap(model)
    collator = ComposerDataCollator(tiny_families.chat_tokenizer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for share, count in zip(shares, counts, strict=True):
        sums = step(wrapped, share, collator, settings=SETTINGS)
        optimizer.zero_grad()
        (num_processes * total_loss(sums, WEIGHTS, count)).backward()
        optimizer.step()
    return [], {name: p.detach() for name, p in model.named_parameters()}


def plain_shares(rank):
    """Batches of two steps: in the first rank 1 has nothing at all, in the second no hint site."""
    whole = tiny_families.BATCH
    if rank is None:
        return [whole, whole]
    second = [
        dataclasses.replace(whole, rollouts=whole.rollouts[:1], pairs=whole.pairs[:1]),
        StepBatch(rollouts=whole.rollouts[1:], pairs=whole.pairs[1:]),
    ]
    return [[whole, StepBatch()][rank], second[rank]]


def plain_counts():
    """Each channel's count over the whole step."""
    tensors = ComposerDataCollator(tiny_families.chat_tokenizer())(tiny_families.BATCH)
    counts = {"grpo": 3 * 16, "sdpo": len(tensors["sdpo_student_index"]), "dpo": 2}
    return [counts, counts]


def main(folder):
    """Every case; an exception is a case's result."""
    torch.set_num_threads(1)
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def plain(**options):
        return plain_loop(
            plain_shares(rank),
            plain_counts(),
            lambda model: DistributedDataParallel(model, **options),
            num_processes,
        )

    jobs = {
        case: lambda case=case: trainer_run(case, folder / f"{case}-{rank}", num_processes)
        for case in CASES
    }
    # Both write into one folder, as the processes of one run do.
    jobs["resumed"] = lambda: resumed_run(folder / "resumed")
    jobs["nan on one"] = lambda: run_with_nan(folder / f"nan-{rank}", rank)
    jobs["reentrant checkpointing"] = lambda: tiny_trainer.build_trainer(
        folder / f"reentrant-{rank}",
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    jobs["plain loop"] = lambda: plain(broadcast_buffers=False)
    jobs["plain loop that broadcasts buffers"] = plain
    for case, job in jobs.items():
        try:
            result = job()
        except Exception as error:
            traceback.print_exc()
            result = f"{type(error).__name__}: {error}"
        torch.save(result, folder / f"{case}.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
