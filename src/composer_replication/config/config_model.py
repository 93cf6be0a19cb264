"""The base of every configuration section: frozen, strict about types, no unknown keys."""

from pydantic import BaseModel, ConfigDict


class ConfigModel(BaseModel):
    """A section of the configuration.

    `strict` keeps a TOML boolean from passing as a number and text from passing as either; nan and
    infinity are refused everywhere.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
