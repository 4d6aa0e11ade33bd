"""Plain values, as YAML and command lines give them: the keys a mapping may have, and the way to a typed object.

Every mistake is a ValueError that names the place and the key, and the closest word that exists.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeGuard, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from psa_diffusers.presets.plain import read_value, refuse_interpolation

Schema = TypeVar("Schema")


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number that a float can hold; true and false are none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list or a tuple; a string is none."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_prompts(given: object, name: str, *, least: int = 1) -> list[str]:
    """Return a list of prompts. A text is none: it would run a prompt a letter.

    Args:
        given: What stands in the place of the prompts.
        name: Its name, for the message.
        least: How many there must be.

    Raises:
        ValueError: If it is no list of texts, or a shorter one.
    """
    expected = f"{name} must be a list of at least one prompt" if least == 1 else f"{name} must be a list of prompts"
    if isinstance(given, (str, bytes)):
        raise ValueError(f"{expected}, got one text: write [{given!r:.60}]")
    if not isinstance(given, Iterable) or isinstance(given, (Mapping, Set)):
        raise ValueError(f"{expected}, got {given!r:.60}, a {type(given).__name__}")
    prompts = list(given)
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"{name}[{number}] must be a text, got {prompt!r:.60}, a {type(prompt).__name__}")
    if len(prompts) < least:
        raise ValueError(f"{expected}, got {len(prompts)}")
    return prompts


def suggest(word: object, choices: Iterable[object]) -> str:
    """Return " Did you mean 'x'?" for the choice closest to `word`, or an empty string when none is close."""
    by_folded = {str(choice).casefold(): choice for choice in choices}
    close = difflib.get_close_matches(str(word).casefold(), by_folded, n=1, cutoff=0.6)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""


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


@dataclass(frozen=True)
class Keys:
    """The keys that a mapping may have.

    Args:
        names: All of them.
        inside: For the keys whose value is a mapping again, the keys of that one. Null may stand in its place.
    """

    names: tuple[str, ...]
    inside: Mapping[str, Keys | Named] = field(default_factory=dict)

    @classmethod
    def of(cls, schema: type, *others: str, **inside: Keys | Named) -> Keys:
        """Return the fields of a dataclass, and others, as keys."""
        return cls((*(spec.name for spec in fields(schema)), *others), inside)

    def without(self, *names: str) -> Keys:
        """Return the keys but for some."""
        return Keys(tuple(name for name in self.names if name not in names), self.inside)

    def check(self, values: object, where: str) -> None:
        """Raise a ValueError for a value that is no mapping, and for the first key that is not one of these.

        Args:
            values: What stands in the place of the mapping.
            where: What is being read, for the message.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} must be a mapping of {', '.join(self.names)}, got {values!r}")
        for key in values:
            if key not in self.names:
                known = ", ".join(sorted(self.names))
                raise ValueError(f"{where}: unknown key {key!r}.{suggest(key, self.names)} Known keys: {known}")
        for key, keys in self.inside.items():
            if values.get(key) is not None:
                keys.check(values[key], f"{where}, {key}")


@dataclass(frozen=True)
class Named:
    """A mapping of names that the user chose, each to a mapping of the same keys.

    Args:
        what: What the names are names of, for messages.
        keys: Keys that stand under each name.
    """

    what: str
    keys: Keys

    def check(self, values: object, where: str) -> None:
        """Raise a ValueError for a value that is no such mapping; arguments as in `Keys.check`."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} must be a mapping of names, got {values!r}")
        for name, entry in values.items():
            self.keys.check(entry, f"{where}, {self.what} {name!r}")


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Unfold dotted names: `{"block_size.m": 64}` becomes `{"block_size": {"m": 64}}`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        head, _, rest = str(name).partition(".")
        nested = merge(nested, {head: nest({rest: value}) if rest else value})
    return nested


def merge(below: Mapping[str, Any], above: Mapping[str, Any], *, whole: Collection[str] = ()) -> dict[str, Any]:
    """Lay `above` over `below`. Mappings merge key by key; all else, and the keys in `whole`, is replaced."""
    merged = dict(below)
    for key, value in above.items():
        mergeable = key not in whole and isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value, whole=whole) if mergeable else value
    return merged


def build(
    schema: type[Schema],
    values: Mapping[str, Any],
    overrides: Mapping[str, Any],
    where: str,
    *,
    keys: Keys,
    whole: Collection[str] = (),
    accept: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Schema:
    """Lay overrides over values, check all against the types of a dataclass, and make the object.

    Args:
        schema: A dataclass whose annotations are the types and whose defaults are the defaults.
        values: Field name to value.
        overrides: Changes by the same names; dotted names and the dataclasses of parts work as well.
        where: What is being made, for messages.
        keys: Keys that the overrides may have.
        whole: Keys whose mapping is replaced, not merged.
        accept: Takes the values to those that the dataclass has fields for.

    Raises:
        ValueError: If a key is unknown, a value has the wrong type or is an interpolation, or the dataclass itself
            refuses it.
    """
    changes = nest({key: _plain(value) for key, value in overrides.items()})
    keys.check(changes, where)
    merged = merge(values, changes, whole=whole)
    refuse_interpolation(merged, where)
    try:
        accepted = accept(merged)
        try:
            made = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(accepted)))
        except (OmegaConfBaseException, TypeError, OverflowError) as error:
            raise ValueError(_what_is_wrong(schema, accepted, error)) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    assert isinstance(made, schema)
    return made


def _what_is_wrong(schema: type, values: Mapping[str, Any], error: Exception) -> str:
    """A message for what OmegaConf says of values that do not fit the types of a dataclass.

    For a mapping in place of a list, a number that no float holds, and what stands inside a list OmegaConf names no
    key: it is the first that fails alone.
    """
    said, key = str(error).splitlines()[0], getattr(error, "full_key", None)
    if key and "$" not in said:
        return f"{key}: {said}"
    typed = OmegaConf.structured(schema)
    for name, value in values.items():
        try:
            OmegaConf.merge(typed, {name: value})
        except (OmegaConfBaseException, TypeError, OverflowError):
            return f"{name}: expected a value like {getattr(typed, name)!r}, got {value!r}"
    return said


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn command-line assignments such as `["block_size.m=64", "warmup_steps=0"]` into a nested dict.

    Values are YAML, so `mask_ratios={1: [0, 0.1], 0: [0.1, 1]}` works as well.

    Raises:
        ValueError: If an assignment has no `=`, or its value is no valid YAML or an interpolation.
    """
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"an override has the form key=value, got {assignment!r}; for example block_size.m=64")
        try:
            values[key] = read_value(text)
        except ValueError as error:
            raise ValueError(f"cannot read the override {assignment!r}: {error}") from error
    parsed = nest(values)
    refuse_interpolation(parsed, "the overrides")
    return parsed


def _plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=False)
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
