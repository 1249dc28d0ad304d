"""prepare_dataset(): whatever photographs people have become training-ready images and a report."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit.buckets import bucket_sizes, kept_share, nearest, usual_limits
from dbkit.captions import caption_file, read_caption
from dbkit.config import PrepareConfig
from dbkit.doctor import Finding, examine
from dbkit.errors import DbkitError
from dbkit.faces import Box, background_box, face_place, head_box, largest_face
from dbkit.files import one_process, safe_name, sha256, whole_file, write_text
from dbkit.images import (
    SUFFIXES,
    View,
    crop_place,
    is_hidden,
    list_images,
    read_image,
    read_usable,
    render,
    usable_mask,
)
from dbkit.measures import Measures, fingerprint, measure
from dbkit.report import (
    REPORT,
    DatasetReport,
    Kept,
    earlier,
    note_written,
    prepared_from,
    write_contact_sheet,
    write_report,
)
from dbkit.settings import configured_by
from dbkit.sources import Source, opened
from dbkit.tokenizer import model_tokenizer

if TYPE_CHECKING:
    from PIL import Image


@configured_by(PrepareConfig)
def prepare_dataset(config: PrepareConfig) -> DatasetReport:
    """Turn a folder or zip of photographs into training-ready PNG files, and say what is wrong with each.

    Orientation is honoured, alpha is flattened on white, nothing is stretched, captions come along and the source is
    never changed. Run again, it brings the destination up to date; captions edited there are kept. Writes report.json
    and report/contact_sheet.jpg. Raises DbkitError when no image is usable.
    """
    count_tokens = _token_counter(config.pretrained_model_name_or_path)
    _check_folders(config.source, config.destination)
    with opened(config.source) as source, one_process(config.destination.absolute()):
        if not source.images:
            hints = [*source.refused.values(), *(f"{name} is {why}" for name, why in source.ignored.items())]
            hints.append(f"put 5 to 20 photographs there ({', '.join(sorted(SUFFIXES))})")
            raise DbkitError(f"there are no images in {config.source}; {'; '.join(hints)}")
        measures, captions = _look(source, config)
        findings, left_out = _judge(measures, captions, count_tokens, config)
        chosen = [path for path in source.images if _name(source, path) in measures.keys() - left_out.keys()]
        if not chosen:
            reasons = [*source.refused.values(), *left_out.values()]
            raise DbkitError(
                f"none of the {len(source.images)} images in {config.source} is usable: {'; '.join(reasons)}"
            )
        kept = _prepare(source, chosen, captions, config)
        findings += _faceless(kept, config)
        report = DatasetReport(config.destination, kept, source.refused, findings, left_out, source.ignored)
        write_report(report, config.resolution, source=config.source.absolute())
        write_contact_sheet(report)
    return report


def _name(source: Source, path: Path) -> str:
    return path.relative_to(source.folder).as_posix()


def _token_counter(name: str | None) -> Callable[[str], int] | None:
    """Counts the tokens of a text on a model's own tokenizer, without the start and end marks."""
    if not name:
        return None
    tokenizer = model_tokenizer(name)
    return lambda text: len(tokenizer(text).input_ids) - 2


def _class_hashes(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise DbkitError(f"class_data_dir {folder} is not a folder; check the path, or leave it empty")
    return {path.name: fingerprint(read_image(path)) for path in list_images(folder)}


def _look(source: Source, config: PrepareConfig) -> tuple[dict[str, Measures], dict[str, str | None]]:
    """Decode every image once, measure it and read its caption. What cannot be used goes into source.refused."""
    from tqdm import tqdm

    measures, captions = {}, {}
    default = " ".join((config.default_caption or "").split()) or None
    for path in tqdm(source.images, "looking", file=sys.stdout, mininterval=1, leave=False):
        name = _name(source, path)
        try:
            caption, image = read_caption(path), read_usable(path)
            usable_mask(path, image.size)
        except DbkitError as error:
            source.refused[name] = str(error)
            continue
        captions[name] = caption or default or caption
        measures[name] = measure(image, text=config.look_for_text)
    return measures, captions


def _judge(
    measures: dict[str, Measures],
    captions: dict[str, str | None],
    count_tokens: Callable[[str], int] | None,
    config: PrepareConfig,
) -> tuple[list[Finding], dict[str, str]]:
    """The findings on the images that are used, and those that leave_out leaves out, each with why."""
    look = functools.partial(
        examine,
        resolution=config.resolution,
        method=config.method,
        cropped=config.framing != "none",
        count_tokens=count_tokens,
        class_images=_class_hashes(config.class_data_dir),
    )
    left_out: dict[str, str] = {}
    findings = look(measures, captions)
    for finding in findings:
        if finding.image and finding.check in config.leave_out:
            before = f"{left_out[finding.image]}; " if finding.image in left_out else ""
            left_out[finding.image] = before + finding.says
    if left_out:
        # What is said of the set is about what is left of it.
        findings = look({name: seen for name, seen in measures.items() if name not in left_out}, captions)
    return findings, left_out


def _prepare(source: Source, chosen: list[Path], captions: dict[str, str | None], config: PrepareConfig) -> list[Kept]:
    """Write the chosen images and their captions, then remove those of earlier runs whose photographs are gone."""
    from tqdm import tqdm

    folder = config.destination
    folder.mkdir(parents=True, exist_ok=True)
    before, planned = earlier(folder)
    hashes = {path: sha256(path) for path in chosen}
    _check_same_set(before, set(hashes.values()), config)
    own = {path.name for path in folder.glob("*.png")} - {image.file for image in before}
    names = _stable_names(source, chosen, folder, planned)
    # From the first image on the folder and its names are known to be dbkit's own, also after a kill.
    planned |= {_name(source, path): name for path, name in names.items()}
    write_report(DatasetReport(folder, before, {}), config.resolution, planned, config.source.absolute())
    taken, kept = own | set(names.values()), []
    for path in tqdm(chosen, "preparing", file=sys.stdout, mininterval=1, leave=False):
        name, image = _name(source, path), read_image(path)
        face = largest_face(image) if _wants_faces(config) else None
        masks = _masks(path, image.size, face, name, config)
        for part, picture, share in _pictures(image, face, name, config):
            file = names[path] if part == "whole" else _part_name(names[path], part, taken)
            made = Kept(
                file=file,
                source=name,
                width=image.width,
                height=image.height,
                kept=share,
                enlarged=min(image.size) < config.resolution,
                caption=None,
                sha256="",
                caption_before=_part_caption(part, captions[name], config),
                part=part,
                source_sha256=hashes[path],
                faceless=_wants_faces(config) and face is None,
            )
            kept.append(_write(folder, made, picture, masks.get(part), [old for old in before if old.file == file]))
    _remove_stale(folder, before, kept)
    return kept


def _masks(
    path: Path, size: tuple[int, int], face: Box | None, name: str, config: PrepareConfig
) -> dict[str, Image.Image]:
    """The masks of the parts of a photograph, by part, cut as these are; a background shows nothing of the subject."""
    mask = usable_mask(path, size)
    if mask is None:
        return {}
    # Its size may be another one than the picture's.
    cuts = {part: cut for part, cut, _ in _pictures(mask[1].resize(size), face, name, config)}
    return {part: cut for part, cut in cuts.items() if part != "background"}


def _check_same_set(before: list[Kept], hashes: set[str], config: PrepareConfig) -> None:
    """Raise DbkitError where the destination is of other photographs: their captions would go to these by name."""
    known = {image.source_sha256 for image in before}
    source = prepared_from(config.destination)
    if before and source and source != str(config.source.absolute()) and not known & hashes:
        raise DbkitError(
            f"{config.destination} holds images prepared from {source}, and none of them is in {config.source}; choose "
            "a new folder as destination"
        )


def _wants_faces(config: PrepareConfig) -> bool:
    return config.framing == "face" or config.head_crops or bool(config.background_caption)


def _faceless(kept: list[Kept], config: PrepareConfig) -> list[Finding]:
    """Says in which images no face was found, if faces were asked for."""
    names = [image.source for image in kept if image.faceless and image.part == "whole"]
    if not names:
        return []
    instead = "and cut around the centre" if config.framing == "face" else "and has no extra squares"
    return [
        Finding(
            "framing",
            name,
            f"{name} shows no face that OpenCV finds, {instead}; only faces from the front are found",
        )
        for name in names
    ]


def _part_name(whole: str, part: str, taken: set[str]) -> str:
    """A name for a part of an image, which no photograph and no picture of the user's own has."""
    stem = f"{Path(whole).stem}-{part}"
    names = itertools.chain([f"{stem}.png"], (f"{stem}-{number}.png" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _write(folder: Path, made: Kept, picture: Image.Image, mask: Image.Image | None, before: list[Kept]) -> Kept:
    """Write an image, its mask and its caption, unless someone changed them since dbkit did. before are its records."""
    target, data = folder / made.file, _png(picture)
    made = replace(made, sha256=hashlib.sha256(data).hexdigest())
    if before and target.is_file() and sha256(target) not in {made.sha256, *(old.sha256 for old in before)}:
        made = replace(made, sha256=before[-1].sha256, retouched=True)
    mask_file, mask_data = folder / "masks" / made.file, _png(mask) if mask else b""
    mask_before = {old.mask_sha256 for old in before}
    own_mask = not mask_file.is_file() or sha256(mask_file) in mask_before
    if own_mask and mask:
        made = replace(made, mask_sha256=hashlib.sha256(mask_data).hexdigest())
    elif before and not own_mask:
        made = replace(made, mask_sha256=before[-1].mask_sha256)
    note_written(folder, made)
    if not made.retouched:
        with whole_file(target) as partial:
            partial.write_bytes(data)
    if own_mask and mask:
        with whole_file(mask_file) as partial:
            partial.write_bytes(mask_data)
    elif own_mask:
        mask_file.unlink(missing_ok=True)
    _write_caption(target, made.caption_before, {old.caption_before for old in before})
    return replace(made, caption=read_caption(target))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _pictures(
    image: Image.Image, face: Box | None, name: str, config: PrepareConfig
) -> Iterator[tuple[str, Image.Image, float]]:
    """What is made of one photograph: its part, the picture, and the share of the photograph that a crop leaves."""
    square = (config.resolution, config.resolution)
    if config.framing == "none":
        # Twice the resolution is enough for every bucket; more would only take space on Drive.
        scale = min(1.0, 2 * config.resolution / min(image.size))
        size = tuple(max(1, round(side * scale)) for side in image.size)
        yield "whole", image.resize(size) if scale < 1 else image, _bucket_share(image, config.resolution)
    else:
        if config.framing == "face":
            place = face_place(image, face)
        else:
            place = crop_place(config.framing != "random", config.seed, name)
        yield "whole", render(image, square, View(place)), min(image.size) / max(image.size)
    for part, wanted, find in (
        ("head", config.head_crops, head_box),
        ("background", config.background_caption, background_box),
    ):
        if wanted and (box := find(image, face)):
            cut = image.crop(box)
            yield part, render(cut, square), cut.width * cut.height / (image.width * image.height)


def _bucket_share(image: Image.Image, side: int) -> float:
    """The share of a whole image that is trained when the buckets' settings are left as they are."""
    sizes = bucket_sizes(side, *usual_limits(side))
    return kept_share(*image.size, nearest(*image.size, sizes))


def _part_caption(part: str, caption: str | None, config: PrepareConfig) -> str | None:
    """The caption of a part: a head is still the subject, the background is not."""
    if part == "background":
        return config.background_caption
    return f"{caption}, close-up of the face" if part == "head" and caption else caption


def _write_caption(target: Path, caption: str | None, before: set[str | None]) -> None:
    """Bring a caption up to date, unless the one that is there is none of those that dbkit wrote before."""
    there = caption_file(target)
    try:
        edited = there is not None and read_caption(target) not in {*before, caption}
    except DbkitError:
        edited = True
    if caption and not edited:
        write_text(there or target.with_suffix(".txt"), caption + "\n")
    elif there and not caption and not edited and before - {None}:
        there.unlink()


def _check_folders(source: Path, destination: Path) -> None:
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


def _stable_names(source: Source, found: list[Path], destination: Path, named: dict[str, str]) -> dict[Path, str]:
    """A PNG name for each image that depends on its own relative name, so that adding a photograph renames no other.

    Only where two images would get one name (a.jpg and a.png) do the later ones carry their suffix too; names of an
    earlier run stay.
    """
    names = {path: named[name] for path in found if (name := _name(source, path)) in named}
    # Pictures that someone else put into the destination keep theirs.
    taken = {
        Path(name).stem.casefold() for name in [*named.values(), *(path.name for path in destination.glob("*.png"))]
    }
    for path in (path for path in found if path not in names):
        # 56 characters of four bytes each, a suffix and ".png.partial" fit into the 255 bytes that a name may have.
        stem = safe_name("-".join(path.relative_to(source.folder).with_suffix("").parts), 56)
        candidates = [stem, f"{stem}-{path.suffix[1:].lower()}"]
        more = (f"{stem}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain(candidates, more) if name.casefold() not in taken)
        taken.add(name.casefold())
        names[path] = f"{name}.png"
    return names


def _remove_stale(destination: Path, before: list[Kept], kept: list[Kept]) -> None:
    """Remove images that earlier runs wrote here and whose photographs are gone; changed files are left alone."""
    current = {image.file for image in kept}
    for image in before:
        path = destination / image.file
        if path.name not in current and path.is_file() and sha256(path) == image.sha256:
            path.unlink()
            mask = destination / "masks" / image.file
            if mask.is_file() and sha256(mask) == image.mask_sha256:
                mask.unlink()
            with contextlib.suppress(DbkitError):  # a text that cannot be read is not dbkit's
                caption = caption_file(path)
                if caption is not None and read_caption(path) == image.caption_before:
                    caption.unlink()
