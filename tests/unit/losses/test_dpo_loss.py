import dpo_checks
import pytest

from composer_replication.losses import dpo


@pytest.mark.parametrize("check", dpo_checks.ALL, ids=lambda check: check.__name__)
def test_dpo(check):
    check(dpo)
