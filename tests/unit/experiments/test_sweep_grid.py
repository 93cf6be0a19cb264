import pytest

from composer_replication.errors import ConfigError, InputError
from composer_replication.experiments.sweep_grid import sweep_members


def members(grid=(), points=(), num_seeds=1, overrides=()):
    return sweep_members(None, overrides, grid=grid, points=points, num_seeds=num_seeds)


def test_a_grid_is_every_combination_with_every_seed():
    found = members(["alpha_sdpo=0,0.1", "beta_replay=0,0.05"], num_seeds=3, overrides=["seed=5"])
    assert len(found) == 12
    assert [member.seed for member in found[:3]] == [5, 6, 7]
    assert (found[-1].config.alpha_sdpo, found[-1].config.beta_replay) == (0.1, 0.05)
    assert found[-1].config.name == found[-1].name == "alpha_sdpo-0.1-beta_replay-0.05-seed-7"


def test_a_list_is_its_points_alone():
    found = members(points=["alpha_sdpo=0,beta_replay=0", "alpha_sdpo=0.2"])
    assert [member.point for member in found] == [
        {"alpha_sdpo": "0", "beta_replay": "0"},
        {"alpha_sdpo": "0.2"},
    ]


def test_a_point_keeps_its_name_in_a_wider_grid():
    names = {member.name for member in members(["alpha_sdpo=0,0.1"])}
    assert names < {member.name for member in members(["alpha_sdpo=0,0.1,0.2"])}


def test_names_of_folders_are_plain_and_differ():
    found = members(['model="a/b","a_b"', "sdpo.beta=0.1,0.2"])
    names = [member.name for member in found]
    assert len(set(names)) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for name in names)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"grid": ["alpha_sdp=0,1"]}, "'alpha_sdp' is no key of a configuration. Did you mean"),
        ({"grid": ["alpha_sdpo"]}, "names no key and values. Write --grid alpha_sdpo=0,0.05,0.1."),
        ({"grid": ["alpha_sdpo=0,,1"]}, "names no key and values"),
        ({"grid": ["alpha_sdpo=0,0"]}, "repeats 0: the same run would be paid for twice"),
        ({"grid": ["alpha_sdpo=0", "alpha_sdpo=1"]}, "--grid gives alpha_sdpo twice"),
        ({"grid": ["alpha_sdpo=0.1,0.10"]}, "are the same run, which would be paid for twice"),
        ({"points": ["seed=1", "seed=1"]}, "are the same run"),
        ({"points": ["alpha_sdpo"]}, "is not a list of different KEY=VALUE"),
        ({"points": ["seed=1"], "grid": ["seed=1"]}, "--grid and --point are both given"),
        ({"grid": ["seed=1,2"], "num_seeds": 2}, "seed is varied and --seeds is given"),
        ({"grid": ["name=a,b"]}, "'name' names folders and changes no result"),
        ({}, "Nothing varies, so this would be one run"),
        ({"num_seeds": 0}, "--seeds is 0; a sweep needs at least one"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_in_words(given, text):
    with pytest.raises(InputError) as caught:
        members(**given)
    assert text in str(caught.value)


def test_a_member_whose_configuration_cannot_work_is_named_before_anything_runs():
    with pytest.raises(ConfigError, match=r"Member alpha_sdpo=-1, seed=0: .*alpha_sdpo"):
        members(["alpha_sdpo=0,-1"])
