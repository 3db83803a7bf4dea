"""Settings as the text of flags, and back."""

import json
import typing
from collections.abc import Mapping
from types import NoneType
from typing import Any

import yaml

from mixture_of_tokens.utils import yaml12
from mixture_of_tokens.utils.checks import check, plain


def flagged(flag: str, word: str) -> list[str]:
    """A flag and its value as words of a command line; in one, if the value would be taken for a flag."""
    return [f"{flag}={word}"] if word.startswith("-") else [flag, word]


def as_word(value: Any) -> str:
    """A value from Python as the text of a flag: numbers of numpy, paths and torch's types too. Text is quoted."""
    return json.dumps(plain(value), default=lambda one: str(one).removeprefix("torch."))


def as_words(name: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Values from Python, some of them text of flags already. Raises ValueError for keys that are no text."""
    for field in values:
        check(f"a key of {name}", field, str)
    return {field: value if isinstance(value, str) else as_word(value) for field, value in values.items()}


def typed(flag: str, text: str, kind: Any) -> Any:
    """A flag's text as the declared type of its field. Raises ValueError for text of another type.

    Lists, dictionaries and undeclared fields take any YAML, for their owner to check.
    """
    try:
        value = yaml12.load(text)
        json.dumps(value, default=str)  # not of what holds itself
    except RecursionError:
        raise ValueError(f"{flag} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        what = getattr(error, "problem", None) or error  # a YAML error's own text says "<unicode string>"
        raise ValueError(f"{flag}: {text[:40]!r} is no YAML: {what}") from None
    kinds = {kind} if typing.get_origin(kind) in (list, dict) else set(typing.get_args(kind) or (kind,))
    if not kinds <= {bool, int, float, str, NoneType}:
        return value
    if str in kinds and not (value is None and NoneType in kinds):
        return value if isinstance(value, str) else text
    if bool in kinds and text.lower() in ("yes", "on", "no", "off"):
        return text.lower() in ("yes", "on")
    legal = kinds | ({int} if float in kinds else set())
    if type(value) not in legal:
        words = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}
        several = f"; mot sweep tries several, as in {flag} 1,2" if isinstance(value, list) or "," in text else ""
        one = " or ".join(words[each] for each in words if each in kinds)
        raise ValueError(f"{flag} takes {one}, not {text!r}{several}")
    return value
