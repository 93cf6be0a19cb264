"""`python -m composer_replication`: the command line."""

from composer_replication.cli import main

raise SystemExit(main())
