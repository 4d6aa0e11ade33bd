"""Read, merge and type the YAML files of `configs/`. What their keys mean is in `preset.py` and `run_config.py`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Schema = TypeVar("Schema")


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


def read_file(path: str | Path) -> dict[str, Any]:
    """Return a YAML file as plain dicts and lists. Treat them as read-only: they are cached until the file changes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no valid YAML, or holds something else than a mapping.
    """
    return _read_version(*file_version(path))


def file_version(path: str | Path) -> tuple[Path, int]:
    """Return the absolute path and the time of the last change: a key for caches of what is made from the file.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}; give the path of a YAML file")
    return path.resolve(), path.stat().st_mtime_ns


@lru_cache(maxsize=32)
def _read_version(path: Path, mtime_ns: int) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
        content = OmegaConf.to_container(loaded, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of section names, got a {type(content).__name__}")
    return content


def suggest(word: object, choices: Iterable[object]) -> str:
    """Return " Did you mean 'x'?" for the choice closest to `word`, or an empty string when none is close."""
    by_folded = {str(choice).casefold(): choice for choice in choices}
    close = difflib.get_close_matches(str(word).casefold(), by_folded, n=1, cutoff=0.6)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""


def reject_unknown(given: Iterable[object], known: Iterable[str], where: str) -> None:
    """Raise a ValueError for the first key of `given` that is not `known`, naming the closest known one, and all."""
    known = sorted(known)
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}.{suggest(key, known)} Known keys: {', '.join(known)}")


def find_name(name: str, choices: Iterable[str], what: str) -> str:
    """Return the member of `choices` that equals `name` up to upper and lower case.

    Raises:
        ValueError: If there is none. The message lists all choices.
    """
    choices = list(choices)
    for choice in choices:
        if str(name).casefold() == choice.casefold():
            return choice
    raise ValueError(f"unknown {what} {name!r}.{suggest(name, choices)} Available: {', '.join(sorted(choices))}")


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Unfold dotted names: `{"block_size.m": 64}` becomes `{"block_size": {"m": 64}}`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        head, _, rest = str(name).partition(".")
        nested = merge(nested, {head: nest({rest: value}) if rest else value})
    return nested


def merge(below: Mapping[str, Any], above: Mapping[str, Any], *, whole: Sequence[str] = ()) -> dict[str, Any]:
    """Lay `above` over `below`. Mappings merge key by key; all else, and what `whole` names, is replaced."""
    merged = dict(below)
    for key, value in above.items():
        mergeable = key not in whole and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value, whole=whole) if mergeable else value
    return merged


def build(schema: type[Schema], values: Mapping[str, Any], where: str) -> Schema:
    """Check `values` against the types of a dataclass and make the object.

    Args:
        schema: A dataclass whose annotations are the types and whose defaults are the defaults.
        values: Field name to value.
        where: What is being read, for messages.

    Raises:
        ValueError: If a value has the wrong type, or the dataclass itself refuses it.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(_writable(OmegaConf.structured(schema)), dict(values)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ValueError(f"{where}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _writable(config: DictConfig) -> DictConfig:
    """Unlock the schema of a frozen dataclass and of those inside it, which OmegaConf 2.3 refuses to merge into."""
    OmegaConf.set_readonly(config, None)
    for key in config:
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            _writable(config[key])
    return config


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn command-line assignments such as `["block_size.m=64", "warmup_steps=0"]` into a nested dict.

    Values are YAML, so `mask_ratios={1: [0, 0.1], 0: [0.1, 1]}` works as well.

    Raises:
        ValueError: If an assignment has no `=` or its value is no valid YAML.
    """
    for assignment in assignments:
        if "=" not in assignment or assignment.startswith("="):
            raise ValueError(f"an override has the form key=value, got {assignment!r}; for example block_size.m=64")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(assignments)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read the overrides {list(assignments)}: {error}") from error
