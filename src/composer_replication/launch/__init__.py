"""Where a run happens: a process here, or Modal. Knows jobs, not training. Starts without torch."""
