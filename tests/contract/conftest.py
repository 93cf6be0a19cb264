"""Hint sites and pairs small enough for whole runs."""

import pytest

from composer_replication import HintSite, Message, PreferencePair

STATE = (Message("user", "Read /src/app.py."),)


@pytest.fixture
def records():
    """Four hint sites and four pairs at one state."""
    sites = [
        HintSite(STATE, f"Use file number {i}.", '{"path": 1}', source=f"s{i}") for i in range(4)
    ]
    pairs = [
        PreferencePair(STATE, f'{{"file": {i}}}', '{"path": 1}', source=f"p{i}") for i in range(4)
    ]
    return sites, pairs
