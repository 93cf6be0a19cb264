"""Where a run goes when nobody says where: `runs/<name>`, numbered where that is taken."""

from pathlib import Path


def claim_folder(parent: Path, name: str) -> Path:
    """A new folder `name`, or the first free one of `name-2`, `name-3` and so on.

    Making the folder claims it, so two runs that start together get one each.
    """
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def latest_folder(parent: Path, name: str) -> Path:
    """The highest-numbered folder that `claim_folder` made, or would make first."""
    suffixes = (folder.name[len(name) + 1 :] for folder in parent.glob(f"{name}-*"))
    number = max((int(suffix) for suffix in suffixes if suffix.isdecimal()), default=1)
    return parent / (name if number == 1 else f"{name}-{number}")
