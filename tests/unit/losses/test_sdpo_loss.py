import pytest
import sdpo_checks

from composer_replication.losses import sdpo


@pytest.mark.parametrize("check", sdpo_checks.ALL, ids=lambda check: check.__name__)
def test_sdpo(check):
    check(sdpo)
