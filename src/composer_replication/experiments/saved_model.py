"""The run's result on disk, as transformers and vLLM load it."""

from composer_replication.runs.run_directory import RunDirectory
from composer_replication.step.hidden_states import causal_lm
from composer_replication.training.trainer import ComposerReplicationTrainer


def save_model(trainer: ComposerReplicationTrainer, run: RunDirectory) -> None:
    """Write `model/`: weights (under LoRA the adapter), configuration, tokenizer."""
    trainer.save_model(str(run.model_dir))
    assert trainer.model is not None
    generation = causal_lm(trainer.model).generation_config
    if generation is not None:
        generation.save_pretrained(run.model_dir)
