import grpo_checks
import pytest

from composer_replication.losses import grpo


@pytest.mark.parametrize("check", grpo_checks.ALL, ids=lambda check: check.__name__)
def test_grpo(check):
    check(grpo)
