"""The configurations that come with the package, and the file that a name or a path means."""

from __future__ import annotations

from pathlib import Path

from aepo_fast.config.errors import ConfigError, suggest

SHIPPED = Path(__file__).parent / "presets"


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs that come with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def config_path(name_or_path: str) -> Path:
    """The file of a shipped config's name or a path; raises ConfigError if there is none."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    if name_or_path in shipped:
        return shipped[name_or_path]
    reason = "is neither a file nor a shipped config"
    raise ConfigError("CONFIG", name_or_path, reason, suggest(name_or_path, shipped))
