"""The two files of `examples/` that start a smoke: here, and on the double of Modal."""

import json
from pathlib import Path

from remote_cli import cli

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_the_modal_app_runs_the_body_of_a_smoke_and_shows_its_summary(platform, workplace):
    program = ("-m", "modal", "run", str(EXAMPLES / "modal_app.py"))
    asked = ["--model", "smollm2-135m", "--steps", "3", "--gpu", "L40S"]
    done = cli(*asked, program=program, platform=platform)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1" in done.stdout
    assert platform.definition().resources.gpu_config.gpu_type == "L4"
    (variant,) = platform.variants
    assert variant.resources.gpu_config.gpu_type == "L40S"
    summary = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert summary["status"] == "passed"
    (folder,) = (workplace / "modal/volumes/composer-replication-runs").glob("smoke-*")
    config = (folder / "config.toml").read_text()
    assert 'model = "smollm2-135m"' in config
    assert "steps = 3" in config


def test_the_local_smoke_is_the_verb(workplace):
    script = (str(EXAMPLES / "local_smoke.py"),)
    done = cli("base.toml", "--steps", "3", "--out", "out", "--json", program=script)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((workplace / "out/summary.json").read_text())
