"""The run directory: its files, schema versions, lock and atomic writes."""
