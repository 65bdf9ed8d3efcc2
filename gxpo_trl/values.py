"""Values of settings by the types that dataclasses annotate: conversion, and the errors for other values."""

import argparse
import dataclasses
import datetime
import json
import math
import numbers
import re
import reprlib
import types
import typing
from enum import Enum
from typing import Any, Literal, Union

from transformers.hf_argparser import string_to_bool

from .spelling import nearest


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "strings"}


def read_value(value: Any, kind: Any) -> Any:
    """Converts a value to the type of a setting. A value of the right type stays as it is.

    A string is read like a word of a command line: `"1e-5"` is a number if a number is expected. One value stands for
    a list of one.

    Args:
        value (`Any`): From YAML, from a command line, or from Python.
        kind (`Any`): An annotation, such as `int | None` or `list[str]`.

    Raises:
        ValueError: Such as `expected a whole number, got 5.7.`
    """
    kinds = alternatives(kind)
    if type(None) in kinds and (value is None or _is_null(value, kinds)):
        return None
    if isinstance(value, str) and value.startswith("{") and any(typing.get_origin(k) or k is dict for k in kinds):
        return _read_json(value, kind)
    for one in sorted(kinds, key=lambda one: one is str):  # a word is a string only if no other type fits
        try:
            return _read(value, one)
        except _Refused:
            pass
    choices = [choice for one in kinds for choice in _choices(one) if isinstance(choice, str)]
    raise ValueError(f"expected {describe(kind)}, got {show(value)}{nearest(str(value)[:100], choices)}")


def alternatives(kind: Any) -> tuple:
    """The types of a union, or the one type. `SchedulerType | str` accepts the name of a member."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(one for one in kinds if one is not str) if any(map(_is_enum, kinds)) else kinds


def item_kind(kind: Any) -> Any:
    """The type of the items in an annotation such as `list[str] | None`."""
    (items,) = (typing.get_args(one)[0] for one in alternatives(kind) if typing.get_origin(one) is list)
    return items


def describe(kind: Any) -> str:
    """An annotation in words, such as `a whole number or null`."""
    said = [_describe(one) for one in sorted(alternatives(kind), key=lambda one: one is type(None))]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} or {said[-1]}"


def show(value: Any) -> str:
    """A short text of a value, spelled as in a recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, datetime.date):
        return f"the date {value}, which is a string in quotes only"
    return _SHORT.repr(value)


class _Refused(Exception):
    """The value does not have this type. It may have another."""


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    if choices := _choices(kind):
        return f"one of {', '.join(map(show, choices))}"
    if origin is list:
        items = typing.get_args(kind)
        return f"a list of {_PLURALS.get(items[0], 'mappings')}" if items else "a list"
    return _NAMES.get(kind, "a mapping")


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _choices(kind: Any) -> list:
    """The allowed values of this type; empty if there is no such list."""
    if _is_enum(kind):
        return [one.value for one in kind]
    return list(typing.get_args(kind)) if typing.get_origin(kind) is Literal else []


def _read(value: Any, kind: Any) -> Any:
    """Converts a value to a type that is not a union."""
    origin = typing.get_origin(kind) or kind
    if origin is Literal or _is_enum(kind):
        return _read_choice(value, _choices(kind))
    if origin is list:
        return _read_list(value, item_kind(kind))
    if origin is dict:
        return _read_mapping(value, *typing.get_args(kind)[1:])
    if dataclasses.is_dataclass(kind):
        return _read_fields(value, kind)
    return _READERS.get(kind, _take)(value)


def _take(value: Any) -> Any:
    """Anything, with `1e-5` as a number in it too."""
    if isinstance(value, dict):
        return {key: _take(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_take(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value


def _is_null(value: Any, kinds: tuple) -> bool:
    """Whether a word stands for `None`. Where strings are expected, it is a string."""
    return value in ("null", "none") and not any(one is str or typing.get_origin(one) is list for one in kinds)


def _read_null(value: Any) -> None:
    raise _Refused


def _read_bool(value: Any) -> bool:
    try:
        if isinstance(value, str):
            return string_to_bool(value)
    except argparse.ArgumentTypeError:
        raise _Refused from None
    if not isinstance(value, numbers.Integral) or value not in (0, 1):
        raise _Refused
    return bool(value)


def _read_int(value: Any) -> int:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            raise _Refused from None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not -(2**63) <= value < 2**63:
        raise _Refused
    return value


def _read_float(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, numbers.Real) or math.isnan(number):
            raise _Refused
    except (ValueError, OverflowError):  # not a number, or one beyond all floats
        raise _Refused from None
    return number


def _read_string(value: Any) -> str:
    if not isinstance(value, str):
        raise _Refused
    return value


def _read_choice(value: Any, choices: list) -> Any:
    value = value.value if isinstance(value, Enum) else value
    if value is False and "no" in choices:  # as YAML reads a bare `no`
        return "no"
    for choice in choices:
        if value == choice and type(value) is type(choice) or isinstance(value, str) and value == str(choice):
            return choice
    raise _Refused


def _read_list(value: Any, kind: Any) -> list:
    if value is None or value == "":
        raise _Refused
    items = value if isinstance(value, (list, tuple)) else [value]
    try:
        return [read_value(item, kind) for item in items]
    except ValueError:
        if dataclasses.is_dataclass(kind):
            raise  # the error names the key
        raise _Refused from None


def _read_mapping(value: Any, kind: Any = Any) -> dict:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _Refused
    try:
        return {key: read_value(item, kind) for key, item in value.items()}
    except ValueError:
        raise _Refused from None


def _read_fields(value: Any, kind: type) -> Any:
    """Makes a dataclass from a mapping of its fields, or from its first field.

    Raises:
        ValueError: If a field is unknown, is missing or has another type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if isinstance(value, str):
        value = {next(iter(fields)): value}
    if not isinstance(value, dict):
        raise _Refused
    hints, read = typing.get_type_hints(kind), {}
    for name, item in value.items():
        if name not in fields:
            raise ValueError(f"expected {', '.join(fields)}, got {show(name)}{nearest(str(name), fields)}")
        try:
            read[name] = read_value(item, hints[name])
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from None
    for name, field in fields.items():
        if name not in read and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"expected `{name}` in each, got {show(value)}.")
    return kind(**read)


def _read_json(value: str, kind: Any) -> Any:
    """A mapping from JSON. Where transformers reads JSON itself, the text stays as it is."""
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"expected {describe(kind)}, got {show(value)}, which is not JSON.") from None
    found = read_value(read, kind)
    return value if str in alternatives(kind) else found


_READERS = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_string, type(None): _read_null}
