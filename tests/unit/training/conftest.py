"""`build(...)`: a real trainer on a tiny model in one call."""

import pytest
from datasets import Dataset
from tiny_training import PAIRS, PROMPTS, SITES, even_tokens

from composer_replication import ComposerConfig, ComposerReplicationTrainer


@pytest.fixture
def build(tmp_path, tiny_llama, smollm2_tokenizer):
    """`build(reward=..., hint_sites=..., prompts=..., **config)` -> a trainer on a tiny model."""

    def make(
        reward=even_tokens,
        hint_sites=SITES,
        pairs=PAIRS,
        prompts=PROMPTS,
        model=None,
        peft_config=None,
        **changes,
    ):
        values = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "dataloader_pin_memory": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "hint_site_actions": "recorded",
            "hint_sites_per_step": 4,
            "pairs_per_step": 4,
        }
        return ComposerReplicationTrainer(
            model=model or tiny_llama(),
            reward_funcs=reward,
            args=ComposerConfig(**(values | changes)),
            train_dataset=Dataset.from_list(prompts),
            processing_class=smollm2_tokenizer,
            hint_sites=hint_sites,
            pairs=pairs,
            peft_config=peft_config,
        )

    return make
