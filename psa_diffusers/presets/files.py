"""The one way from a YAML file of `configs/`, and one of the user's laid over it, to plain values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from psa_diffusers.presets.plain import read_yaml, refuse_interpolation
from psa_diffusers.presets.values import Keys, merge


@dataclass(frozen=True)
class ConfigFile:
    """Declares a file of `configs/`: a mapping of names, each to a mapping of the same keys.

    Args:
        name: Name of the file.
        entry: What its names are names of, for messages.
        keys: Keys that may stand under each name.
        whole: Keys, at any depth, whose mapping the user's file replaces as a whole.
    """

    name: str
    entry: str
    keys: Keys
    whole: Collection[str] = ()

    def entries(self, config: str | Path | None = None) -> dict[str, dict[str, Any]]:
        """Return name to values of the built-in file. Treat them as read-only: they are cached.

        Args:
            config: Path of a YAML of the user's, to lay over the built-in file. Its names may differ from the built-in
                ones in upper and lower case.

        Raises:
            FileNotFoundError: If `config` does not exist.
            ValueError: If a file is no valid YAML or holds an interpolation, or an entry has keys that do not exist.
        """
        entries = self._checked(builtin_file(self.name))
        if config is None:
            return entries
        known = {name.casefold(): name for name in entries}
        own = {known.get(name.casefold(), name): values for name, values in self._checked(config).items()}
        return merge(entries, own, whole=self.whole)

    def _checked(self, path: str | Path) -> dict[str, dict[str, Any]]:
        entries = _read_version(*file_version(path))
        file = Path(path).name
        for name, values in entries.items():
            where = f"{file}: {self.entry} {name!r}"
            if not isinstance(name, str) or not isinstance(values, dict):
                keys = ", ".join(sorted(self.keys.names))
                raise ValueError(f"{where} must be a name with a mapping of {keys}, got {values!r}")
            self.keys.check(values, where)
        if len({name.casefold() for name in entries}) < len(entries):
            raise ValueError(
                f"{file}: two {self.entry}s differ only in upper and lower case: {', '.join(sorted(entries))}"
            )
        return entries


@lru_cache(maxsize=8)
def builtin_file(name: str) -> Path:
    """Find a file of `configs/`: inside the package once installed, beside it in a source checkout.

    Raises:
        FileNotFoundError: If neither place has it, which means that the installation is damaged.
    """
    package = Path(str(resources.files("psa_diffusers")))
    candidates = [package / "configs" / name, package.parent / "configs" / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"psa_diffusers ships configs/{name}, but neither {candidates[0]} nor {candidates[1]} exists; "
        "reinstall the package"
    )


def file_version(path: str | Path) -> tuple[Path, int]:
    """Return the absolute path and the time of the last change: a key for caches of what is made from the file.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If this is no path.
    """
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"config must be the path of a YAML file, got a {type(path).__name__}")
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}; give the path of a YAML file")
    return path.resolve(), path.stat().st_mtime_ns


@lru_cache(maxsize=32)
def _read_version(path: Path, mtime_ns: int) -> dict[Any, Any]:
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of names, got a {type(content).__name__}")
    refuse_interpolation(content, path.name)
    return content
