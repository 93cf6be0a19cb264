"""Records to tensors: rendering, truncation, alignment, padding."""
