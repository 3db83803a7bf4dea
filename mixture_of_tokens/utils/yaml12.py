"""YAML 1.2, which PyYAML does not read: 1e-3 is a number, 010 is ten, and `no` and `off` are words."""

import re
from pathlib import Path
from typing import IO, Any

import yaml
from yaml.constructor import ConstructorError

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


def read(file: Path, called: str | None = None) -> Any:
    """The document of a file. Raises ValueError, which names it, for what is none."""
    try:
        with file.open(encoding="utf-8") as opened:  # of text alone PyYAML's errors say "<unicode string>"
            return load(opened)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{called or file} cannot be read: {fault(error)}") from None


def load(text: str | IO[str]) -> Any:
    """One document. Raises yaml.YAMLError for what is none."""
    return yaml.load(text, Loader=_Loader)


def dump(value: Any) -> str:
    """Text that readers of 1.1 and of 1.2 take for the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
