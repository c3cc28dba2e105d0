"""Typed reading of recipe values: YAML 1.2 scalars, then each value checked against the annotation of its field.

YAML 1.1 (PyYAML's default) reads `1e-3` as a string and `no` as false; here `1e-3` is a number and `no` is text.
"""

from __future__ import annotations

import enum
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageProblem, did_you_mean

_TRUE = {"true", "yes", "on"}
_FALSE = {"false", "no", "off"}
MAXIMUM_RECIPE_BYTES = 1 << 20
_MANY_CHOICES = 12


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2 and an error for a key that is given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict of the mapping; PyYAML itself would silently keep the last of two equal keys."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                raise UsageProblem(f"line {key_node.start_mark.line + 1}: key {key_node.value!r} is given twice")
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep=deep)


def _resolve(tag: str, pattern: str, first: str) -> None:
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_resolve("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789")
_resolve("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+0123456789.")
_resolve("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.")
_resolve("null", r"^(?:~|null|Null|NULL|)$", "~nN\0")
RecipeLoader.yaml_implicit_resolvers[""] = RecipeLoader.yaml_implicit_resolvers["\0"]


def _construct_integer(loader: RecipeLoader, node: yaml.ScalarNode) -> int:
    return int(str(node.value).replace("_", ""))


def _construct_float(loader: RecipeLoader, node: yaml.ScalarNode) -> float:
    return float(str(node.value).lower().replace(".inf", "inf").replace(".nan", "nan"))


RecipeLoader.add_constructor("tag:yaml.org,2002:int", _construct_integer)
RecipeLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, name: str) -> Any:
    """The value that `text` describes.

    Args:
        text: YAML.
        name: where it comes from, for the error message.

    Raises:
        UsageProblem: not YAML, or a key given twice.
    """
    try:
        return yaml.load(text, Loader=RecipeLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UsageProblem(f"{name}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except UsageProblem as error:
        raise UsageProblem(f"{name} {error}") from None
    except RecursionError:
        raise UsageProblem(f"{name}: nested too deeply") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file at `path`.

    Raises:
        UsageProblem: the file is missing, too large, not UTF-8, not YAML or not a mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageProblem(f"no such recipe: {path}")
    if file.stat().st_size > MAXIMUM_RECIPE_BYTES:
        raise UsageProblem(f"{path}: a recipe has at most {MAXIMUM_RECIPE_BYTES} bytes, got {file.stat().st_size}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{path}: not UTF-8 text (byte {error.start})") from None
    return yaml_mapping(text, str(path))


def yaml_mapping(text: str, name: str) -> dict[str, Any]:
    """The mapping that the text of a recipe describes; `name` is the file's, for messages.

    Raises:
        UsageProblem: not YAML or not a mapping.
    """
    value = parse_yaml(text, name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageProblem(f"{name}: a recipe is a mapping of sections, got {type(value).__name__}")
    return value


def wanted(annotation: Any) -> str:
    """A short name for a type, as shown in messages: `a number`, `true or false`, `one of: a, b`."""
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", dict: "a mapping"}
    if annotation in names:
        return names[annotation]
    if annotation is type(None):
        return "null"
    if annotation is list or annotation is tuple:
        return "a list"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of: " + ", ".join(str(member.value) for member in annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of: " + ", ".join(map(str, arguments))
    if origin in (list, tuple):
        return "a list"
    if origin is dict:
        return "a mapping"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(wanted(argument) for argument in arguments)
    return getattr(annotation, "__name__", str(annotation))


class _Mismatch(Exception):
    """A value does not fit one alternative of a type."""


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise _Mismatch


def _to_number(value: Any, kind: type) -> int | float:
    if isinstance(value, bool):
        raise _Mismatch
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _Mismatch from None
    if not isinstance(value, (int, float)):
        raise _Mismatch
    if kind is float:
        return float(value)
    if value != value or value in (float("inf"), float("-inf")) or int(value) != value:
        raise _Mismatch
    return int(value)


def _to_enum(value: Any, kind: type[enum.Enum]) -> Any:
    text = value.value if isinstance(value, enum.Enum) else value
    for member in kind:
        if member.value == text:
            return member.value
    raise _Mismatch


def _to_list(value: Any, arguments: tuple[Any, ...]) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise _Mismatch
    inner = arguments[0] if arguments else Any
    return [_convert(item, inner) for item in value]


def _to_union(value: Any, arguments: tuple[Any, ...]) -> Any:
    if type(None) in arguments and value is None:
        return None
    # text that reads as a number is one where a number is allowed; `yes` stays text where text is allowed
    number = next((a for a in arguments if a in (int, float)), None)
    exact = [a for a in arguments if isinstance(a, type) and type(value) is a and not (a is str and number)]
    # text is the loosest alternative and `SchedulerType | str` means "one of the scheduler's names"
    enums = [a for a in arguments if isinstance(a, type) and issubclass(a, enum.Enum)]
    rest = [a for a in arguments if a is not type(None) and not (enums and a is str)]
    for candidate in ([] if enums else exact) + [a for a in rest if a is not str] + [a for a in rest if a is str]:
        try:
            return _convert(value, candidate)
        except _Mismatch:
            continue
    raise _Mismatch


def _convert(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if annotation is bool:
        return _to_bool(value)
    if annotation in (int, float):
        return _to_number(value, annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _to_enum(value, annotation)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise _Mismatch
    if origin in (typing.Union, types.UnionType):
        return _to_union(value, arguments)
    if origin in (list, tuple) or annotation in (list, tuple):
        return _to_list(value, arguments)
    plain = origin or annotation
    if isinstance(plain, type) and isinstance(value, plain):
        return value
    if annotation is str and isinstance(value, Path):
        return str(value)
    raise _Mismatch


def coerce(value: Any, annotation: Any, key: str) -> Any:
    """`value` as the type `annotation` asks for.

    Args:
        value: what the recipe or `--set` gave.
        annotation: the field's type (resolved, not a string).
        key: dotted name of the field, for the error message.

    Raises:
        UsageProblem: the value doesn't fit; the message names key, value and wanted type.
    """
    try:
        return _convert(value, annotation)
    except _Mismatch:
        choices = wanted(annotation)
        listed = choices.removeprefix("one of: ").removesuffix(" or text").split(", ")
        close = did_you_mean(str(value), listed) if len(listed) > 1 else ""
        if len(listed) > _MANY_CHOICES:
            choices = f"one of {len(listed)} names ({', '.join(listed[:3])}, …)"
        raise UsageProblem(f"{key}: wanted {choices}, got {value!r}{close}") from None
