"""The captions of a folder beside their pictures, for notebooks: a view of edits.Captions.

Only core widgets, in the interface that ipywidgets 7.7 (Colab) and 8 share.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets

from dbkit.edits import Captions
from dbkit.errors import DbkitError, counted
from dbkit.images import jpeg, thumbnail
from dbkit.train_summary import red

# Pictures at once: the browser gets each as a file of its own, and 200 would flood it.
PER_PAGE = 12
# Longest side of a picture, in pixels.
SIDE = 160


def caption_editor(folder: str | Path) -> CaptionEditor:
    """Pictures and captions of a folder, twelve a page. A text is saved when its field is left.

    Raises DbkitError when the folder has no images.
    """
    return CaptionEditor(Captions(folder))


class CaptionEditor(widgets.VBox):
    """Show it as the last line of a cell."""

    def __init__(self, captions: Captions) -> None:
        self._captions, self._page = captions, 0
        self._thumbnails: dict[str, bytes] = {}
        self._boxes: dict[str, widgets.Textarea] = {}
        self._find, self._replacement = _line("find"), _line("replace with")
        self._replace = self._button("Replace in all", self._replace_all)
        self._added = _line("text for all captions")
        self._before = self._button("Put before", lambda: self._add(before=True))
        self._after = self._button("Put after", lambda: self._add(before=False))
        self._undo = self._button("Undo", self._take_back)
        self._previous = self._button("Previous", lambda: self._turn(-1))
        self._next = self._button("Next", lambda: self._turn(1))
        self._place, self._message = widgets.HTML(), widgets.HTML()
        self._rows = widgets.VBox()
        super().__init__(
            [
                widgets.HBox([self._find, self._replacement, self._replace]),
                widgets.HBox([self._added, self._before, self._after]),
                widgets.HBox([self._undo, self._message]),
                widgets.HBox([self._previous, self._place, self._next]),
                self._rows,
            ]
        )
        self._show()

    def _button(self, description: str, action: Callable[[], str]) -> widgets.Button:
        """A button that says what its action says, and then shows the texts as they are."""
        button = widgets.Button(description=description)
        button.on_click(lambda _: self._report(action, show=True))
        return button

    def _report(self, action: Callable[[], str], show: bool) -> None:
        # In a notebook an exception of a callback is lost in a log.
        try:
            self._message.value = html.escape(action())
        except (DbkitError, OSError) as error:
            self._message.value = red(str(error))
        if show:
            self._show()

    def _replace_all(self) -> str:
        return _changed(self._captions.replace(self._find.value, self._replacement.value))

    def _add(self, before: bool) -> str:
        return _changed(self._captions.add(self._added.value, before=before))

    def _take_back(self) -> str:
        count = self._captions.undo()
        return f"taken back: {_changed(count)}" if count else "nothing to take back"

    def _turn(self, pages: int) -> str:
        last = (len(self._captions.names) - 1) // PER_PAGE
        self._page = min(max(0, self._page + pages), last)
        return ""

    def _show(self) -> None:
        """Fill the page with new rows: a field that got a new value from here would save it."""
        names, old = self._captions.names, self._rows.children
        first = self._page * PER_PAGE
        shown = names[first : first + PER_PAGE]
        self._boxes = {}
        self._rows.children = [self._row(name) for name in shown]
        self._place.value = f"{first + 1} to {first + len(shown)} of {len(names)}"
        self._previous.disabled = first == 0
        self._next.disabled = first + len(shown) == len(names)
        for row in old:
            _close(row)

    def _row(self, name: str) -> widgets.HBox:
        title = f"<b>{html.escape(name)}</b>"
        try:
            text, hint = self._captions.text(name) or "", "no caption yet"
        except DbkitError as error:
            text, hint = "", "what is written here replaces the unreadable text"
            title += "<br>" + red(str(error))
        box = widgets.Textarea(
            value=text, placeholder=hint, continuous_update=False, layout=widgets.Layout(width="460px", height="90px")
        )
        box.observe(lambda change: self._report(lambda: self._save(name, change["new"]), show=False), "value")
        self._boxes[name] = box
        return widgets.HBox([self._picture(name), widgets.VBox([widgets.HTML(title), box])])

    def _save(self, name: str, text: str) -> str:
        return f"{name}: {'saved' if self._captions.set(name, text) else 'unchanged'}"

    def _picture(self, name: str) -> widgets.Widget:
        frame = widgets.Layout(width=f"{SIDE + 20}px")
        try:
            if name not in self._thumbnails:
                self._thumbnails[name] = jpeg(thumbnail(self._captions.image(name), SIDE))
        except DbkitError as error:
            return widgets.HTML(red(str(error)), layout=frame)
        # An image as wide as its frame would be stretched.
        return widgets.HBox([widgets.Image(value=self._thumbnails[name], format="jpeg")], layout=frame)


def _line(placeholder: str) -> widgets.Text:
    return widgets.Text(placeholder=placeholder, layout=widgets.Layout(width="230px"))


def _close(widget: widgets.Widget) -> None:
    for child in getattr(widget, "children", ()):
        _close(child)
    widget.close()


def _changed(count: int) -> str:
    return f"{counted(count, 'text')} changed"
