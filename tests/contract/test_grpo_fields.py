"""`[grpo]` is judged without TRL: the shipped names and defaults are the installed TRL's."""

import dataclasses

from composer_replication.config.grpo_keys import TRL_DEFAULTS
from composer_replication.config.trl_fields import OWN_FIELDS, TRL_FIELDS
from composer_replication.training.composer_config import ComposerConfig
from composer_replication.training.trl_hooks import GRPOConfig


def test_the_shipped_fields_are_those_of_the_installed_trl():
    trls = {item.name for item in dataclasses.fields(GRPOConfig)}
    assert trls == TRL_FIELDS
    assert {item.name for item in dataclasses.fields(ComposerConfig)} - trls == OWN_FIELDS


def test_the_shipped_defaults_are_those_of_the_installed_trl():
    defaults = {item.name: item.default for item in dataclasses.fields(GRPOConfig)}
    assert {name: defaults[name] for name in TRL_DEFAULTS} == TRL_DEFAULTS
