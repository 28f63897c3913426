"""Messages as text frames: one JSON object with a ``type`` and the fields of the message.

Everything that a peer sends is parsed here, once, into frozen dataclasses; what does not
fit raises :class:`ProtocolError` and nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from wire.messages import Message, ProtocolError

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""The longest text frame that is read; ten thousand files with the longest names fit into it."""

_LARGEST_INTEGER = 2**63 - 1
_SMALLEST_INTEGER = -(2**63)

Parser: TypeAlias = Callable[[object], Any]
Former: TypeAlias = Callable[[Any], Any]
"""Makes of a value what JSON can say."""

_to_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class UnknownMessage:
    """A message type of a newer peer; to be logged and ignored."""

    type: str


def encode(message: Message) -> str:
    """Return the text frame for ``message``."""
    return _to_json(_MESSAGE_FORMERS[type(message)](message))


def decode(text: str) -> Message | UnknownMessage:
    """Parse one text frame.

    Fields that this version does not know are ignored, as a newer peer may send
    them. Raises :class:`ProtocolError` for anything that is not a well-formed message.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ProtocolError("not an object with a type")
    parse = _MESSAGE_PARSERS.get(value["type"])
    if parse is None:
        return UnknownMessage(value["type"][:64])
    message: Message = parse(value)
    return message


def _parse_integer(value: object) -> int:
    if type(value) is not int or not _SMALLEST_INTEGER <= value <= _LARGEST_INTEGER:
        raise ProtocolError(f"not a 64-bit integer: {value!r:.80}")
    return value


def _parse_number(value: object) -> float:
    if type(value) not in (int, float):
        raise ProtocolError(f"not a number: {value!r:.80}")
    number = float(typing.cast(float, value))
    if not abs(number) < 1e12:  # also refuses NaN and infinity
        raise ProtocolError(f"number out of range: {number}")
    return number


def _parse_text(value: object) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"not a string: {value!r:.80}")
    return value


def _parse_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError(f"not a boolean: {value!r:.80}")
    return value


_SCALAR_PARSERS: Mapping[type, Parser] = {
    int: _parse_integer,
    float: _parse_number,
    str: _parse_text,
    bool: _parse_boolean,
}


def _parser(annotation: Any) -> Parser:
    """Build the function that checks and converts a value of this type."""
    if isinstance(annotation, type) and annotation in _SCALAR_PARSERS:
        return _SCALAR_PARSERS[annotation]
    if typing.get_origin(annotation) is types.UnionType:
        return _optional_parser(annotation)
    if typing.get_origin(annotation) is tuple:
        return _tuple_parser(typing.get_args(annotation)[0])
    assert isinstance(annotation, type)
    if issubclass(annotation, enum.StrEnum):
        return _enum_parser(annotation)
    return _dataclass_parser(annotation)


def _optional_parser(annotation: Any) -> Parser:
    (inner,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
    parse = _parser(inner)
    return lambda value: None if value is None else parse(value)


def _tuple_parser(element: Any) -> Parser:
    parse = _parser(element)

    def parse_list(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ProtocolError(f"not a list: {value!r:.80}")
        return tuple(parse(item) for item in value)

    return parse_list


def _enum_parser(cls: type[enum.StrEnum]) -> Parser:
    def parse_enum(value: object) -> enum.StrEnum:
        try:
            return cls(_parse_text(value))
        except ValueError:
            raise ProtocolError(f"not a {cls.__name__}: {value!r:.80}") from None

    return parse_enum


def _dataclass_parser(cls: type[Any]) -> Parser:
    hints = typing.get_type_hints(cls)
    parsers = {field.name: _parser(hints[field.name]) for field in dataclasses.fields(cls)}
    # one with a default is younger than the protocol's version: a peer may not know it
    required = {
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    }

    def parse_fields(value: object) -> Any:
        if not isinstance(value, dict):
            raise ProtocolError(f"not a {cls.__name__}: {value!r:.80}")
        missing = required - value.keys()
        if missing:
            raise ProtocolError(f"{cls.__name__} without {', '.join(sorted(missing))}")
        given = {name: parse(value[name]) for name, parse in parsers.items() if name in value}
        return cls(**given)

    return parse_fields


def _former(annotation: Any) -> Former | None:
    """Build the function that forms a value of this type; None if it can stay what it is.

    ``dataclasses.asdict`` looks at each value anew, which takes four times as long.
    """
    if typing.get_origin(annotation) is types.UnionType:
        (inner,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
        return _optional_former(_former(inner))
    if typing.get_origin(annotation) is tuple:
        return _tuple_former(_former(typing.get_args(annotation)[0]))
    return _dataclass_former(annotation) if dataclasses.is_dataclass(annotation) else None


def _optional_former(form: Former | None) -> Former | None:
    return None if form is None else lambda value: None if value is None else form(value)


def _tuple_former(form: Former | None) -> Former | None:
    return None if form is None else lambda values: [form(value) for value in values]


def _dataclass_former(cls: Any) -> Former:
    hints = typing.get_type_hints(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))
    nested = {name: form for name in names if (form := _former(hints[name])) is not None}

    def form_fields(value: Any) -> dict[str, Any]:
        fields = {name: getattr(value, name) for name in names}
        for name, form in nested.items():
            fields[name] = form(fields[name])
        return fields

    return form_fields


def _message_former(cls: type[Any]) -> Former:
    form, name = _dataclass_former(cls), cls.__name__.lower()

    def form_message(message: Any) -> dict[str, Any]:
        fields: dict[str, Any] = form(message)
        fields["type"] = name
        return fields

    return form_message


_MESSAGE_PARSERS: Mapping[str, Parser] = {
    cls.__name__.lower(): _dataclass_parser(cls) for cls in typing.get_args(Message)
}
_MESSAGE_FORMERS: Mapping[type, Former] = {
    cls: _message_former(cls) for cls in typing.get_args(Message)
}
