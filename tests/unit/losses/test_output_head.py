import head_checks
import pytest

from composer_replication.losses import head


@pytest.mark.parametrize("check", head_checks.ALL, ids=lambda check: check.__name__)
def test_selected_logp(check):
    check(head)
