"""prepare_dataset() and what training reads: checked images, each with its prompt."""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dbkit import draws
from dbkit.captions import caption_file, read_caption
from dbkit.config import PrepareConfig, TrainConfig
from dbkit.errors import DbkitError
from dbkit.files import full_disk_is_a_sentence, safe_name, sha256, whole_file, write_text
from dbkit.images import SUFFIXES, is_hidden, list_images, read_image, square
from dbkit.settings import configured_by

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


@dataclass(frozen=True)
class DatasetReport:
    """What prepare_dataset() kept, cropped and refused, and why. Shows itself as a table in a notebook."""

    folder: Path
    kept: list[Kept]
    refused: dict[str, str]

    @property
    def captions(self) -> int:
        """How many images have a caption."""
        return sum(image.caption is not None for image in self.kept)

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
        if not found:
            kinds = ", ".join(sorted(SUFFIXES))
            raise DbkitError(f"there are no images in {config.source}; put 5 to 20 photographs there ({kinds})")
        kept, refused = [], {}
        config.destination.mkdir(parents=True, exist_ok=True)
        names = _stable_names(source, found)
        for path in found:
            relative = path.relative_to(source).as_posix()
            try:
                kept.append(_prepare_one(path, relative, config.destination / names[path], config))
            except DbkitError as error:
                refused[relative] = str(error)
    if not kept:
        raise DbkitError(
            f"none of the {len(refused)} images in {config.source} is usable: {'; '.join(refused.values())}"
        )
    _remove_stale(config.destination, kept)
    report = DatasetReport(config.destination, kept, refused)
    facts = {"resolution": config.resolution, "images": [asdict(image) for image in kept], "refused": refused}
    write_text(config.destination / REPORT, json.dumps(facts, indent=1, ensure_ascii=False))
    return report


def _check_folders(source: Path, destination: Path) -> None:
    if not source.is_dir():
        raise DbkitError(f"there is no folder or .zip {source}; check the path")
    inside, outside = destination.resolve(), source.resolve()
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise DbkitError(f"{destination} and {source} lie in one another; choose a destination elsewhere")
    if destination.exists() and not destination.is_dir():
        raise DbkitError(f"{destination} is a file; choose a folder as destination")
    if destination.is_dir() and not (destination / REPORT).exists() and any(destination.iterdir()):
        strangers = [path for path in destination.iterdir() if path.suffix not in (".png", ".partial", ".txt")]
        if strangers:
            raise DbkitError(
                f"{destination} holds files that dbkit did not make ({strangers[0].name}); choose a new folder"
            )


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
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
            raise DbkitError(
                f"{source} cannot be unpacked ({error}); make the zip again, without a password"
            ) from error
        yield Path(folder)


def _is_data(name: Path) -> bool:
    return name.suffix.lower() in {*SUFFIXES, ".txt"} and not is_hidden(name)


def _find_images(source: Path) -> list[Path]:
    """Every image below the source, by relative name; clutter left out. Links to folders are not followed."""
    found = (path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(
        (path for path in found if not is_hidden(path.relative_to(source))),
        key=lambda path: path.relative_to(source).as_posix(),
    )


def _stable_names(source: Path, found: list[Path]) -> dict[Path, str]:
    """A PNG name for each image that depends on its own relative name, so that adding a photograph renames no other.

    Only where two images would get one name (a.jpg and a.png) do the later ones carry their suffix too.
    """
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in found:
        stem = safe_name("-".join(path.relative_to(source).with_suffix("").parts))
        candidates = [stem, f"{stem}-{path.suffix[1:].lower()}", *(f"{stem}-{number}" for number in range(2, 1000))]
        name = next(name for name in candidates if name.casefold() not in taken)
        taken.add(name.casefold())
        names[path] = f"{name}.png"
    return names


def _prepare_one(path: Path, relative: str, target: Path, config: PrepareConfig) -> Kept:
    image = read_image(path)
    if min(image.size) < 8:
        raise DbkitError(f"{path.name} has {image.width} x {image.height} pixels; too small to learn from")
    place = crop_place(config.center_crop, config.seed, relative)
    with whole_file(target) as partial:
        square(image, config.resolution, place).save(partial, "PNG")
    caption = _carry_caption(path, target, config.default_caption)
    return Kept(
        file=target.name,
        source=relative,
        width=image.width,
        height=image.height,
        kept=min(image.size) / max(image.size),
        enlarged=min(image.size) < config.resolution,
        caption=caption,
        sha256=sha256(target),
    )


def crop_place(center_crop: bool, seed: int, name: str) -> tuple[float, float]:
    """Where the square lies in an image: the centre, or a place that depends on the seed and the image's name alone."""
    if center_crop:
        return 0.5, 0.5
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    x, y = draws.generator(seed, "crop", sample=number).random(2)
    return float(x), float(y)


def _carry_caption(path: Path, target: Path, default: str | None) -> str | None:
    """Write the caption beside the prepared image, unless one is there already: it may have been edited."""
    if caption_file(target) is None and (caption := read_caption(path) or default):
        write_text(target.with_suffix(".txt"), caption + "\n")
    return read_caption(target)


def _remove_stale(destination: Path, kept: list[Kept]) -> None:
    """Remove images that an earlier run wrote here and whose photographs are gone; changed files are left alone."""
    report = destination / REPORT
    if not report.exists():
        return
    current = {image.file for image in kept}
    for image in json.loads(report.read_text(encoding="utf-8"))["images"]:
        path = destination / Path(image["file"]).name
        if path.name not in current and path.is_file() and sha256(path) == image["sha256"]:
            path.unlink()
            caption = caption_file(path)
            if caption is not None and read_caption(path) == image["caption"]:
                caption.unlink()


@dataclass(frozen=True)
class Example:
    """One training image: checked, not held in memory. sha256 is that of the file."""

    path: Path
    prompt: str
    place: tuple[float, float]
    sha256: str


def instance_examples(config: TrainConfig) -> list[Example]:
    """The instance images with their resolved prompts. Every image is decoded once here, before any model is loaded.

    Raises DbkitError naming all unreadable images, or all images without a caption, at once.
    """
    paths = _training_images(config.instance_data_dir, "instance_data_dir")
    if config.use_txt_as_label:
        prompts = {path: read_caption(path) for path in paths}
        if missing := [path.name for path, prompt in prompts.items() if not prompt]:
            raise DbkitError(
                f"{len(missing)} of {len(paths)} images in {config.instance_data_dir} have no caption "
                f"({_some(missing)}); "
                "write a .txt file of the same name beside each (notebook 3 helps)"
            )
    elif config.use_filename_as_label:
        prompts = {path: path.stem for path in paths}
    else:
        prompts = dict.fromkeys(paths, config.instance_prompt)
    return _checked_examples(paths, prompts, config)


def class_examples(config: TrainConfig, folder: Path) -> list[Example]:
    """The class images, each with the class prompt, checked like the instance images."""
    paths = _training_images(folder, "class_data_dir")
    return _checked_examples(paths, dict.fromkeys(paths, config.class_prompt), config)


def _training_images(folder: Path, name: str) -> list[Path]:
    if not folder.is_dir():
        raise DbkitError(f"{name} {folder} is not a folder; check the path, or make it with dbkit prepare")
    paths = list_images(folder)
    if not paths:
        below = sorted({path.parent for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES})
        hint = f"there are some in {below[0]}: name that folder" if below else "put 5 to 20 photographs there"
        raise DbkitError(f"there are no images in {name} {folder}; {hint}")
    return paths


def _checked_examples(paths: list[Path], prompts: dict[Path, str], config: TrainConfig) -> list[Example]:
    examples, unreadable = [], []
    for path in paths:
        try:
            read_image(path)
        except DbkitError as error:
            unreadable.append(str(error))
        else:
            place = crop_place(config.center_crop, config.seed, path.name)
            examples.append(Example(path, prompts[path], place, sha256(path)))
    if unreadable:
        raise DbkitError(f"{len(unreadable)} of {len(paths)} images are not usable: {_some(unreadable)}")
    return examples


def _some(items: list[str], most: int = 5) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def fingerprint(examples: list[Example]) -> str:
    """A hash of what training sees of the data: image bytes, prompts, crops and their order, but not where they lie."""
    facts = [(example.sha256, example.prompt, example.place) for example in examples]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
