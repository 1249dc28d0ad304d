"""The captions of a folder, edited: every change is on the disk at once, and every change can be taken back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from dbkit.captions import caption_bytes, caption_file, read_caption
from dbkit.errors import DbkitError, some
from dbkit.files import whole_file
from dbkit.images import list_images
from dbkit.report import backgrounds


@dataclass(frozen=True)
class _Edit:
    """One text file, as bytes before and after a change; None where there was no file."""

    path: Path
    before: bytes | None
    after: bytes


class Captions:
    """The images directly in a folder, by name, with their captions as they are on the disk at the moment.

    Captions are one line. An emptied one stays as an empty file: training and reports call it missing, as they do
    without a file, but neither a text of the same name nor the next prepare_dataset() puts another in its place.
    """

    def __init__(self, folder: str | Path):
        """Raises DbkitError when the folder has no images."""
        self.folder = Path(folder)
        paths = list_images(self.folder) if self.folder.is_dir() else []
        if not paths:
            raise DbkitError(f"there are no images in {folder}; name the folder whose captions you want to edit")
        self._images = {path.name: path for path in paths}
        self._readers = Counter(_key(text) for path in paths for text in _candidates(path))
        self._history: list[list[_Edit]] = []

    @property
    def names(self) -> list[str]:
        """The names of the images, sorted."""
        return list(self._images)

    @property
    def unreadable(self) -> dict[str, str]:
        """The images whose caption cannot be read, each with the reason. Changes of the whole set pass them by."""
        reasons = {}
        for name in self._images:
            try:
                self.text(name)
            except DbkitError as error:
                reasons[name] = str(error)
        return reasons

    def image(self, name: str) -> Path:
        """The file of an image."""
        if name not in self._images:
            raise DbkitError(f"there is no image {name} in {self.folder}; take one of names")
        return self._images[name]

    def text(self, name: str) -> str | None:
        """The caption of an image; None if it has none. Raises DbkitError if it cannot be read."""
        return read_caption(self.image(name))

    def set(self, name: str, text: str) -> bool:
        """Give an image a caption, also in place of an unreadable one. Returns whether anything changed."""
        image, text = self.image(name), _one_line(text)
        self._require_there([image])
        try:
            before = self.text(name) or ""
        except DbkitError:
            before = None
        return before != text and bool(self._change([(self._target(image), text)]))

    def replace(self, find: str, replacement: str) -> int:
        """Replace a piece of text, upper and lower case told apart, in all captions. Returns how many changed."""
        if not find:
            raise DbkitError("the text to find is empty; write what is to be replaced")
        return self._change_all(lambda text: text.replace(find, replacement))

    def add(self, text: str, *, before: bool) -> int:
        """Put text before or after every caption; an image without one gets it alone. Returns how many changed.

        A space goes between, but not before a comma or another mark. Images that show a background alone, by the
        report of prepare_dataset(), are passed by: what is added to all is about the subject.
        """
        added = _one_line(text)
        if not added:
            raise DbkitError("the text to add is empty; write what is to stand before or after each caption")
        if before:
            return self._change_all(lambda text: f"{added} {text}", backgrounds(self.folder))
        return self._change_all(
            lambda text: f"{text}{'' if added[0] in ',.;:!?' else ' '}{added}", backgrounds(self.folder)
        )

    def undo(self) -> int:
        """Take back the last change, exactly; one of the whole set as one. Returns how many texts it had changed.

        Returns 0 when there is nothing to take back. Raises DbkitError, with nothing taken back, when a text is no
        longer what the change made of it: that text is left out, and the next undo takes back the rest.
        """
        if not self._history:
            return 0
        self._require_there()
        edits = self._history[-1]
        if foreign := [edit for edit in edits if _content(edit.path) != edit.after]:
            self._history[-1:] = filter(None, [[edit for edit in edits if edit not in foreign]])
            raise DbkitError(
                f"someone changed {', '.join(edit.path.name for edit in foreign)} since; that stays, and nothing was "
                "taken back yet: undo again for what remains"
            )
        _write_all([(edit.path, edit.before, edit.after) for edit in edits])
        del self._history[-1]
        return len(edits)

    def _change_all(self, change: Callable[[str], str], but: Collection[str] = ()) -> int:
        changes = []
        self._require_there(image for name, image in self._images.items() if name not in but)
        for name, image in self._images.items():
            if name in but:
                continue
            try:
                text = self.text(name) or ""
            except DbkitError:
                continue
            if (new := _one_line(change(text))) != text:
                changes.append((self._target(image), new))
        return self._change(changes)

    def _change(self, changes: list[tuple[Path, str]]) -> int:
        edits = [_Edit(path, _content(path), caption_bytes(text, path)) for path, text in changes]
        _write_all([(edit.path, edit.after, edit.before) for edit in edits])
        if edits:
            self._history.append(edits)
        return len(edits)

    def _require_there(self, images: Iterable[Path] = ()) -> None:
        """Raise DbkitError where the folder or a picture was renamed or deleted: a text would lie there alone."""
        gone = [path.name for path in images if not path.is_file()] if self.folder.is_dir() else [str(self.folder)]
        if gone:
            raise DbkitError(f"no longer there: {some(gone)}; nothing was changed, so run the cell again")

    def _target(self, image: Path) -> Path:
        """Where a new text goes: to dog.txt, but to dog.png.txt if that is there or dog.jpg reads dog.txt too."""
        exact, short = _candidates(image)
        if caption_file(image) == exact or self._readers[_key(short)] > 1:
            return exact
        return short


def _candidates(image: Path) -> tuple[Path, Path]:
    """The files that captions.caption_file() looks at, in its order."""
    return image.with_name(f"{image.name}.txt"), image.with_suffix(".txt")


def _key(path: Path) -> str:
    # Windows and macOS do not tell DOG.txt from dog.txt.
    return path.name.casefold()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write_all(contents: list[tuple[Path, bytes | None, bytes | None]]) -> None:
    """Give each file its new content, None for no file; where one fails, those before it get their old one back."""
    for number, (path, new, _) in enumerate(contents):
        try:
            _write(path, new)
        except (OSError, DbkitError) as error:
            for written, _, old in contents[:number]:
                _write(written, old)
            if isinstance(error, DbkitError):
                raise
            raise DbkitError(
                f"{path} cannot be written ({error.strerror or error}), so no text was changed; see what is in its way"
            ) from error


def _write(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as partial:
        partial.write_bytes(content)
