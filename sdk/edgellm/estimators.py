"""What a model would become when built: asked of the package that builds, which is found by entry point."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from edgellm.errors import EdgellmError
from edgellm.fits import Estimate

GROUP = "edgellm.estimators"
_NAME = "checkpoint"
_EXTRA = "pip install 'edgellm[buildhost]'"


def estimates(model: Path) -> list[Estimate]:
    """The engines that could be built from a checkpoint or its config.json, without reading a weight.

    Raises EdgellmError if the package is not installed, and what that raises for a model that it cannot read.
    """
    found = next(iter(metadata.entry_points(group=GROUP, name=_NAME)), None)
    if found is None:
        raise EdgellmError(f"{model} is no bundle, and what reads models is not installed", _EXTRA)
    try:
        estimate = found.load()
    except (ImportError, AttributeError) as error:
        raise EdgellmError(
            f"{model} is no bundle, and what reads models cannot be loaded: {error}", _EXTRA
        ) from error
    return list(estimate(model))
