"""YAML 1.2, which PyYAML does not read: 1e-3 is a number, 010 is ten, and `no` and `off` are words. Values of flags."""

import json
import re
import typing
from collections.abc import Mapping
from types import NoneType
from typing import IO, Any

import yaml
from yaml.constructor import ConstructorError

from mixture_of_tokens.checks import check, plain

_TAG = "tag:yaml.org,2002:"
_OTHERS = ("bool", "int", "float", "timestamp")  # that 1.1 writes in other ways, or has alone


class _Dumper(yaml.SafeDumper):
    """Quotes what either version would take for something else than text."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in _OTHERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises yaml.YAMLError for a key that stands there twice, of which PyYAML takes the last."""
        seen: set[tuple[str, str]] = set()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []  # PyYAML refuses other nodes
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


# Of the core schema (https://yaml.org/spec/1.2.2, 10.3.2), each with the characters that it may begin with.
_NUMBER = "-+.0123456789"
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _NUMBER),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", _NUMBER),
):
    for _either in (_Loader, _Dumper):
        _either.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(node.value, 0 if node.value[1:2] in ("o", "x") else 10))


def fault(error: Exception) -> str:
    """What is wrong, and where, without pieces of the text."""
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return where + " ".join(str(getattr(error, "problem", None) or error).split())


def load(text: str | IO[str]) -> Any:
    """One document. Raises yaml.YAMLError for what is none."""
    return yaml.load(text, Loader=_Loader)


def dump(value: Any) -> str:
    """Text that readers of 1.1 and of 1.2 take for the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


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
        value = load(text)
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
