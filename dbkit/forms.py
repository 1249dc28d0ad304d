"""Forms for the notebooks, made from the settings classes. Only this module and editor import ipywidgets.

Only core widgets, in the interface that ipywidgets 7.7 (Colab) and 8 share. A form edits settings and keeps what was
chosen in the workspace; cells run. No button starts work.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import ipywidgets as widgets
from traitlets import TraitError

from dbkit import embedded
from dbkit.errors import DbkitError
from dbkit.files import refusals_are_sentences, write_text
from dbkit.settings import Settings, checked, coerce, field_type, groups, is_on, is_optional, is_several, read_yaml
from dbkit.suggestions import choices, suggest
from dbkit.train_config import TrainConfig
from dbkit.train_summary import WRONG, Background, red, summarize
from dbkit.workspace import Workspace

Config = TypeVar("Config", bound=Settings)
_HEADING = "<h3 style='margin:12px 0 0'>{}</h3>"
# The widgets' own lines are as high as their fields.
_DENSE = "line-height:1.4;padding:4px 0 0 8px"
_QUERY = re.compile(r"https?://[^?#]*\?", re.IGNORECASE)


@refusals_are_sentences()
def form(cls: type[Config], workspace: Workspace, name: str | None = None, run: Path | None = None) -> Form[Config]:
    """A form for one settings class. name is that of its file in settings/, for instance train or export.

    run is the folder of the run whose model is suggested, if not the newest of the workspace.
    """
    return Form(cls, workspace, name or cls.__name__.removesuffix("Config").lower(), run)


class Form(widgets.VBox, Generic[Config]):
    """Show it as the last line of a cell, then pass read() to the function."""

    def __init__(self, cls: type[Config], workspace: Workspace, name: str, run: Path | None = None) -> None:
        self._cls, self._workspace, self._file = cls, workspace, workspace.settings_file(name)
        # What is typed here is kept in the workspace, so a secret has no field.
        self._fields = [field for field in dataclasses.fields(cls) if not field.metadata.get("secret")]
        names = [field.name for field in self._fields]
        self._chosen = {key: value for key, value in self._kept().items() if key in names}
        found = suggest(cls, workspace, name, run)
        suggested = {key: value for key, value in found.items() if key not in self._chosen}
        self._offered = choices(cls, workspace, name)
        self._left = [field.name for field in self._fields if field.metadata.get("auto")]
        if self._chosen.get("auto", suggested.get("auto")):
            suggested |= {name: None for name in self._left if name not in self._chosen}
        # Shared, since each one is a message of its own.
        self._layouts = [
            # Of a text of several lines the browser's least width is another than of the others.
            widgets.Layout(**sizes)
            for sizes in ({"flex": "0 0 250px"}, {"width": "340px", "min_width": "0"}, {"flex": "1 1 300px"})
        ]
        self._styles: dict[type, widgets.Widget] = {}
        self._inputs: dict[str, widgets.Widget] = {}
        self._notes: dict[str, widgets.HTML] = {}
        self._rows: dict[str, widgets.HBox] = {}
        self._touched: set[str] = set()
        self._hidden: set[str] = set()
        self._folds: list[tuple[widgets.Checkbox, set[str]]] = []
        for field in self._fields:
            default = None if field.default is dataclasses.MISSING else field.default
            value = self._chosen.get(field.name, suggested.get(field.name, default))
            self._rows[field.name] = self._row(field, value)
            _let_out()
        sections = [part for title, fields in groups(cls) for part in self._section(title, fields)]
        self._message, self._summary = widgets.HTML(), widgets.HTML()
        self._background = _background(self._file)
        if self._left:
            self._inputs["auto"].observe(lambda change: self._say_left(), "value")
            self._say_left()
        # What a training is made of goes together: once something of it is changed, the rest stays as it stands.
        kept_together = suggested.items() if issubclass(cls, TrainConfig) else ()
        self._together = {key for key, value in kept_together if key in self._inputs and value is not None}
        # Above and below, since a form is longer than a screen.
        super().__init__([*self._news(found), self._message, *sections, self._message, self._summary])
        self._check()

    def read(self) -> Config:
        """The settings as they stand, with relative paths taken from the workspace. Raises DbkitError.

        It waits for the summary under the form, so that nothing runs beside what is done with them.
        """
        self._background.finish()
        return self._read()

    def set(self, **values: Any) -> None:
        """Fill fields in from code, as typing would."""
        for name, value in values.items():
            if name not in self._inputs:
                raise DbkitError(f"there is no field {name!r} in this form")
            box = self._inputs[name]
            try:
                box.value = _shown(value, type(box))
            except (TraitError, TypeError, ValueError):  # a choice that the field does not have under this name
                try:
                    box.value = _shown(checked(self._cls, self._cls.__dataclass_fields__[name], value), type(box))
                except ValueError as error:
                    raise DbkitError(f"{name} {error}") from None

    def _section(self, title: str, fields: list[dataclasses.Field]) -> list[widgets.Widget]:
        """The fields under a heading: what to set, then the advanced ones, folded away."""
        heading = [widgets.HTML(_HEADING.format(html.escape(title.capitalize())))] if title else []
        plain, advanced = [], []
        for field in fields:
            if field.name in self._rows:
                (advanced if field.metadata.get("advanced") else plain).append(field.name)
        shown = [*heading, *(self._rows[name] for name in plain)]
        if not advanced:
            return shown
        folded = widgets.VBox([self._rows[name] for name in advanced], layout=widgets.Layout(display="none"))
        more = widgets.Checkbox(description=f"more of {title}" if title else "more settings", indent=False)
        more.observe(lambda change: _show(folded, change["new"]), "value")
        self._folds.append((more, set(advanced)))
        return [*shown, more, folded]

    def _read(self) -> Config:
        given = {name: value for name, value in self._given().items() if name not in self._hidden}
        return self._workspace.anchor(self._cls.from_dict(given))

    def _given(self) -> dict[str, Any]:
        """What the fields say. An emptied one means "none" where that is a value, else the default or auto's choice."""
        values = {name: self._value(name) for name in self._inputs}
        optional = {name for name in values if is_optional(field_type(self._cls, name))}
        optional -= set(self._left if values.get("auto") else ())
        return {name: value for name, value in values.items() if value is not None or name in optional}

    def _kept(self) -> dict[str, Any]:
        return read_yaml(self._file) if self._file.exists() else {}

    def _row(self, field: dataclasses.Field, value: Any) -> widgets.Widget:
        kind = field_type(self._cls, field.name)
        if kind is bool and field.metadata.get("auto"):
            look = (widgets.Dropdown, {"options": (("auto, else off", ""), ("on", "on"), ("off", "off"))})
        elif kind is bool:
            look = (widgets.Checkbox, {"indent": False})
        elif get_origin(kind) is Literal:
            look = (widgets.Dropdown, {"options": get_args(kind)})
        elif is_several(kind):
            look = (widgets.Textarea, {"placeholder": "one on each line", "continuous_update": False, "rows": 3})
        else:
            # A Combobox is a Text that offers something.
            empty = self._empty(field)
            named = [str(one) for part in get_args(kind) if get_origin(part) is Literal for one in get_args(part)]
            offered = self._offered.get(field.name, named)
            look = (widgets.Combobox, {"placeholder": empty, "continuous_update": False, "options": offered})
        for_name, for_box, for_note = self._layouts
        try:
            shown = _shown(self._relative(value), look[0])
            box = self._make(look[0], layout=for_box, value=shown, **look[1])
        except (TraitError, TypeError, ValueError) as error:
            # A value that this widget cannot show (a choice that no longer exists) must not hide the form.
            raise DbkitError(
                f"{self._file} has {field.name}: {value!r}, which cannot be shown ({error}); mend it"
            ) from error
        box.observe(lambda change: self._changed(field.name), "value")
        self._inputs[field.name] = box
        name = self._make(widgets.HTML, layout=for_name, value=f"<b>{field.name}</b>")
        note = self._notes[field.name] = self._make(widgets.HTML, layout=for_note, value=_help(field))
        return widgets.HBox([name, box, note])

    def _make(self, kind: type[widgets.Widget], **traits: Any) -> widgets.Widget:
        """A widget that has its style in common with the others of its kind."""
        made = kind(**traits, **({"style": self._styles[kind]} if kind in self._styles else {}))
        self._styles.setdefault(kind, made.style)
        return made

    def _relative(self, value: Any) -> Any:
        """Paths in the workspace are shown, and kept, relative to it, since it lies elsewhere on another machine."""
        inside = (
            isinstance(value, (str, Path))
            and Path(value).is_absolute()
            and Path(value).is_relative_to(self._workspace.path)
        )
        return Path(value).relative_to(self._workspace.path).as_posix() if inside else value

    def _changed(self, name: str) -> None:
        import yaml

        self._touched.add(name)
        unkept = []
        try:
            with refusals_are_sentences():
                # Another notebook may have changed other fields meanwhile.
                kept = {**self._values_of(self._together), **self._kept(), **self._values_of(self._touched)}
                # The query of an address may be a token.
                kept = {name: value for name, value in kept.items() if not _QUERY.match(str(value))}
                write_text(self._file, yaml.safe_dump(kept, allow_unicode=True, sort_keys=False))
        except DbkitError as error:
            unkept = [f"what was changed holds in this form, but is not kept: {error}"]
        self._check(unkept)

    def _values_of(self, names: set[str]) -> dict[str, Any]:
        return {name: self._value(name) for name in names}

    def _value(self, name: str) -> Any:
        box = self._inputs[name]
        if isinstance(box, widgets.Textarea):
            return [line.strip() for line in box.value.splitlines() if line.strip()]
        return box.value if isinstance(box, widgets.Checkbox) else box.value.strip() or None

    @staticmethod
    def _empty(field: dataclasses.Field) -> str:
        """What stands in a field that is left empty: what that means."""
        if field.default is dataclasses.MISSING:
            return "required"
        return "empty" if field.default in (None, "") else str(field.default)

    def _say_left(self) -> None:
        """What an empty field means, where auto may choose."""
        for field in self._fields:
            if field.name in self._left and isinstance(self._inputs[field.name], widgets.Text):
                self._inputs[field.name].placeholder = "auto" if self._inputs["auto"].value else self._empty(field)

    def _news(self, found: dict[str, Any]) -> list[widgets.Widget]:
        """Says so where the model is the embedded one, and what is suggested by now beside what was filled in."""
        names, lines = ("pretrained_model_name_or_path", "instance_data_dir"), []
        if names[0] in self._inputs and embedded.is_embedded(self._value(names[0]) or ""):
            lines.append(
                "The model here is dbkit's own small one, which needs no GPU and draws "
                f"{embedded.RESOLUTION} px pictures."
            )
        samples = {embedded.NAME, str(embedded.data_templates() / embedded.SAMPLE)}
        newer = {name: str(self._relative(found[name])) for name in names if name in found and name in self._chosen}
        newer = [f"{name} {value}" for name, value in newer.items() if value not in {self._value(name), *samples}]
        if newer:
            lines.append(f"The workspace has something newer: {', '.join(newer)}. Fill in what you want to train.")
        return [widgets.HTML("<br>".join(html.escape(line, quote=False) for line in lines))] if lines else []

    def _check(self, wrong: Sequence[str] = ()) -> None:
        """Say beside each field what is wrong with it, and below what is wrong in all; hide those without effect.

        wrong are sentences that stand below too.
        """
        given, seen = self._given(), types.SimpleNamespace()
        for field in self._fields:
            value, fault = given.get(field.name, field.default), ""
            if field.name in given:
                try:
                    value = checked(self._cls, field, value)
                except ValueError as error:
                    fault = f"<br>{red(f'{field.name} {error}')}"
            self._notes[field.name].value = _help(field, fault)
            needs = field.metadata.get("needs")
            shown = not needs or is_on(seen, needs)
            _show(self._rows[field.name], shown)
            (self._hidden.discard if shown else self._hidden.add)(field.name)
            setattr(seen, field.name, value if shown else field.default)
        for more, names in self._folds:
            _show(more, not names <= self._hidden)
        try:
            config = self._read()
        except DbkitError as error:
            config, wrong = None, [*wrong, str(error)]
        said = "\n".join(wrong)
        self._message.value = red(said) + self._folded(said) if wrong else ""
        if issubclass(self._cls, TrainConfig):
            _let_out()
            self._background.give(config, self._summarized)

    def _summarized(self, text: str) -> None:
        self._summary.value = text + self._folded(text.partition(WRONG)[2])

    def _folded(self, text: str) -> str:
        """Where the settings are that a text names and that are folded away."""
        words = set(re.findall(r"\w+", text))
        found = {more.description: words & names for more, names in self._folds if not more.value and words & names}
        return "".join(f"<br>Under <i>{more}</i>: {', '.join(sorted(names))}" for more, names in found.items())


@functools.cache
def _background(file: Path) -> Background[TrainConfig | None]:
    """One for all forms of a file: what is given by the form of a cell that runs again takes the former's place."""
    return Background(summarize)


def _let_out() -> None:
    """Wait until what the widgets said is on its way to the browser.

    A kernel's thread sends it. Where other threads keep that one from running, the messages pile up, and of more than
    1000 at once ZeroMQ drops some without a word: widgets that are not found, or a cell that never ends.
    """
    sys.stdout.flush()


def _show(widget: widgets.Widget, shown: bool) -> None:
    widget.layout.display = None if shown else "none"


def _help(field: dataclasses.Field, fault: str = "") -> str:
    return f"<div style='{_DENSE}'>{html.escape(field.metadata['help'])}{fault}</div>"


def _shown(value: Any, kind: type[widgets.Widget]) -> Any:
    """A value as its widget shows it: 2e-06 stays text that looks like a learning rate."""
    if issubclass(kind, widgets.Checkbox):
        return value is not None and coerce(value, bool)
    if issubclass(kind, widgets.Dropdown):
        return {None: "", True: "on", False: "off"}.get(value, value)
    if issubclass(kind, widgets.Textarea):
        return "\n".join(map(str, (value,) if isinstance(value, (str, int, float)) else value or ()))
    return "" if value is None else str(value)
