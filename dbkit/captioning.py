"""caption_dataset(): a caption beside each image, as a sentence (BLIP) or as tags (a Danbooru-style tagger)."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbkit.captioners import PINNED, Blip, Tagger, banned_tags
from dbkit.captions import caption_file, read_caption
from dbkit.config import CaptionConfig
from dbkit.errors import DbkitError, counted, some
from dbkit.files import write_text
from dbkit.images import OTHER_SUFFIXES, SUFFIXES, UNREAD, list_images, read_image
from dbkit.report import backgrounds
from dbkit.settings import configured_by, plain

RECORD = ".captions.json"
# In the record: words of a text that dbkit found there. All others are named by the settings that wrote them.
_OWN = "own"


@dataclass(frozen=True)
class CaptionReport:
    """What caption_dataset() wrote, by image; which images it left as they were, found nothing in, and refused."""

    folder: Path
    written: dict[str, str]
    kept: list[str]
    without: list[str]
    refused: dict[str, str]
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return f"{self.note}: {self.folder}"
        counts = f"{counted(len(self.written), 'caption')} written, {len(self.kept)} kept, {len(self.without)} without"
        lines = [f"{counts}, {len(self.refused)} refused: {self.folder}"]
        lines += [f"  {name}: {text}" for name, text in list(self.written.items())[:5]]
        if self.kept:
            lines.append(f"  kept: {some(self.kept)}; empty a text to have it written anew")
        if self.without:
            lines.append(f"  nothing was found in {some(self.without)}; their texts are as they were")
        return "\n".join([*lines, *(f"  refused: {reason}" for reason in self.refused.values())])


@configured_by(CaptionConfig)
def caption_dataset(config: CaptionConfig) -> CaptionReport:
    """Write a .txt beside each image directly in the folder, and say what happened to each image.

    The file is the one that is there (dog.png.txt or dog.txt), else dog.txt; where two images share the name dog, it is
    dog.png.txt. The text is one line of UTF-8; what is joined is joined by commas.

    Stopped at any moment, it continues where it was: a hidden file, .captions.json, says for each image what its text
    was, what it became, and which settings' words are in it. No settings write into one text twice, whatever other
    settings added meanwhile: a second run does nothing, and what you edited after the first stays. To have a caption
    made anew, empty or delete its text. Settings that differ in `existing`, `batch_size` or `device` alone count as the
    same; but `replace` still replaces a text that has other words in it.

    Raises DbkitError, before anything is loaded, when there is no image.
    """
    paths, refused = _images(config.folder)
    if config.captioner == "none":
        return CaptionReport(
            config.folder, {}, [], [], refused, "no captioner is chosen, so all texts are as they were"
        )
    record = _Record.read(config)
    jobs, kept = _plan(paths, config, record, refused)
    report = CaptionReport(config.folder, {}, kept, [], refused)
    if jobs:
        captioner = Blip(config) if config.captioner == "blip" else Tagger(config)
        _caption(jobs, captioner, config, record, report)
    return report


def _images(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The images, and those of kinds that are not read, with the reason."""
    if not folder.is_dir():
        raise DbkitError(f"folder {folder} is not a folder; check the path, or make it with dbkit prepare")
    others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in OTHER_SUFFIXES)
    paths = list_images(folder)
    if not paths:
        below = sorted({path.parent for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES})
        hint = f"there are some in {below[0]}: name that folder" if below else "put your pictures there"
        raise DbkitError(f"there are no images in folder {folder}; {UNREAD.format(some(others)) if others else hint}")
    return paths, {name: UNREAD.format(name) for name in others}


@dataclass(frozen=True)
class _Job:
    """An image to caption: the file that its text goes to, the text that is there, and whose words that is."""

    path: Path
    target: Path
    before: str
    by: tuple[str, ...]


@dataclass(frozen=True)
class _Record:
    """What .captions.json says: the settings by their keys, and of each image its text before and now, and whose it is.

    images is {name: {"before": state, "now": state}}, a state {"text": str, "by": [key or _OWN]}.
    """

    path: Path
    key: str
    settings: dict[str, dict[str, Any]]
    images: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, config: CaptionConfig) -> _Record:
        """The record of a folder, with the key of these settings."""
        facts = _facts(config)
        path, key = config.folder / RECORD, hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        if not path.exists():
            return cls(path, key, {key: facts}, {})
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            states = [entry[when] for entry in there["images"].values() for when in ("before", "now")]
            if not all(isinstance(state["text"], str) and isinstance(state["by"], list) for state in states):
                raise ValueError("an entry has another form")
            return cls(path, key, {**there["settings"], key: facts}, there["images"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DbkitError(
                f"{path} is damaged or not dbkit's ({error}); delete it, and every text there counts as your own"
            ) from error

    def authors(self, name: str, text: str) -> tuple[str, ...]:
        """Whose words an image's text is."""
        entry = self.images.get(name)
        if not text or entry is None:
            return (_OWN,) if text else ()
        before, now = entry["before"], entry["now"]
        # A run that was killed between the record and the text left the text as it was. A text that is neither was
        # edited since.
        return tuple(before["by"] if text == before["text"] != now["text"] else now["by"])

    def write(self, texts: dict[_Job, str], replace: bool) -> None:
        """Write itself, then the texts: after a kill in between they are still those of before."""
        for job, text in texts.items():
            now = {"text": text, "by": [self.key] if replace else [*job.by, self.key]}
            self.images[job.path.name] = {"before": {"text": job.before, "by": job.by}, "now": now}
        facts = {"settings": self.settings, "images": self.images}
        write_text(self.path, json.dumps(facts, indent=1, ensure_ascii=False))
        for job, text in texts.items():
            write_text(job.target, text + "\n")


def _facts(config: CaptionConfig) -> dict[str, Any]:
    """The settings that a new caption depends on."""
    names = ("max_new_tokens", "num_beams") if config.captioner == "blip" else ("threshold", "underscores", "escape")
    facts = {name: plain(config)[name] for name in ("captioner", "model", "prefix", *names)}
    facts["model"] = config.model or "@".join(PINNED[config.captioner])
    return facts if config.captioner == "blip" else {**facts, "blacklist": sorted(banned_tags(config))}


def _plan(
    paths: list[Path], config: CaptionConfig, record: _Record, refused: dict[str, str]
) -> tuple[list[_Job], list[str]]:
    """The images to caption, and the names of those that stay as they are; texts that cannot be read are refused."""
    # a.txt would belong to a.jpg and a.png both, and a.jpg.txt to a.jpg and to an image that is called a.jpg.png.
    claims = Counter(name.casefold() for path in paths for name in (path.stem, path.name))
    jobs, kept = [], []
    apart = backgrounds(config.folder)
    for path in paths:
        if path.name in apart:
            kept.append(path.name)  # its caption must not get the subject's prefix or name
            continue
        try:
            text = read_caption(path) or ""
        except DbkitError as error:
            refused[path.name] = str(error)
            continue
        by = record.authors(path.name, text)
        done = record.key in by or (text and config.existing == "keep")
        if by == (record.key,) if config.existing == "replace" else done:
            kept.append(path.name)
            continue
        shared = claims[path.stem.casefold()] > 1
        target = None if shared else caption_file(path) or path.with_suffix(".txt")
        jobs.append(_Job(path, target or path.with_name(f"{path.name}.txt"), text, by))
    return jobs, kept


def _caption(
    jobs: list[_Job], captioner: Blip | Tagger, config: CaptionConfig, record: _Record, report: CaptionReport
) -> None:
    """Caption the images and report on each; every batch is on the disk before the next one begins."""
    from tqdm import tqdm

    with tqdm(total=len(jobs), desc="captions", file=sys.stdout, mininterval=1) as bar:
        for first in range(0, len(jobs), config.batch_size):
            batch = jobs[first : first + config.batch_size]
            pixels = {}
            for job in batch:
                try:
                    pixels[job] = captioner.pixels(read_image(job.path))
                except DbkitError as error:
                    report.refused[job.path.name] = str(error)
            captions = dict(zip(pixels, captioner(list(pixels.values())) if pixels else []))
            # A text that someone wrote meanwhile is theirs, whatever is asked of those that were there.
            changed = [job for job in captions if _now(job) != job.before]
            report.kept.extend(job.path.name for job in changed)
            captions = {job: caption for job, caption in captions.items() if job not in changed}
            texts = {job: _text(job, caption, config) for job, caption in captions.items() if caption}
            if texts:
                record.write(texts, replace=config.existing == "replace")
            report.written.update((job.path.name, text) for job, text in texts.items())
            report.without.extend(job.path.name for job in captions if job not in texts)
            bar.update(len(batch))


def _now(job: _Job) -> str | None:
    """The text that is there now; None if it can no longer be read."""
    try:
        return read_caption(job.path) or ""
    except DbkitError:
        return None


def _text(job: _Job, caption: str, config: CaptionConfig) -> str:
    """The caption after the prefix, and with the text that was there, on one line."""
    parts = [config.prefix, caption]
    if config.existing == "append":
        parts = [job.before, *parts]
    elif config.existing == "prepend":
        parts = [*parts, job.before]
    # A part that ends with a comma, as lists of tags may, gets no second one.
    return ", ".join(filter(None, (" ".join(part.split()).strip(" ,") for part in parts)))
