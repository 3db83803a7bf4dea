"""Settings that are given by their names: read from text, checked by their declarations, and refused in one line."""

import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mixture_of_tokens.utils import yaml12
from mixture_of_tokens.utils.checks import beyond, check, check_number, plain
from mixture_of_tokens.utils.wording import nearest

STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # no text for numbers, nor numbers for true and false


class Several(list[Any]):
    """Values of one setting that `mot sweep` tries, one after the other."""


# By pydantic's kind of error, what is wrong; {value} is what was given.
SAID = {
    "bool_type": "takes true or false, not {value!r}",
    "int_type": "takes a whole number, not {value!r}",
    "float_type": "takes a number, not {value!r}",
    "string_type": "takes text, not {value!r}",
    "list_type": "takes a list, not {value!r}",
    "dict_type": "takes names and values, as in '{{name: 0.1}}', not {value!r}",
    "literal_error": "{value!r} is unknown; legal are {expected}",
}


def given_fields(section: str, declared: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values as declared. Text is read as YAML where the field takes something else than text.

    Args:
        section: what the fields belong to, as people write it: "model" or "training".
        declared: the type of each field, with its bounds.
        given: values by field. A list, or text with commas, for a field that takes one value makes it `Several`.

    Raises ValueError, naming the field, for what is not declared or not legal.
    """
    values: dict[str, Any] = {}
    for field, value in given.items():
        check(f"a key of {section}", field, str)
        if field not in declared:
            hint = nearest(field, declared) or f"; legal are {', '.join(declared)}"
            raise ValueError(f"--{section}.{field} is no setting{hint}")
        flag, hint = f"--{section}.{field}", declared[field]
        several = _several(flag, value, hint)
        if several is None:
            values[field] = _checked(flag, hint, value)
        else:
            if not several or "" in several:
                raise ValueError(f"{flag} {value} has an empty value")
            each = [_checked(flag, hint, one) for one in several]
            values[field] = Several(one for number, one in enumerate(each) if one not in each[:number])
    return values


def check_single(section: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting with several values, which only a sweep takes."""
    for field, value in values.items():
        if isinstance(value, Several):
            flag, words = f"--{section}.{field}", ",".join(map(as_word, value))
            raise ValueError(f"{flag} takes one value, not {words!r}; mot sweep tries several, as in {flag} 1,2")


def as_word(value: Any) -> str:
    """A value as the text that a command line or a file has for it."""
    return value if isinstance(value, str) else json.dumps(plain(value), default=str)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=STRICT)


def _several(flag: str, value: Any, hint: Any) -> list[Any] | None:
    """The values of a field that takes one: of a list, or of text with commas. None where there is one."""
    if isinstance(value, str) and value[:1] == "[" and list not in _kinds(hint):
        value = _read(flag, value, hint)
    if isinstance(value, str):
        return [word.strip() for word in value.split(",")] if "," in value and value[:1] not in ("[", "{") else None
    return list(value) if isinstance(value, list | tuple) and list not in _kinds(hint) else None


def _kinds(hint: Any) -> set[Any]:
    """The types that a declaration takes, without their arguments; text for a choice among words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _kinds(inner[0])
    if origin is typing.Literal:
        return {type(each) for each in inner}
    return set().union(*map(_kinds, inner)) if origin in (typing.Union, types.UnionType) else {origin or hint}


def _checked(flag: str, hint: Any, value: Any) -> Any:
    value = _read(flag, value, hint) if isinstance(value, str) else _of_python(value)
    check_number(flag, value)
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{flag} {_said(error, value, hint)}") from None


def _of_python(value: Any) -> Any:
    """Numbers of numpy as Python's, torch's types by their names, paths as text."""
    value = plain(value)
    if value is None or isinstance(value, bool | int | float | str | list | dict):
        return value
    return str(value).removeprefix("torch.")


def _read(flag: str, text: str, hint: Any) -> Any:
    """Text as a value of the declared type. Raises ValueError for what is no YAML."""
    kinds = _kinds(hint)
    if str in kinds and not (text == "null" and NoneType in kinds) and not kinds - {str, NoneType}:
        return text
    try:
        value = yaml12.load(text)
        json.dumps(value, default=str)  # not of what holds itself
    except RecursionError:
        raise ValueError(f"{flag} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        what = getattr(error, "problem", None) or error  # a YAML error's own text says "<unicode string>"
        raise ValueError(f"{flag}: {text[:40]!r} is no YAML: {what}") from None
    if bool in kinds and text.lower() in ("yes", "on", "no", "off"):
        return text.lower() in ("yes", "on")
    return value if isinstance(value, bool | int | float | list | dict | None) else text


def _said(error: ValidationError, value: Any, hint: Any) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return str(context["error"]).format(value=value)
    if bound := next((name for name in ("gt", "ge", "lt", "le") if name in context), None):
        return f"{beyond(bound, context[bound])}, not {value}"
    if kind == "literal_error":
        context = {"expected": context["expected"].replace("'", "").replace(" or ", ", ")}
    said = SAID.get(kind, f"{first['msg']}, not {{value!r}}").format(value=value, **context)
    if kind == "string_type" and list in _kinds(hint):
        said = said.replace("takes text", "takes a list of words")
    return said.replace(", not", " or null, not", 1) if kind.endswith("_type") and NoneType in _kinds(hint) else said
