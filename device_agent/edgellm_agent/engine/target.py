"""Whether an engine was built for a device like this one."""

from __future__ import annotations

from collections.abc import Mapping

from packaging.specifiers import SpecifierSet

from edgellm.bundle.config import EngineConfig
from edgellm_agent.errors import PreconditionError


def check_target(
    config: EngineConfig, *, runtimes: Mapping[str, str], architecture: str, sm: str | None
) -> None:
    """Raises PreconditionError, which says what the engine is for and what the device is.

    Args:
        config: Of the engine.
        runtimes: Name → version of what the device has.
        architecture: For example "arm64".
        sm: The GPU's, for example "8.7"; None without one.
    """
    version = runtimes.get(config.runtime)
    if version is None:
        known = ", ".join(runtimes) or "none"
        raise PreconditionError(
            f"the engine is for the runtime {config.runtime}, this device has {known}; build one for it"
        )
    if not SpecifierSet(config.runtime_requires).contains(version, prereleases=True):
        raise PreconditionError(
            f"the engine needs {config.runtime} {config.runtime_requires}; this device has {version}"
        )
    if config.target.architecture not in ("any", architecture):
        raise PreconditionError(
            f"the engine is for {config.target.architecture}; this device is {architecture}"
        )
    if config.target.sm is not None and config.target.sm != sm:
        raise PreconditionError(f"the engine is for SM {config.target.sm}; this device has {sm or 'no GPU'}")
