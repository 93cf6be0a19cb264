"""The members of a sweep: a grid or a list of points, each with every seed, checked as a whole."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_replication.config.config_keys import known_keys
from composer_replication.config.loading import load_config
from composer_replication.config.run_config import RunConfig
from composer_replication.errors import ConfigError, InputError, listed, nearest, shown

MAX_NAME_CHARS = 80


@dataclass(frozen=True, slots=True)
class SweepMember:
    """One run of a sweep.

    Example: `SweepMember("alpha_sdpo-0.1-seed-2", {"alpha_sdpo": "0.1"}, 2, config)`.
    """

    name: str
    """Of its run directory; the same for the same point, so that a wider grid can go on."""
    point: dict[str, str]
    """The keys that vary, as they were written."""
    seed: int
    config: RunConfig


def sweep_members(
    config_path: Path | None,
    overrides: Sequence[str],
    *,
    grid: Sequence[str],
    points: Sequence[str],
    num_seeds: int,
) -> list[SweepMember]:
    """Every point with every seed, in the order they were written.

    Args:
        config_path: the base configuration.
        overrides: `KEY=VALUE` for every member.
        grid: `KEY=V1,V2,...`, each an axis; every combination is a point.
        points: `KEY=VALUE,KEY=VALUE,...`, each a point by itself.
        num_seeds: the base configuration's seed and those that follow it.

    Raises:
        InputError: keys that do not exist, repeated values or points, nothing to vary.
        ConfigError: a point whose configuration cannot work.
    """
    base = load_config(config_path, overrides)
    if num_seeds < 1:
        raise InputError(f"--seeds is {num_seeds}; a sweep needs at least one. Write --seeds 3.")
    chosen = _grid_points(grid) if grid else [_parse_point(text) for text in points]
    if grid and points:
        raise InputError(
            "--grid and --point are both given. A sweep is a grid or a list: drop one."
        )
    if not chosen and num_seeds == 1:
        raise InputError(
            "Nothing varies, so this would be one run. Give --grid KEY=V1,V2, --point KEY=V, or "
            "--seeds N; for one run use: composer-replication train"
        )
    _check_keys([key for point in chosen for key in point], num_seeds)
    members = [
        _member(config_path, overrides, point, base.seed + offset)
        for point in chosen or [{}]
        for offset in range(num_seeds)
    ]
    _refuse_repetitions(members)
    return members


def _grid_points(grid: Sequence[str]) -> list[dict[str, str]]:
    axes: dict[str, list[str]] = {}
    for text in grid:
        key, separator, values = text.partition("=")
        key, choices = key.strip(), [value.strip() for value in values.split(",")]
        if not separator or not key or not all(choices):
            raise InputError(
                f"--grid {text!r} names no key and values. Write --grid alpha_sdpo=0,0.05,0.1."
            )
        if key in axes:
            raise InputError(f"--grid gives {key} twice. Put all its values into one --grid.")
        repeated = sorted({value for value in choices if choices.count(value) > 1})
        if repeated:
            raise InputError(
                f"--grid {text!r} repeats {', '.join(repeated)}: the same run would be paid for "
                "twice. Leave the repetition out; --seeds N repeats a point under other seeds."
            )
        axes[key] = choices
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _parse_point(text: str) -> dict[str, str]:
    point: dict[str, str] = {}
    for part in text.split(","):
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not key or not value or key in point:
            raise InputError(
                f"--point {text!r} is not a list of different KEY=VALUE. "
                "Write --point alpha_sdpo=0.1,beta_replay=0.05."
            )
        point[key] = value
    return point


def _check_keys(keys: Sequence[str], num_seeds: int) -> None:
    known = known_keys()
    problems = [
        f"{key!r} is no key of a configuration. {nearest(key, known)}"
        for key in dict.fromkeys(keys)
        # Below [grpo] and [channels] stand keys that others define; the run checks them.
        if key not in known and key.partition(".")[0] not in ("grpo", "channels")
    ]
    if "name" in keys:
        problems.append("'name' names folders and changes no result. Vary another key.")
    if "seed" in keys and num_seeds > 1:
        problems.append("seed is varied and --seeds is given. Leave one of them out.")
    if problems:
        raise ConfigError(listed(problems))


def _member(
    config_path: Path | None, overrides: Sequence[str], point: dict[str, str], seed: int
) -> SweepMember:
    given = [f"{key}={value}" for key, value in point.items()]
    seeded = given if "seed" in point else [*given, f"seed={seed}"]
    parts = [f"{key}-{value}" for key, value in point.items()]
    parts += [] if "seed" in point else [f"seed-{seed}"]
    name = _folder_name("-".join(parts), "|".join(seeded))
    try:
        config = load_config(config_path, [*overrides, *seeded, f"name={name}"])
    except ConfigError as error:
        raise ConfigError(f"Member {', '.join(seeded)}: {error}") from None
    return SweepMember(name, point, config.seed, config)


def _folder_name(text: str, identity: str) -> str:
    """Letters, digits, '.', '_' and '-'; with a hash of the point where that left something out."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")
    if plain == text and len(plain) <= MAX_NAME_CHARS:
        return plain
    digest = hashlib.sha256(identity.encode()).hexdigest()[:6]
    return f"{plain[:MAX_NAME_CHARS]}-{digest}"


def _refuse_repetitions(members: Sequence[SweepMember]) -> None:
    """Two points may be written differently and be one run, such as 0.1 and 0.10."""
    seen: dict[str, SweepMember] = {}
    for member in members:
        values = member.config.model_dump_json(exclude={"name"})
        if values in seen:
            raise InputError(
                f"The points {shown(seen[values].point)} and {shown(member.point)} are the same "
                "run, which would be paid for twice. Leave one of them out."
            )
        seen[values] = member
