"""`step(model, batch)` -> a sum and a count for each channel, and the executors that score it."""
