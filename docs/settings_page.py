"""Writes docs/settings.md from the settings classes: python docs/settings_page.py"""

import dataclasses
from pathlib import Path
from typing import Any

from dbkit.config import COMMANDS
from dbkit.settings import Settings, field_type, type_name

_HEAD = """# Settings

Made by `make docs` from `dbkit/config.py`. A setting has one name everywhere: as a flag (`--name`), in YAML, in the
notebooks' forms and as a keyword argument.
"""
_BOUNDS = (("min", "from"), ("above", "above"), ("max", "to"))


def settings_page() -> str:
    """Every setting of every command as Markdown tables."""
    parts = [_HEAD]
    for command, cls in COMMANDS.items():
        parts.append(f"\n## dbkit {command}\n\n{cls.__doc__}\n\n")
        parts.append("| setting | type | default | what it does |\n| :-- | :-- | :-- | :-- |\n")
        parts += [_row(cls, field) for field in dataclasses.fields(cls)]
    return "".join(parts)


def _row(cls: type[Settings], field: dataclasses.Field) -> str:
    facts = field.metadata
    kind = [type_name(field_type(cls, field.name))]
    kind += [f"{word} {facts[key]:,}".replace(",", " ") for key, word in _BOUNDS if key in facts]
    kind += ["or `auto`"] if facts.get("auto") else []
    help = facts["help"]
    return f"| `{field.name}` | {', '.join(kind)} | {_default(field.default)} | {help} |\n"


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if value in (None, "", ()):
        return "empty"
    if isinstance(value, bool):
        return "`on`" if value else "`off`"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(settings_page(), encoding="utf-8", newline="\n")
