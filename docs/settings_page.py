"""Writes docs/settings.md from the settings classes: python docs/settings_page.py"""

import dataclasses
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from dbkit.config import COMMANDS
from dbkit.settings import Settings, field_type, type_name


def settings_page() -> str:
    """docs/settings.md: every setting of every command, from the classes."""
    parts = [
        "# Settings\n\nMade by `make docs` from `dbkit/config.py`. Every setting has the same name as a flag (`--name`), in YAML, in the\n"
        "notebooks' forms and as a keyword argument.\n"
    ]
    for command, cls in COMMANDS.items():
        parts.append(
            f"\n## dbkit {command}\n\n{cls.__doc__}\n\n| setting | type | default | what it does |\n| :-- | :-- | :-- | :-- |\n"
        )
        parts += [_settings_row(cls, field) for field in dataclasses.fields(cls)]
    return "".join(parts)


def _settings_row(cls: type[Settings], field: dataclasses.Field) -> str:
    default = (
        "required"
        if field.default is MISSING
        else "empty"
        if field.default in (None, "", ())
        else f"`{_shown(field.default)}`"
    )
    waits = f" (not built yet: comes with a {field.metadata['waits']})" if "waits" in field.metadata else ""
    bounds = ", ".join(
        f"{word} {field.metadata[key]}"
        for key, word in (("min", "from"), ("above", "above"), ("max", "to"))
        if key in field.metadata
    )
    return f"| `{field.name}` | {type_name(field_type(cls, field.name))}{f', {bounds}' if bounds else ''} | {default} | {field.metadata['help']}{waits} |\n"


def _shown(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, tuple)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(settings_page(), encoding="utf-8", newline="\n")
