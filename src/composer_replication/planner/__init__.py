"""The bill before the run: memory, time, price, and where to run. Starts without torch."""
