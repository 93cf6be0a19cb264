"""Rollout files: strict JSON, readable text, whole steps."""

import json

from composer_replication.runs.rollout_files import write_rollouts


class Image:
    def __str__(self):
        return "<image>"


def test_an_unscored_reward_is_null_and_what_json_cannot_hold_is_its_text(tmp_path):
    row = {"rewards": {"judge": float("nan")}, "prompt": [{"role": "user", "content": Image()}]}
    write_rollouts(tmp_path / "rollouts", 3, [row, {"turns": "\u00e9"}])
    text = (tmp_path / "rollouts/step_000003.jsonl").read_text(encoding="utf-8")
    first, second = text.splitlines()
    assert json.loads(first) == {
        "rewards": {"judge": None},
        "prompt": [{"role": "user", "content": "<image>"}],
    }
    assert second == '{"turns": "\u00e9"}'
