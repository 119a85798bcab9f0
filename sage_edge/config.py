"""YAML files validated at the door: into frozen dataclasses, with file, line and key in every complaint.

A field's type hint is its schema. Understood: bool, int, float, str, Literal, X | None, list[X], tuple[X, ...],
dict[str, X] and dataclasses. A field without a default is required; a key without a field is an error, except in a
dataclass that says `FOREIGN: ClassVar[bool] = True`: it describes a file of another program, which may hold more.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from sage_edge.errors import InputError

T = TypeVar("T")
MAX_BYTES = 4 << 20
MAX_NODES = 1 << 20  # after aliases are expanded: a few lines of aliases can stand for billions of nodes
MAX_DEPTH = 64


def load_yaml(path: Path, schema: type[T]) -> T:
    """Read `path` as the dataclass `schema`.

    Raises InputError naming file, line and key for unreadable files, YAML syntax, unknown, duplicate or missing keys,
    wrong types, and whatever the dataclass's `__post_init__` refuses with a ValueError.
    """
    return parse_yaml(read_text(path), schema, str(path))


def read_text(path: Path) -> str:
    """The text of a configuration file; InputError when it cannot be read, is too large or not UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB; a configuration file was expected")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file (UTF-8 YAML was expected)") from error


def parse_yaml(text: str, schema: type[T], name: str) -> T:
    """As `load_yaml`, from a string; `name` stands for the file in messages."""
    try:
        # Before composing, which descends level by level: how deep it may is whatever the program's libraries set.
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise InputError(f"{name}: nested too deeply: more than {MAX_DEPTH} levels")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise InputError(f"{name}: empty; expected {_expected(schema)}")
        if _count(node, {}) > MAX_NODES:
            raise InputError(f"{name}: holds more than {MAX_NODES} values, aliases expanded")
        return typing.cast(T, _convert(node, schema, name, ""))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{name}{line}: not valid YAML: {problem}") from error
    except RecursionError as error:  # in _count
        raise InputError(f"{name}: nested too deeply: an alias that contains itself") from error


def dump_yaml(value: Any) -> str:
    """A dataclass as YAML text that `parse_yaml` reads back."""

    def dump(allow_unicode: bool) -> str:
        return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=allow_unicode, width=120)

    text = dump(allow_unicode=True)
    # PyYAML writes line breaks beyond ASCII as they are, and reads them back as spaces: then everything is escaped.
    return dump(allow_unicode=False) if any(line_break in text for line_break in "\x85\u2028\u2029") else text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below `node` with every alias expanded; RecursionError for an alias that contains itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


def _convert(node: yaml.Node, hint: Any, name: str, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _scalar(node) if isinstance(node, yaml.ScalarNode) else _untyped(node, name, key)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
            return None
        last: InputError | None = None
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(node, option, name, key)
                except InputError as error:
                    last = error
        # With a single real option its own complaint is the precise one.
        if last is not None and len([a for a in arguments if a is not type(None)]) == 1:
            raise last
        raise _complaint(node, name, key, hint)
    if origin is Literal:
        value = _scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if value not in arguments or isinstance(value, bool) != any(isinstance(a, bool) for a in arguments):
            raise _complaint(node, name, key, hint)
        return value
    if dataclasses.is_dataclass(hint):
        return _dataclass(node, typing.cast(type, hint), name, key)
    if origin in (list, tuple):
        if not isinstance(node, yaml.SequenceNode):
            raise _complaint(node, name, key, hint)
        items = [_convert(item, arguments[0], name, f"{key}[{i}]") for i, item in enumerate(node.value)]
        return items if origin is list else tuple(items)
    if origin is dict:
        pairs = _pairs(node, name, key, hint)
        return {k: _convert(v, arguments[1], name, _join(key, k)) for k, (_, v) in pairs.items()}
    value = _scalar(node) if isinstance(node, yaml.ScalarNode) else None
    # YAML 1.1 reads 1e-5 (no dot) as a string; every other tool reads it as a number, and so do we.
    plain_text = isinstance(value, str) and isinstance(node, yaml.ScalarNode) and node.style is None
    if hint is float and value is not None and (type(value) in (int, float) or plain_text):
        try:
            number = float(value)
        except (ValueError, OverflowError):  # not a number; a whole number beyond the range of float
            number = math.nan
        if math.isfinite(number):
            return number
    if hint in (bool, int, str) and type(value) is hint:
        return value
    raise _complaint(node, name, key, hint)


def _dataclass(node: yaml.Node, schema: type, name: str, key: str) -> Any:
    pairs = _pairs(node, name, key, schema)
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    if getattr(schema, "FOREIGN", False):
        pairs = {k: v for k, v in pairs.items() if k in fields}
    for unknown, (key_node, _) in pairs.items():
        if unknown not in fields:
            close = difflib.get_close_matches(unknown, fields, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(fields)}"
            raise InputError(f"{_where(key_node, name)}: unknown key {_join(key, unknown)!r}{hint}")
    for field in fields.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in pairs:
            expected = _expected(hints[field.name])
            raise InputError(f"{_where(node, name)}: missing key {_join(key, field.name)!r}; expected {expected}")
    values = {k: _convert(v, hints[k], name, _join(key, k)) for k, (_, v) in pairs.items()}
    try:
        return schema(**values)
    except ValueError as error:
        raise InputError(f"{_where(node, name)}: {f'{key!r}: ' if key else ''}{error}") from error


def _pairs(node: yaml.Node, name: str, key: str, hint: Any) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise _complaint(node, name, key, hint)
    pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{_where(key_node, name)}: a key must be a plain word, found {_kind(key_node)}")
        text = str(key_node.value)
        if text in pairs:
            raise InputError(f"{_where(key_node, name)}: key {_join(key, text)!r} is given twice; keep one")
        pairs[text] = (key_node, value_node)
    return pairs


def _untyped(node: yaml.Node, name: str, key: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, Any, name, f"{key}[{i}]") for i, item in enumerate(node.value)]
    return {k: _convert(v, Any, name, _join(key, k)) for k, (_, v) in _pairs(node, name, key, dict).items()}


def _scalar(node: yaml.ScalarNode) -> Any:
    constructor = yaml.constructor.SafeConstructor()
    try:
        return constructor.construct_object(node)
    except (yaml.YAMLError, ValueError):
        return node.value


def _complaint(node: yaml.Node, name: str, key: str, hint: Any) -> InputError:
    found = reprlib.repr(_scalar(node)) if isinstance(node, yaml.ScalarNode) else _kind(node)
    what = f"{key!r}: " if key else ""
    return InputError(f"{_where(node, name)}: {what}expected {_expected(hint)}, found {found}")


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _expected(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _expected(a) for a in arguments)
    if origin in (list, tuple):
        return f"a list of {_expected(arguments[0])}"
    if origin is dict:
        return "a mapping"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the keys {', '.join(f.name for f in dataclasses.fields(hint))}"
    names: dict[Any, str] = {
        bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"
    }  # fmt: skip
    return names.get(hint, "a mapping")


def _where(node: yaml.Node, name: str) -> str:
    return f"{name}, line {node.start_mark.line + 1}"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
