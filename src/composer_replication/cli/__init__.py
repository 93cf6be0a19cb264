"""The command line: one verb, one configuration file, one run directory, one answer.

Only the standard library is imported until a verb runs, so that `--help` answers at once.
"""

from composer_replication.cli.entry import main

__all__ = ["main"]
