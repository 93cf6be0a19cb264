"""Writing one checkpoint so that it is complete or absent, and a full disk stops in words."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

from composer_replication.errors import CheckpointError
from composer_replication.runs.checkpoint_folders import (
    checkpoint_folders,
    publish_checkpoint,
    staging_folder,
)


@contextmanager
def whole_checkpoint(
    parent: Path,
    step: int,
    accelerator: Accelerator,
    *,
    save_total_limit: int | None,
    best: str | None,
) -> Iterator[Path]:
    """A folder to write the checkpoint of `step` into; it joins `parent` when the block ends.

    Args:
        parent: of all checkpoints.
        step: optimizer steps done.
        accelerator: the main process clears, publishes and deletes; the others wait for it.
        save_total_limit: checkpoints to keep; None: all.
        best: the checkpoint that is kept whatever its age, if evaluation named one.

    Raises:
        CheckpointError: it could not be written; the checkpoints before it are as they were.
    """
    staging = staging_folder(parent)
    staged = staging / f"checkpoint-{step}"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staged.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield staged
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            publish_checkpoint(staged, parent)
            rotate_checkpoints(str(parent), save_total_limit, best)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_about_writing(error):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(_explain(parent, step, error)) from error


def _is_about_writing(error: Exception) -> bool:
    # torch's zip writer raises a RuntimeError whose text alone tells that the disk was the reason.
    return not isinstance(error, RuntimeError) or "PytorchStreamWriter" in str(error)


def _explain(parent: Path, step: int, error: Exception) -> str:
    kept = checkpoint_folders(parent)
    free_gib = shutil.disk_usage(parent).free / 2**30
    last = f"The last complete one is {kept[0].name}" if kept else "There is none before it"
    return (
        f"The checkpoint of step {step} could not be written to {parent} ({error}; {free_gib:.2f} "
        f"GiB are free there). {last}; nothing of it was touched. Free space or set "
        "grpo.save_total_limit, then go on with --resume."
    )
