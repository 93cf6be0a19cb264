"""Tensors to per-token or per-pair values: pure functions, one module a channel."""
