"""How settings work: declared once, coerced by type, checked together, read from and written to YAML."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import difflib
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dbkit.errors import DbkitError
from dbkit.files import refusals_are_sentences, write_text

Config = TypeVar("Config", bound="Settings")
Result = TypeVar("Result")
# What stands for a value that is to be chosen from the facts.
AUTO = "auto"


def setting(default: Any, help: str, **facts: Any) -> Any:
    """A field of a settings class. default may be `...` for a required one.

    facts: min, max (inclusive bounds of a number), above (exclusive lower bound), positional (an argument without a
    flag on the command line), advanced (folded away in forms), fixed (part of a run's identity: it cannot change
    between the sessions of one run), needs (the setting without which this one has no effect, "name", "name=value"
    or "name|other"; forms hide it then), idle (it may be given even so), group (the heading of this setting and of
    those after it), auto (the word auto may stand for the value, which is then chosen when the function runs),
    secret (never saved or shown).
    """
    options = {"metadata": {"help": help, **facts}, "repr": not facts.get("secret")}
    if default is ...:
        return dataclasses.field(**options)
    return dataclasses.field(default=default, **options)


@dataclass(frozen=True)
class Settings:
    """Base of the settings classes: values are coerced to their declared types and checked when made."""

    def __post_init__(self) -> None:
        mistakes = []
        left = left_to_auto(self)
        for field in dataclasses.fields(self):
            if field.name in left:
                continue
            try:
                value = checked(type(self), field, getattr(self, field.name))
                object.__setattr__(self, field.name, value)
            except ValueError as error:
                mistakes.append(f"{field.name} {'is no text; write text' if field.metadata.get('secret') else error}")
        # Relations between settings are only looked at once each setting is what it claims to be.
        mistakes = mistakes or (self.contradictions() if not left else _certain_contradictions(self, left))
        if mistakes:
            raise DbkitError(_join(mistakes))

    def contradictions(self) -> list[str]:
        """Sentences about settings that do not go together. Empty when all is well."""
        return []

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any], origin: str = "") -> Config:
        """Make the settings from names and values; every unknown or missing name is reported at once."""
        names = [field.name for field in dataclasses.fields(cls)]
        where = f" in {origin}" if origin else ""
        mistakes = [
            f"there is no setting {name!r}{where}{closest(name, names)}" for name in values if name not in names
        ]
        required = [
            f.name for f in dataclasses.fields(cls) if f.default is MISSING and values.get(f.name) in (None, "")
        ]
        mistakes += [f"{name} is missing{where}; give it a value" for name in required]
        if mistakes:
            raise DbkitError(_join(mistakes))
        return cls(**values)

    @classmethod
    def load(cls: type[Config], path: str | Path, **changes: Any) -> Config:
        """Read settings from a YAML file; changes win over the file."""
        return cls.from_dict({**read_yaml(path), **changes}, origin=str(path))

    def save(self, path: str | Path) -> Path:
        """Write the settings as YAML, each with its help as a comment. Secrets are left out."""
        path = Path(path)
        write_text(path, to_yaml(self))
        return path


def left_to_auto(config: Settings) -> list[str]:
    """The settings that the word auto stands for."""
    names = (field.name for field in dataclasses.fields(config) if field.metadata.get("auto"))
    return [name for name in names if getattr(config, name) == AUTO]


def _certain_contradictions(config: Settings, left: list[str]) -> list[str]:
    """The contradictions that name nothing that is still to be chosen; the others are looked at then."""
    stand_in = copy.copy(config)
    for name in left:
        object.__setattr__(stand_in, name, getattr(type(config), name))
    return [mistake for mistake in stand_in.contradictions() if not any(name in mistake for name in left)]


def with_auto(cls: type[Config]) -> type[Config]:
    """A settings class with a switch `auto`: where it is on, what is not given is the word auto, not the default.

    Only here is it known what was given: a settings object has a value for everything.
    """
    init, names = cls.__init__, [field.name for field in dataclasses.fields(cls) if field.metadata.get("auto")]

    @functools.wraps(init)
    def made(self, *values, **given):
        try:
            on = coerce(given.get("auto", False), bool)
        except ValueError:  # said with all other mistakes
            on = False
        init(self, *values, **({**dict.fromkeys(names, AUTO), **given} if on else given))

    cls.__init__ = made
    return cls


def configured_by(cls: type[Config]) -> Callable[[Callable[[Config], Result]], Callable[..., Result]]:
    """Let a function of one settings object be called with that object, or with its fields by name.

    Positional settings may be given without their names. A settings object and fields together: the fields win. The
    signature that help() shows is that of the settings class, with what the function returns. What the system refuses
    on the way, as a folder that cannot be written to, is a DbkitError.
    """

    def decorate(function: Callable[[Config], Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        @refusals_are_sentences()
        def called(*values, **changes):
            if values and isinstance(values[0], cls):
                if len(values) > 1:
                    raise TypeError(f"{function.__name__}() takes one {cls.__name__}, then settings by name")
                return function(replace(values[0], **changes) if changes else values[0])
            names = [field.name for field in dataclasses.fields(cls) if field.metadata.get("positional")]
            if len(values) > len(names):
                raise TypeError(
                    f"{function.__name__}() takes {cls.__name__} or settings by name, not {values[len(names)]!r}"
                )
            given = dict(zip(names, values))
            if twice := given.keys() & changes.keys():
                raise TypeError(f"{function.__name__}() got {', '.join(sorted(twice))} twice")
            return function(cls.from_dict({**given, **changes}))

        returns = inspect.signature(function).return_annotation
        called.__signature__ = inspect.signature(cls).replace(return_annotation=returns)
        return called

    return decorate


def replace(config: Config, **changes: Any) -> Config:
    """A copy of the settings with some changed; unknown names are refused with the nearest one."""
    return type(config).from_dict({**dataclasses.asdict(config), **changes})


def field_type(cls: type[Settings], name: str) -> Any:
    """The declared type of a setting, evaluated."""
    return _field_types(cls)[name]


@functools.cache
def _field_types(cls: type[Settings]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def groups(cls: type[Settings]) -> list[tuple[str, list[dataclasses.Field]]]:
    """The settings under their headings, in order. Those before the first heading stand under an empty one."""
    found: list[tuple[str, list[dataclasses.Field]]] = []
    for field in dataclasses.fields(cls):
        if not found or field.metadata.get("group"):
            found.append((field.metadata.get("group", ""), []))
        found[-1][1].append(field)
    return found


def checked(cls: type[Settings], field: dataclasses.Field, value: Any) -> Any:
    """The value as the setting's type, and within its range. Raises ValueError: half a sentence."""
    value = coerce(value, field_type(cls, field.name))
    _check_range(field, value)
    return value


def coerce(value: Any, kind: Any) -> Any:
    """The value as its declared type; text from a flag, a form or YAML included. Raises ValueError: half a sentence."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = next(k for k in typing.get_args(kind) if k is not type(None))
        return None if value is None or value == "" else coerce(value, inner)
    if typing.get_origin(kind) is tuple:
        # A set has no order, so it is not taken for several.
        items = value if isinstance(value, (list, tuple, Iterator)) else [value]
        inner = typing.get_args(kind)[0]
        # Numbers and choices may also stand in one text, as in 3, 7.5; prompts may not: they have commas of their own.
        if inner is float:
            items = [
                part for item in items for part in (item.replace(",", " ").split() if isinstance(item, str) else [item])
            ]
        elif typing.get_origin(inner) is Literal:
            items = [part.strip() for item in items for part in str(item).split(",") if part.strip()]
        return tuple(coerce(item, inner) for item in items)
    if typing.get_origin(kind) is Literal:
        return _coerce_choice(value, typing.get_args(kind))
    if kind is bool:
        return _coerce_bool(value)
    if kind in (int, float):
        return _coerce_number(value, kind)
    # YAML reads some texts as numbers and dates.
    if isinstance(value, bool) or not isinstance(value, (str, os.PathLike, numbers.Number, datetime.date)):
        raise ValueError(f"is {value!r}; write text")
    if kind is Path:
        if not str(value).strip():
            raise ValueError("is empty; write a path")
        if "\0" in str(value) or any("\ud800" <= letter < "\udc80" for letter in str(value)):
            raise ValueError(f"is {str(value)!r}, which has characters that no file's name has; type it again")
        try:
            return Path(str(value)).expanduser()
        except RuntimeError as error:
            reason = str(error).rstrip(".").lower()
            raise ValueError(f"is {value!r}, and {reason}; write the whole path") from None
    if any("\ud800" <= letter <= "\udfff" for letter in str(value)):
        raise ValueError(f"is {str(value)!r}, which has characters that are no text; type it again")
    return str(value)


def _coerce_choice(value: Any, choices: tuple[str, ...]) -> str:
    # YAML reads no, yes and an empty value as these.
    if value is None or isinstance(value, bool):
        value = {False: "no", True: "yes", None: "none"}[value]
    if value not in choices:
        raise ValueError(f"is {value!r}; choose one of {', '.join(choices)}{closest(str(value), choices)}")
    return value


def _coerce_bool(value: Any) -> bool:
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if str(value).strip().lower() not in known:
        raise ValueError(f"is {value!r}; write true or false")
    return known[str(value).strip().lower()]


def _coerce_number(value: Any, kind: type) -> int | float:
    try:
        if isinstance(value, (bool, bytes, bytearray)):
            raise ValueError
        number = kind(value) if not isinstance(value, str) else kind(value.strip().replace("_", ""))
        if kind is int and isinstance(value, float) and number != value:
            raise ValueError
        if kind is float and number != number:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"is {value!r}; write {'a whole number' if kind is int else 'a number'}") from None
    return number


def _check_range(field: dataclasses.Field, value: Any) -> None:
    facts = field.metadata
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        if "min" in facts and number < facts["min"]:
            raise ValueError(f"is {number}; it must be at least {facts['min']}")
        if "above" in facts and number <= facts["above"]:
            raise ValueError(f"is {number}; it must be more than {facts['above']}")
        if "max" in facts and number > facts["max"]:
            raise ValueError(f"is {number}; it must be at most {facts['max']}")


def without_effect(config: Settings) -> list[str]:
    """Settings that were given although what they need is off."""
    return [
        f"{field.name} has no effect without {_words(needs)}; {_way_to(needs)} or leave {field.name} out"
        for field in dataclasses.fields(config)
        if (needs := field.metadata.get("needs")) and not field.metadata.get("idle")
        if getattr(config, field.name) != field.default and not is_on(config, needs)
    ]


def _way_to(needs: str) -> str:
    return f"set {needs.replace('=', ' to ')}" if "=" in needs else "turn that on"


def is_on(config: Any, needs: str) -> bool:
    """Whether a setting is on, "name", or has a certain value, "name=value", or one of several is on, "name|other".

    config is anything that has the values by name.
    """
    if "=" in needs:
        name, _, wanted = needs.partition("=")
        return getattr(config, name) == wanted
    return any(getattr(config, name) not in (False, None, 0, "none") for name in needs.split("|"))


def _words(needs: str) -> str:
    *others, last = needs.replace("=", " ").split("|")
    return f"{', '.join(others)} or {last}" if others else last


def closest(name: str, names: typing.Iterable[str]) -> str:
    """Half a sentence with the nearest name, or nothing if none is near."""
    found = difflib.get_close_matches(str(name).replace("-", "_"), list(names), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _join(mistakes: list[str]) -> str:
    if len(mistakes) == 1:
        return mistakes[0]
    return f"{len(mistakes)} settings need a change:" + "".join(f"\n  - {mistake}" for mistake in mistakes)


def plain(config: Settings) -> dict[str, Any]:
    """The settings as plain text, numbers and lists, without the secrets: what YAML, JSON and metadata hold."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.metadata.get("secret"):
            values[field.name] = (
                list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            )
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The names and values of a YAML settings file."""
    import yaml

    path = Path(path)
    if path.is_dir():
        raise DbkitError(f"{path} is a folder and no settings file; check the path, or move it away")
    if not path.is_file():
        raise DbkitError(f"there is no settings file {path}; check the path")
    try:
        # Read from a file, not from a text: of a text the error would show the line, which may hold a token.
        with refusals_are_sentences(), path.open(encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DbkitError(f"{path} is not readable as YAML ({' '.join(str(error).split())}); mend that line") from error
    if values is not None and not isinstance(values, dict):
        raise DbkitError(f"{path} holds no settings; write lines of the form name: value")
    return values or {}


def to_yaml(config: Settings) -> str:
    """The settings as YAML text, each value under its help."""
    import yaml

    lines = []
    for field in dataclasses.fields(config):
        if field.name in (values := plain(config)):
            value = yaml.safe_dump({field.name: values[field.name]}, allow_unicode=True, width=10**6)
            lines.append(f"# {field.metadata['help']}\n{value}")
    return "".join(lines)


def is_path(kind: Any) -> bool:
    """Whether a declared type is a path, required or not."""
    return kind is Path or Path in typing.get_args(kind)


def is_optional(kind: Any) -> bool:
    """Whether a declared type can be empty."""
    return type(None) in typing.get_args(kind)


def is_several(kind: Any) -> bool:
    """Whether a declared type is a tuple of values."""
    return typing.get_origin(kind) is tuple


def type_name(kind: Any) -> str:
    """A declared type in a user's words."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return type_name(next(k for k in typing.get_args(kind) if k is not type(None)))
    if typing.get_origin(kind) is tuple:
        return f"{type_name(typing.get_args(kind)[0])}, several"
    if typing.get_origin(kind) is Literal:
        return " / ".join(typing.get_args(kind))
    return {bool: "switch", int: "whole number", float: "number", str: "text", Path: "path"}[kind]
