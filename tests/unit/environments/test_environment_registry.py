import pytest

from composer_replication.environments.api_drift import ApiDrift
from composer_replication.environments.registry import ENVIRONMENTS, environment_class
from composer_replication.errors import ConfigError


def test_a_shipped_environment_is_found_by_name():
    assert environment_class("api_drift") is ENVIRONMENTS["api_drift"] is ApiDrift


def test_the_users_environment_is_found_by_module_and_class():
    name = "composer_replication.environments.api_drift:ApiDrift"
    assert environment_class(name) is ApiDrift


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("api_drfit", "Did you mean 'api_drift'"),
        ("", "package.module:Class"),
        ("json:", "package.module:Class"),
        ("no_such_module:Task", "No module named"),
        ("json:NoSuchClass", "NoSuchClass"),
        ("json:JSONDecoder", "lacks reset and get_reward"),
    ],
)
def test_an_unknown_environment_says_what_to_do(name, match):
    with pytest.raises(ConfigError, match=match):
        environment_class(name)
