"""`step(model, batch)` -> a sum and a count for each channel, and the executors that score it."""

from composer_replication.step.optimizer_step import channel_sums, step, total_loss

__all__ = ["channel_sums", "step", "total_loss"]
