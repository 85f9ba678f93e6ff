"""Which versions of other packages were tested, and what is said of newer ones."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings

# The oldest and the newest version that tests ran with: docs/versions.md says where.
TESTED = {"torch": ("2.11", "2.15"), "triton": ("3.6", "3.9")}


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def leading_numbers(version: str) -> list[int]:
    """The leading numbers of a version: [1, 15, 0] of "1.15.0.dev1"."""
    parts = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return parts


def is_newer(version: str, newest: str) -> bool:
    """Whether a version is newer than `newest` and its patches: 2.16.0 is newer than 2.15."""
    limit = leading_numbers(newest)
    return leading_numbers(version)[: len(limit)] > limit


def warn_if_newer(package: str, version: str | None, newest: str, check: str) -> bool:
    """Whether a package's version is newer than tested; says so once in a process.

    check: what is done about it, as the end of the warning.
    """
    if version is None or not is_newer(version, newest):
        return False
    _warn(f"{package} {version} is newer than tested ({newest}): {check}")
    return True


@functools.cache  # a warning filter may show it again, or never
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
