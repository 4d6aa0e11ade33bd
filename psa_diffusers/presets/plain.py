"""From YAML text to plain values that stand for themselves: nothing in a text is looked up anywhere else.

OmegaConf would replace `${oc.env:NAME}` by an environment variable. A file of somebody else could so copy a token into
a description or a prompt, which go into files that people share. A text with such a value is refused.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_INTERPOLATION = "${"

# YAML 1.1 reads 10:20 as a number of base 60, and here it is a range of steps or layers
_BASE_60 = re.compile(r"[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(text: str) -> Any:
    """Return the plain values of a YAML text. `10:20` is a string, and so is all that OmegaConf would look up.

    Raises:
        ValueError: If the text is no YAML, is nested too deep, or grows beyond OmegaConf's limit by its aliases.
    """
    return _plain(lambda: OmegaConf.load(io.StringIO(quote_ranges(text))))


def read_value(text: str) -> Any:
    """Return the plain value of a YAML text that may also be a single number or name; errors as in `read_yaml`."""
    return _plain(lambda: OmegaConf.from_dotlist([f"value={quote_ranges(text)}"]))["value"]


def _plain(load: Callable[[], Any]) -> Any:
    try:
        return OmegaConf.to_container(load(), resolve=False)
    except RecursionError as error:
        raise ValueError("it is nested too deep; no setting needs more than ten levels") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        # for a text that is no mapping or list OmegaConf raises an OSError
        raise ValueError(str(error)) from error


def quote_ranges(text: str) -> str:
    """Put quotes around the scalars that YAML would read as numbers of base 60. Text that is no YAML stays as it is."""
    try:
        found = [
            (event.start_mark.index, event.end_mark.index)
            for event in yaml.parse(text, Loader=_PARSER)
            if isinstance(event, yaml.ScalarEvent)
            and event.implicit[0]
            and event.start_mark is not None
            and event.end_mark is not None
            and _BASE_60.fullmatch(event.value)
        ]
    except yaml.YAMLError:
        return text
    for start, end in reversed(found):
        text = f'{text[:start]}"{text[start:end]}"{text[end:]}'
    return text


def refuse_interpolation(values: Any, where: str) -> None:
    """Raise a ValueError for the first string, at any depth, that OmegaConf would replace by something else.

    Args:
        values: Plain values.
        where: What is being read, for the message.
    """
    for path, text in _strings(values):
        if _INTERPOLATION in text:
            raise ValueError(
                f"{where}{path and ': '}{path}: expected a value that stands for itself, got {text!r}. Settings read "
                f"no environment variable and no other key: write the value itself, without {_INTERPOLATION!r}"
            )


def _strings(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string in nested values, keys included, and the keys that lead to it, with dots."""
    if isinstance(values, str):
        yield path, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _strings(key, path)
            yield from _strings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _strings(value, path)
