"""`ComposerReplicationTrainer` on a tiny family, with rollouts that are a function of the prompt.

Nothing is sampled: whatever the batch size, accumulation or number of processes, one optimizer
step sees the same global set of rollouts, error turns, hint sites and pairs.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import tiny_families
import torch
from datasets import Dataset
from trl import GRPOTrainer

from composer_replication import (
    ComposerConfig,
    ComposerReplicationTrainer,
    HintSite,
    Message,
    PreferencePair,
)
from composer_replication.batch.render import render_state
from composer_replication.training.rollouts import EnvironmentRollouts

NUM_ROLLOUTS = 4
MAX_COMPLETION = 12
PROMPTS = [{"prompt": [{"role": "user", "content": f"task {i}"}]} for i in range(8)]
STATE = tiny_families.LONG
PAIRS = [
    PreferencePair(STATE, f'{{"file": {i}}}', "no path"[: 2 + i], 1.0 + i, source=f"p{i}")
    for i in range(4)
]


def fixed_reward(completion_ids, fixed_reward, **columns):
    """The reward that the rollouts carry."""
    return fixed_reward


class FixedRollouts(EnvironmentRollouts):
    """Completions, rewards and error turns that depend on prompt and place alone.

    `generations` keeps the rows of every call for the oracle.
    """

    def __init__(self, erring=()):
        """`erring`: places in the global generation batch whose rollout has an error turn."""
        self.erring = frozenset(erring)
        self.max_action_tokens = MAX_COMPLETION
        self.generations = []

    def __call__(self, prompts, trainer):
        tokenizer = trainer.processing_class
        first = trainer.accelerator.process_index * len(prompts)
        columns = [self._rollout(tokenizer, prompt, first + i) for i, prompt in enumerate(prompts)]
        self.generations.append(columns)
        return {"logprobs": None} | {
            name: [column[name] for column in columns] for name in columns[0]
        }

    def _rollout(self, tokenizer, prompt, place):
        messages = [Message(**message) for message in prompt]
        number = int(messages[-1].content.split()[-1])
        prompt_ids = render_state(tokenizer, messages)
        text = f"{number}ls src"[: 3 + (place + number) % 4]
        action_ids = [*tokenizer.encode(text), tiny_families.END]
        answer_ids = tokenizer.encode("err")
        sites = []
        if place % NUM_ROLLOUTS in self.erring:
            sites = [
                HintSite(
                    tuple(messages),
                    "use " + "find " * (1 + place % 2),
                    text,
                    state_ids=tuple(prompt_ids),
                    action_ids=tuple(action_ids),
                    is_on_policy=True,
                    error_kind="unknown_tool",
                    source=f"rollout {place}",
                )
            ]
        mask = [1] * len(action_ids) + [0] * len(answer_ids) * bool(sites)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [*action_ids, *answer_ids][: len(mask)],
            "env_mask": mask,
            "fixed_reward": ((number * 7 + place * 3) % 5) / 4,
            "rollout_hint_sites": sites,
            "turns": [{"role": "assistant", "content": text}],
        }


def config(output_dir, **changes):
    """4 rollouts a step in all, 2 prompts with 2 generations each."""
    values = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": NUM_ROLLOUTS,
        "num_generations": 2,
        "max_completion_length": MAX_COMPLETION,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        # SGD without clipping: the change of the weights is the gradient.
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "hint_site_actions": "recorded",
        "hint_sites_per_step": 4,
        "pairs_per_step": 4,
        "alpha_sdpo": 0.75,
        "beta_replay": 0.25,
        # What the oracles judge; packed runs are compared with these.
        "tree": "off",
    }
    return ComposerConfig(**(values | changes))


def build_trainer(output_dir, *, model=None, family="llama", erring=(0, 3), pairs=PAIRS, **changes):
    """A trainer whose hint sites are its rollouts' error turns, at the places `erring`."""
    return ComposerReplicationTrainer(
        model=model or tiny_families.tiny_model(family, dtype=torch.float32),
        reward_funcs=fixed_reward,
        args=config(output_dir, **changes),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tiny_families.chat_tokenizer(),
        rollout_func=FixedRollouts(erring),
        pairs=pairs,
    )


def build_trl_trainer(output_dir, *, model, erring=(0, 3), **changes):
    """TRL's own trainer on the same rollouts."""
    return GRPOTrainer(
        model=model,
        reward_funcs=fixed_reward,
        args=config(output_dir, **changes),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tiny_families.chat_tokenizer(),
        rollout_func=FixedRollouts(erring),
    )


def train(trainer, checkpoint=None):
    """The log rows of a run, from a checkpoint or its start, and its last weights, on the CPU."""
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    rows = [row for row in trainer.state.log_history if "loss" in row]
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return rows, weights
