"""prepare_dataset(): whatever photographs people have become training-ready images and a report."""

from __future__ import annotations

import contextlib
import html
import itertools
import json
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit.captions import caption_file, read_caption
from dbkit.config import PrepareConfig
from dbkit.errors import DbkitError
from dbkit.files import full_disk_is_a_sentence, safe_name, sha256, whole_file, write_text
from dbkit.images import OTHER_SUFFIXES, SUFFIXES, UNREAD, crop_place, is_hidden, read_image, square
from dbkit.settings import configured_by

if TYPE_CHECKING:
    from PIL import Image

REPORT = "report.json"
# Photographs are at most a few MB each; a zip that unpacks to more than this is not a photo collection.
MAX_UNPACKED = 20 * 10**9


@dataclass(frozen=True)
class Kept:
    """One prepared image: its new name, where it came from, its size before, and the share of it that the crop kept."""

    file: str
    source: str
    width: int
    height: int
    kept: float
    enlarged: bool
    caption: str | None
    sha256: str
    # The caption as it came; where the one beside the image differs, someone edited it.
    caption_before: str | None = None


@dataclass(frozen=True)
class DatasetReport:
    """What prepare_dataset() kept, cropped and refused, and why. Shows itself as a table in a notebook."""

    folder: Path
    kept: list[Kept]
    refused: dict[str, str]

    @property
    def captions(self) -> int:
        """How many images have a caption."""
        return sum(bool(image.caption) for image in self.kept)

    def __str__(self) -> str:
        lines = [f"{len(self.kept)} images, {self.captions} captions, {len(self.refused)} refused: {self.folder}"]
        lines += [f"  {image.source}: {note}" for image in self.kept if (note := _note(image))]
        lines += [f"  refused: {reason}" for reason in self.refused.values()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            f'<tr><td><img src="data:image/jpeg;base64,{_thumbnail(self.folder / image.file)}"></td>'
            f"<td>{html.escape(image.source)}<br>{_note(image)}</td><td>{html.escape(image.caption or '')}</td></tr>"
            for image in self.kept
        ]
        rows += [f"<tr><td>refused</td><td colspan=2>{html.escape(why)}</td></tr>" for why in self.refused.values()]
        head = "<tr><th>as the model sees it</th><th>from</th><th>caption</th></tr>"
        return f"<p>{html.escape(str(self).splitlines()[0])}</p><table>{head}{''.join(rows)}</table>"


def _note(image: Kept) -> str:
    notes = [f"{image.width} x {image.height}"]
    if image.kept < 0.995:
        notes.append(f"the crop keeps {image.kept:.0%}")
    if image.enlarged:
        notes.append("enlarged, so it will look soft: a larger original is better")
    return ", ".join(notes) if len(notes) > 1 else ""


def _thumbnail(path: Path) -> str:
    import base64
    import io

    buffer = io.BytesIO()
    square(read_image(path), 96).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


@configured_by(PrepareConfig)
def prepare_dataset(config: PrepareConfig) -> DatasetReport:
    """Turn a folder or zip of photographs into training-ready PNG files of one size, and say what happened to each.

    Orientation is honoured, alpha is flattened on white, nothing is stretched, captions come along and the source is
    never changed. Run again, it brings the destination up to date; captions edited there are kept. Writes
    report.json. Raises DbkitError when no image is usable.
    """
    with _unpacked(config.source) as source:
        _check_folders(source, config.destination)
        found = _find_images(source)
        refused = {name: UNREAD.format(name) for name in _other_images(source)}
        if not found:
            hint = "; ".join(refused.values()) or f"put 5 to 20 photographs there ({', '.join(sorted(SUFFIXES))})"
            raise DbkitError(f"there are no images in {config.source}; {hint}")
        kept: list[Kept] = []
        config.destination.mkdir(parents=True, exist_ok=True)
        earlier, planned = _earlier(config.destination)
        names = _stable_names(source, found, config.destination, planned)
        came = {image.file: image.caption_before for image in earlier}
        for path in found:
            relative, target = path.relative_to(source).as_posix(), config.destination / names[path]
            try:
                image, new = _usable(path), read_caption(path) or config.default_caption
                edited = caption_file(target) is not None and read_caption(target) != came.get(target.name)
            except DbkitError as error:
                refused[relative] = str(error)
                continue
            if not kept:
                # From the first image on the folder and its names are known to be dbkit's own, also after a kill.
                planned |= {path.relative_to(source).as_posix(): name for path, name in names.items()}
                _write_report(DatasetReport(config.destination, earlier, {}), config.resolution, planned)
            kept.append(_prepare_one(image, new, edited, relative, target, config))
    if not kept:
        raise DbkitError(
            f"none of the {len(refused)} images in {config.source} is usable: {'; '.join(refused.values())}"
        )
    _remove_stale(config.destination, earlier, kept)
    report = DatasetReport(config.destination, kept, refused)
    _write_report(report, config.resolution)
    return report


def _write_report(report: DatasetReport, resolution: int, planned: dict[str, str] | None = None) -> None:
    facts = {"resolution": resolution, "images": [asdict(image) for image in report.kept], "refused": report.refused}
    facts |= {"planned": planned} if planned else {}
    write_text(report.folder / REPORT, json.dumps(facts, indent=1, ensure_ascii=False))


def _earlier(destination: Path) -> tuple[list[Kept], dict[str, str]]:
    """What the last run made here, by its report, and the names that photographs have been given."""
    path = destination / REPORT
    if not path.exists():
        return [], {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        # Names of pictures only, so that no report can point outside its folder.
        images = [replace(image, file=_picture(image.file)) for image in (Kept(**image) for image in facts["images"])]
        planned = {str(source): _picture(name) for source, name in facts.get("planned", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DbkitError(f"{path} is damaged or not made by dbkit; choose a new folder as destination") from error
    return images, {image.source: image.file for image in images} | planned


def _picture(name: str) -> str:
    if Path(name).suffix != ".png":
        raise ValueError(name)
    return Path(name).name


def _check_folders(source: Path, destination: Path) -> None:
    if source.is_file() and source.suffix.lower() in SUFFIXES:
        raise DbkitError(f"{source} is one picture; give the folder that it is in")
    if not source.is_dir():
        raise DbkitError(f"there is no folder or .zip {source}; check the path")
    inside, outside = destination.resolve(), source.resolve()
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise DbkitError(f"{destination} and {source} lie in one another; choose a destination elsewhere")
    if destination.exists() and not destination.is_dir():
        raise DbkitError(f"{destination} is a file; choose a folder as destination")
    if destination.is_dir() and not (destination / REPORT).exists():
        names = sorted(path.name for path in destination.iterdir())
        strangers = [name for name in names if not is_hidden(Path(name)) and not name.endswith(".partial")]
        if strangers:
            raise DbkitError(f"{destination} holds files that dbkit did not make ({strangers[0]}); choose a new folder")


@contextlib.contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    """The source folder; a zip's images and captions are unpacked into a temporary folder for the time of the block."""
    if not (source.is_file() and source.suffix.lower() == ".zip"):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="dbkit-") as folder:
        try:
            with zipfile.ZipFile(source) as archive, full_disk_is_a_sentence(Path(folder)):
                members = [m for m in archive.infolist() if not m.is_dir() and _is_data(Path(m.filename))]
                if sum(member.file_size for member in members) > MAX_UNPACKED:
                    raise DbkitError(f"{source} unpacks to more than 20 GB; zip only the photographs")
                for member in members:
                    # ZipFile.extract drops drive letters, leading slashes and "..", so nothing lands outside.
                    archive.extract(member, folder)
        except (
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            EOFError,
            OSError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise DbkitError(
                f"{source} cannot be unpacked ({error}); make the zip again, without a password"
            ) from error
        yield Path(folder)


def _is_data(name: Path) -> bool:
    return name.suffix.lower() in {*SUFFIXES, *OTHER_SUFFIXES, ".txt"} and not is_hidden(name)


def _find_images(source: Path) -> list[Path]:
    """Every image below the source, by relative name; clutter left out. Links to folders are not followed."""
    found = (path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(
        (path for path in found if not is_hidden(path.relative_to(source))),
        key=lambda path: path.relative_to(source).as_posix(),
    )


def _other_images(source: Path) -> list[str]:
    """Photographs in formats that are not read yet: named in the report, so that none is missed silently."""
    found = (path.relative_to(source) for path in source.rglob("*") if path.suffix.lower() in OTHER_SUFFIXES)
    return sorted(path.as_posix() for path in found if not is_hidden(path))


def _stable_names(source: Path, found: list[Path], destination: Path, named: dict[str, str]) -> dict[Path, str]:
    """A PNG name for each image that depends on its own relative name, so that adding a photograph renames no other.

    Only where two images would get one name (a.jpg and a.png) do the later ones carry their suffix too; names of an
    earlier run stay.
    """
    names = {path: named[name] for path in found if (name := path.relative_to(source).as_posix()) in named}
    # Pictures that someone else put into the destination keep theirs.
    taken = {
        Path(name).stem.casefold() for name in [*named.values(), *(path.name for path in destination.glob("*.png"))]
    }
    for path in (path for path in found if path not in names):
        # 56 characters of four bytes each, a suffix and ".png.partial" fit into the 255 bytes that a name may have.
        stem = safe_name("-".join(path.relative_to(source).with_suffix("").parts), 56)
        candidates = [stem, f"{stem}-{path.suffix[1:].lower()}"]
        more = (f"{stem}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain(candidates, more) if name.casefold() not in taken)
        taken.add(name.casefold())
        names[path] = f"{name}.png"
    return names


def _usable(path: Path) -> Image.Image:
    image = read_image(path)
    if min(image.size) < 8:
        raise DbkitError(f"{path.name} has {image.width} x {image.height} pixels; too small to learn from")
    return image


def _prepare_one(
    image: Image.Image, caption: str | None, edited: bool, relative: str, target: Path, config: PrepareConfig
) -> Kept:
    place = crop_place(config.center_crop, config.seed, relative)
    with whole_file(target) as partial:
        square(image, config.resolution, place).save(partial, "PNG")
    if caption and not edited:
        write_text(caption_file(target) or target.with_suffix(".txt"), caption + "\n")
    return Kept(
        file=target.name,
        source=relative,
        width=image.width,
        height=image.height,
        kept=min(image.size) / max(image.size),
        enlarged=min(image.size) < config.resolution,
        caption=read_caption(target),
        sha256=sha256(target),
        caption_before=caption,
    )


def _remove_stale(destination: Path, earlier: list[Kept], kept: list[Kept]) -> None:
    """Remove images that an earlier run wrote here and whose photographs are gone; changed files are left alone."""
    current = {image.file for image in kept}
    for image in earlier:
        path = destination / image.file
        if path.name not in current and path.is_file() and sha256(path) == image.sha256:
            path.unlink()
            caption = caption_file(path)
            if caption is not None and read_caption(path) == image.caption_before:
                caption.unlink()
