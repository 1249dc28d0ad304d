"""The command line: one command for each settings class, one flag for each setting."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Container, Sequence
from typing import Any

from dbkit import processes
from dbkit.config import COMMANDS
from dbkit.errors import DbkitError
from dbkit.settings import Settings, closest, coerce, field_type, groups, is_several, read_yaml, type_name

# Where each command's function is; it is imported when the command runs.
_FUNCTIONS = {
    "prepare": ("dbkit.dataset", "prepare_dataset"),
    "caption": ("dbkit.captioning", "caption_dataset"),
    "identifier": ("dbkit.identifier", "check_identifier"),
    "class-images": ("dbkit.class_images", "generate_class_images"),
    "plan": ("dbkit.plan", "plan"),
    "train": ("dbkit.train", "train"),
    "preview": ("dbkit.preview", "preview"),
    "evaluate": ("dbkit.evaluate", "evaluate"),
    "merge": ("dbkit.lora", "merge"),
    "extract-lora": ("dbkit.extract", "extract_lora"),
    "convert": ("dbkit.convert", "convert"),
    "status": ("dbkit.status", "status"),
    "watch": ("dbkit.watch", "watch"),
    "demo": ("dbkit.demo", "demo"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 only when it is done, 2 for a user's mistake, 130 when stopped.

    Where the reader of a pipe has gone, as `head` goes, it ends without a word, and the status is 1.
    """
    status = 1
    try:
        status = _run(arguments)
    finally:
        try:
            if hasattr(sys.stdout, "flush"):
                sys.stdout.flush()  # of a short text only this finds the pipe closed
        except OSError as error:
            # The interpreter writes what is left when it ends, and would say that it cannot.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                _say_mistake(f"{error}; not all that was printed is there")
            raise SystemExit(status or 1) from None
    return status


def _run(arguments: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a prompt in another script must not end a training
    try:
        command, config = _parse(sys.argv[1:] if arguments is None else list(arguments))
        if arguments is None:
            _hide_secrets(config)
        module, function = _FUNCTIONS[command]
        result = getattr(importlib.import_module(module), function)(config)
        # A conversion's last line names what it made.
        if processes.is_main() and result is not None and command != "convert":
            print(result)
        return 0
    except DbkitError as error:
        _say_mistake(str(error))
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 1
        _say_mistake(f"{error}; check this path and who may write there")
        return 2
    except KeyboardInterrupt as interrupt:
        if processes.is_main():
            print(f"dbkit: {str(interrupt) or 'stopped'}", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether the pipe that is closed is that of stdout, and not one of the Drive's or of a process."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        return True
    return False


def _say_mistake(sentence: str) -> None:
    # A mistake that all processes of a machine find is said by the first, whose end makes the launcher end the others;
    # what one of them finds alone has to be said all the same, so it only waits for that.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    print(f"dbkit: {sentence}", file=sys.stderr)


def _hide_secrets(config: Settings) -> None:
    """Take secrets out of the process's arguments, which trackers write down."""
    for field in dataclasses.fields(config):
        if field.metadata.get("secret") and (value := getattr(config, field.name)):
            sys.argv[:] = [argument.replace(value, "***") for argument in sys.argv]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise DbkitError(f"{message}; {self.prog} --help lists what there is")


def _parse(arguments: list[str]) -> tuple[str, Settings]:
    import dbkit

    parser = _Parser(prog="dbkit", description=dbkit.__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dbkit {dbkit.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, cls in COMMANDS.items():
        _add_command(commands, name, cls)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        hint = closest(arguments[0], COMMANDS) or "; dbkit --help lists what there is"
        raise DbkitError(f"{arguments[0]!r} is none of dbkit's commands, {', '.join(COMMANDS)}{hint}")
    found, unknown = parser.parse_known_args(_plain_switches(arguments))
    values = vars(found)
    command, path = values.pop("command"), values.pop("config", None)
    cls = COMMANDS[command]
    # argparse takes optional positionals up to the first flag only; a later one comes back as unknown.
    left = [field.name for field in dataclasses.fields(cls) if field.metadata.get("positional")]
    left = [name for name in left if name not in values]
    while left and unknown and not unknown[0].startswith("-"):
        values[left.pop(0)] = unknown.pop(0)
    if unknown:
        given = [*values, *read_yaml(path)] if path else values
        raise DbkitError(_unknown_argument(unknown[0], command, cls, given))
    return command, cls.load(path, **values) if path else cls.from_dict(values)


def _plain_switches(arguments: list[str]) -> list[str]:
    """The arguments with a switch's value, which argparse does not take, in its flag: `--NAME off` is `--no-NAME`."""
    cls = COMMANDS.get(arguments[0]) if arguments else None
    fields = dataclasses.fields(cls) if cls else ()
    switches = {flag for field in fields if field_type(cls, field.name) is bool for flag in _flags(field)}
    plain: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not equals:
            flag, value = plain[-1] if plain else "", argument
        if flag in switches:
            with contextlib.suppress(ValueError):  # the next flag, a path, or what argparse refuses
                argument = flag if coerce(value, bool) else f"--no-{flag[2:]}"
                plain = plain if equals else plain[:-1]
        plain.append(argument)
    return plain


def _flags(field: dataclasses.Field) -> dict[str, None]:
    return dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))


def _add_command(commands: Any, name: str, cls: type[Settings]) -> None:
    command = commands.add_parser(name, help=cls.__doc__, description=cls.__doc__, allow_abbrev=False)
    command.add_argument("--config", metavar="FILE", help="YAML file with settings; flags win over it")
    for title, fields in groups(cls):
        group = command.add_argument_group(title) if title else command
        for field in fields:
            _add_flag(group, cls, field)


def _add_flag(group: Any, cls: type[Settings], field: dataclasses.Field) -> None:
    kind = field_type(cls, field.name)
    # What is not given stays out of the result, so that flags change only what they name.
    options = {"default": argparse.SUPPRESS, "help": _help(field)}
    if field.metadata.get("positional"):
        group.add_argument(field.name, nargs="?", metavar=field.name.upper(), **options)
        return
    flags = _flags(field)
    if kind is bool:
        group.add_argument(*flags, dest=field.name, action=argparse.BooleanOptionalAction, **options)
    else:
        named = type_name(kind).partition(",")[0]
        metavar = f"{{{named.replace(' / ', ',')}}}" if " / " in named else named.upper().replace(" ", "_")
        action = "append" if is_several(kind) else "store"
        group.add_argument(*flags, dest=field.name, metavar=metavar, action=action, **options)


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"]
    if field.default is not dataclasses.MISSING and field.default not in (None, "", ()):
        default = field.default if not isinstance(field.default, tuple) else " ".join(map(str, field.default))
        text += f" (default: {default})"
    return text.replace("%", "%%")


def _unknown_argument(argument: str, command: str, cls: type[Settings], given: Container[str]) -> str:
    """The sentence for it; given holds the names of the settings that have a value."""
    argument = argument.partition("=")[0]  # its value may be a token
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hint = closest(argument.lstrip("-").removeprefix("no-"), fields)
    model = fields.get("pretrained_model_name_or_path")
    if not hint and model and model.default is dataclasses.MISSING and model.name not in given and argument[:1] != "-":
        hint = f"; if that is the model, write --{model.name} {argument}"
    return f"{argument} is not known to dbkit {command}{hint or f'; dbkit {command} --help lists what is'}"
