"""The run's result on disk, as transformers and vLLM load it."""

import shutil

from composer_replication.runs.run_directory import RunDirectory
from composer_replication.step.hidden_states import causal_lm
from composer_replication.training.trainer import ComposerReplicationTrainer


def save_model(trainer: ComposerReplicationTrainer, run: RunDirectory) -> None:
    """Write `model/`: weights (under LoRA the adapter), configuration, tokenizer.

    Written aside and renamed, so that a reader never loads half a model.
    """
    aside = run.model_dir.with_name(".model.incoming")
    if trainer.accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(aside))
    assert trainer.model is not None
    if not trainer.accelerator.is_main_process:
        return
    generation = causal_lm(trainer.model).generation_config
    if generation is not None:
        generation.save_pretrained(aside)
    shutil.rmtree(run.model_dir, ignore_errors=True)
    aside.rename(run.model_dir)
