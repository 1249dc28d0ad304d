"""The report of a prepared data set: what was kept, cropped, refused and found, as text, table, picture and file."""

from __future__ import annotations

import contextlib
import html
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dbkit.doctor import Finding
from dbkit.errors import DbkitError, counted
from dbkit.files import full_disk_is_a_sentence, whole_file, write_text
from dbkit.images import data_url, thumbnail

if TYPE_CHECKING:
    pass

REPORT = "report.json"
# In a folder of its own, where no training takes it for an image to learn.
CONTACT_SHEET = Path("report") / "contact_sheet.jpg"
# What a run that is not finished has written so far, a line for each image.
JOURNAL = Path("report") / "written.jsonl"


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
    part: Literal["whole", "head", "background"] = "whole"
    # That of the photograph, by which another set of photographs of the same names is known.
    source_sha256: str = ""
    # Whether a face was looked for in vain.
    faceless: bool = False
    # Changed by hand since dbkit wrote it, and so left as it is; sha256 is still that of what dbkit wrote.
    retouched: bool = False
    # That of the mask as dbkit wrote it, by which one that was drawn or changed by hand is known.
    mask_sha256: str = ""


@dataclass(frozen=True)
class DatasetReport:
    """What prepare_dataset() kept, cropped, refused and found. Shows itself as a table in a notebook.

    refused are pictures that cannot be used, left_out doubtful ones that the settings leave out, ignored what is no
    picture; each by its name in the source with the reason. findings are what may harm, by name in the source too.
    """

    folder: Path
    kept: list[Kept]
    refused: dict[str, str]
    findings: list[Finding] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def captions(self) -> int:
        """How many images have a caption."""
        return sum(bool(image.caption) for image in self.kept)

    @property
    def contact_sheet(self) -> Path:
        """The picture of all images as the model sees them, with what was found about each."""
        return self.folder / CONTACT_SHEET

    def __str__(self) -> str:
        lines = [self._head(), *(f"  {sentence}" for sentence in self._sentences())]
        lines += [f"  {image.source}: {note}" for image in self.kept if (note := _note(image))]
        lines += [f"  left out: {name}: {why}" for name, why in self.left_out.items()]
        lines += [f"  refused: {reason}" for reason in self.refused.values()]
        lines += [f"  ignored: {name}: {why}" for name, why in self.ignored.items()]
        if self.contact_sheet.is_file():
            lines.append(f"look at it: {self.contact_sheet}")
        return "\n".join(lines)

    def _sentences(self, most: int = 3) -> Iterator[str]:
        """What was found; of many findings of one kind the first ones, and how many more there are."""
        told: Counter = Counter()
        of_kind = Counter(finding.check for finding in self.findings)
        for finding in self.findings:
            told[finding.check] += 1
            more = of_kind[finding.check] - most
            if told[finding.check] <= most or more < 2:
                yield finding.says
            elif told[finding.check] == of_kind[finding.check]:
                yield f"{more} more of this kind ({finding.check}); {REPORT} has them all"

    def _head(self) -> str:
        counts = [counted(len(self.kept), "image"), counted(self.captions, "caption"), f"{len(self.refused)} refused"]
        if masks := sum((self.folder / "masks" / image.file).is_file() for image in self.kept):
            counts.insert(2, counted(masks, "mask"))
        if self.left_out:
            counts.append(f"{len(self.left_out)} left out")
        if self.findings:
            counts.append(counted(len(self.findings), "finding"))
        return f"{', '.join(counts)}: {self.folder}"

    def _repr_html_(self) -> str:
        whole = [f"<li>{html.escape(finding.says)}</li>" for finding in self.findings if finding.image is None]
        rows = [self._row(image) for image in self.kept]
        for title, names in (("left out", self.left_out), ("refused", self.refused), ("ignored", self.ignored)):
            rows += [
                f"<tr><td>{title}</td><td>{html.escape(name)}</td><td colspan=2>{html.escape(why)}</td></tr>"
                for name, why in names.items()
            ]
        head = "<tr><th>as the model sees it</th><th>from</th><th>caption</th><th>look at</th></tr>"
        table = f"<table>{head}{''.join(rows)}</table>"
        # JupyterLab sets tables to the right, as numbers are.
        table = table.replace("<td", "<td style='text-align:left'").replace("<th", "<th style='text-align:left'")
        return f"<p>{html.escape(self._head())}</p><ul>{''.join(whole)}</ul>{table}"

    def _row(self, image: Kept) -> str:
        said = "<br>".join(html.escape(finding.says) for finding in self.findings if finding.image == image.source)
        return (
            f'<tr><td><img width=96 src="{data_url(self.folder / image.file, 96)}"></td>'
            f"<td>{html.escape(_title(image))}<br>{_note(image)}</td><td>{html.escape(image.caption or '')}</td>"
            f"<td>{said}</td></tr>"
        )


def _title(image: Kept) -> str:
    return image.source if image.part == "whole" else f"{image.source} ({image.part})"


def _note(image: Kept) -> str:
    if image.retouched:
        return "changed by you in the prepared folder, and left as it is; delete it there to have it made anew"
    if image.kept >= 0.995:
        return ""
    return f"{image.width} x {image.height}, of which {image.kept:.0%} is trained"


def write_contact_sheet(report: DatasetReport) -> Path:
    """Save all images as the model sees them in one picture, each over its name and what was found about it."""
    from PIL import Image, ImageDraw, ImageFont

    count = len(report.kept)
    # JPEG ends at 65,500 pixels, and a picture that is about square is easier to look at than a ribbon.
    columns, side = max(6, math.isqrt(count)), 160 if count <= 200 else 96
    checks: dict[str | None, set[str]] = defaultdict(set)
    for finding in report.findings:
        checks[finding.image].add(finding.check)
    font, gap, line = ImageFont.load_default(12), 8, 15
    cell, rows = (side + gap, side + 3 * line + gap), -(-count // columns)
    sheet = Image.new("RGB", (gap + min(columns, count) * cell[0], gap + rows * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for number, image in enumerate(report.kept):
        x, y = gap + number % columns * cell[0], gap + number // columns * cell[1]
        picture = thumbnail(report.folder / image.file, side)
        zoom = max(1, side // max(picture.size))
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
        sheet.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
        note = f"keeps {image.kept:.0%}" if image.kept < 0.995 else ""
        lines = ((_title(image), "black"), (note, "dimgray"), (", ".join(sorted(checks[image.source])), "firebrick"))
        for row, (text, colour) in enumerate(lines):
            pen.text((x, y + side + row * line), _fitting(text, font, side), fill=colour, font=font)
    with whole_file(report.contact_sheet) as partial:
        sheet.save(partial, "JPEG", quality=90)
    return report.contact_sheet


def _fitting(text: str, font, width: int) -> str:
    """The text, its beginning cut off where it is wider than `width` pixels: the end of a name tells more."""
    while len(text) > 1 and font.getlength(text) > width:
        text = "…" + text[2:]
    return text


def write_report(
    report: DatasetReport, resolution: int, planned: dict[str, str] | None = None, source: Path | None = None
) -> None:
    """Write report.json. planned are the names that a run which is not finished has given to photographs."""
    facts = {
        "source": str(source) if source else None,
        "resolution": resolution,
        "images": [asdict(image) for image in report.kept],
        "refused": report.refused,
        "findings": [asdict(finding) for finding in report.findings],
        "left_out": report.left_out,
        "ignored": report.ignored,
    }
    facts |= {"planned": planned} if planned else {}
    write_text(report.folder / REPORT, json.dumps(facts, indent=1, ensure_ascii=False))
    if planned is None:
        (report.folder / JOURNAL).unlink(missing_ok=True)


def prepared_from(folder: Path) -> str | None:
    """The folder or zip that a prepared folder was made from, by its report."""
    try:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_written(folder: Path, image: Kept) -> None:
    """Say in the journal, before an image is written, what it will be: so a run that is killed forgets nothing."""
    path = folder / JOURNAL
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_is_a_sentence(folder), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(image), ensure_ascii=False) + "\n")


def _journal(folder: Path) -> list[Kept]:
    path = folder / JOURNAL
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    images = []
    for line in lines:
        # A kill can leave half of the last line, whose image was not written.
        with contextlib.suppress(json.JSONDecodeError):
            images.append(Kept(**json.loads(line)))
    return images


def earlier(folder: Path) -> tuple[list[Kept], dict[str, str]]:
    """What earlier runs made here, by report and journal, and the names that photographs have been given.

    A file may be there twice: as the last finished run made it, and as one that was stopped did.
    """
    path = folder / REPORT
    if not path.exists():
        return [], {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        made = [*(Kept(**image) for image in facts["images"]), *_journal(folder)]
        # Names of pictures only, so that no report can point outside its folder.
        images = [replace(image, file=_picture(image.file)) for image in made]
        planned = {str(source): _picture(name) for source, name in facts.get("planned", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DbkitError(f"{path} is damaged or not made by dbkit; choose a new folder as destination") from error
    return images, {image.source: image.file for image in images if image.part == "whole"} | planned


def backgrounds(folder: Path) -> set[str]:
    """The images of a prepared folder that show a background alone, by name; none where dbkit made no report."""
    try:
        return {image.file for image in earlier(folder)[0] if image.part == "background"}
    except (DbkitError, OSError):
        return set()  # a report that someone else put there


def _picture(name: str) -> str:
    if Path(name).suffix != ".png":
        raise ValueError(name)
    return Path(name).name
