"""`step(model, batch)` -> a sum and a count for each channel, and the executors that score it."""

from composer_replication.step.optimizer_step import channel_sums, step, total_loss
from composer_replication.step.packed import score_packed
from composer_replication.step.separate import score_separately

__all__ = ["channel_sums", "score_packed", "score_separately", "step", "total_loss"]
