"""The summary: unknown is null, and the published schema is the one that is written."""

import json
from importlib.resources import files

import pytest
from pydantic import ValidationError

from composer_replication.runs.summary import Check, Summary, summary_json_schema, versions

JSON_TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}

FULL = Summary(
    status="failed",
    checks=[
        Check("finite_loss", False, float("nan"), None, "loss is nan at step 3. Lower the rate."),
        Check("peak_below_budget", True, 11.2, 24),
    ],
    model="org/model",
    device="NVIDIA L4",
    steps=3,
    median_step_s=0.31,
    p95_step_s=float("inf"),
    phases_s={"load": 4.2, "download": None},
    channels={"sdpo": {"loss": 0.12, "tokens": 64}},
    notes=["random weights"],
    error="loss is nan",
)


def is_valid(value, schema, definitions):
    """The part of JSON Schema that pydantic writes for these models."""
    if "$ref" in schema:
        return is_valid(value, definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return any(is_valid(value, option, definitions) for option in schema["anyOf"])
    if not isinstance(value, JSON_TYPES[schema["type"]]):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if schema["type"] == "array":
        return all(is_valid(item, schema["items"], definitions) for item in value)
    if schema["type"] != "object":
        return True
    named = schema.get("properties", {})
    rest = schema.get("additionalProperties", True)
    return set(schema.get("required", [])) <= value.keys() and all(
        is_valid(item, named[key], definitions)
        if key in named
        else rest is True or (rest is not False and is_valid(item, rest, definitions))
        for key, item in value.items()
    )


@pytest.mark.parametrize("summary", [FULL, Summary(status="stopped")], ids=["full", "empty"])
def test_a_summary_is_valid_under_the_published_schema(summary):
    schema = json.loads((files("composer_replication.runs") / "summary_schema.json").read_text())
    payload = json.loads(summary.to_json())
    assert payload.keys() == schema["properties"].keys()
    assert is_valid(payload, schema, schema["$defs"])
    assert not is_valid({**payload, "status": "fine"}, schema, schema["$defs"])
    assert not is_valid({**payload, "steps": "three"}, schema, schema["$defs"])
    assert not is_valid({**payload, "surprise": 1}, schema, schema["$defs"])


def test_the_published_schema_is_the_generated_one():
    published = (files("composer_replication.runs") / "summary_schema.json").read_text()
    assert published == json.dumps(summary_json_schema(), indent=2) + "\n"


def test_an_unknown_figure_is_null_and_never_zero():
    payload = Summary(status="passed").to_payload()
    figures = [
        "steps",
        "median_step_s",
        "p95_step_s",
        "total_s",
        "peak_gib",
        "peak_tensor_gib",
        "peak_gib_max_shape",
        "cost_usd",
    ]
    assert {key: payload[key] for key in figures} == dict.fromkeys(figures)


def test_figures_that_are_not_finite_are_null():
    payload = json.loads(FULL.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert payload["p95_step_s"] is None
    assert payload["checks"][0]["value"] is None
    assert payload == FULL.to_payload()


def test_a_written_summary_reads_back_as_an_equal_one():
    summary = Summary(status="passed", checks=[Check("a", True, True, 1)], steps=3, total_s=1.5)
    assert Summary.model_validate_json(summary.to_json()) == summary


def test_a_run_with_a_failed_check_cannot_be_passed():
    with pytest.raises(ValidationError, match="status is passed, but"):
        Summary(status="passed", checks=[Check("finite_loss", False)])


def test_versions_are_gathered_without_importing_and_null_where_missing(monkeypatch):
    monkeypatch.setattr("composer_replication.runs.summary._PACKAGES", ("pydantic", "no-such-one"))
    found = versions()
    assert found["no-such-one"] is None
    assert found["pydantic"].startswith("2.")
    assert found["python"].startswith("3.")
