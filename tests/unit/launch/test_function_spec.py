import re
import tomllib
from pathlib import Path

from composer_replication.launch.function_spec import REQUIRED_PACKAGES, pinned_image

ROOT = Path(__file__).resolve().parents[3]


def test_the_image_holds_what_the_package_depends_on_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=~! ]", text)[0] for text in project["dependencies"]}
    assert set(REQUIRED_PACKAGES) == declared
    for package in pinned_image().packages:
        assert re.fullmatch(r"[a-z0-9-]+==[^+]+", package)
