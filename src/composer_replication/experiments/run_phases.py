"""The phase of a run that its trainer does not time: the model that is fetched."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composer_replication.training.model_source import LoadedModel


def download_s(loaded: "LoadedModel") -> float | None:
    """0 where the weights were here already; None where `load` fetched them too."""
    return 0.0 if loaded.had_weights else None
