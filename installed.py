"""Which libraries this process runs with: a result file tells it, and a stored fit is good for no others."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version


@functools.cache  # what was loaded is what runs, whatever is installed later: one look at the disk
def installed_version(package: str) -> str | None:
    """The version of a package, by its name on PyPI; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
