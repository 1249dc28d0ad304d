"""The report of a data set: in words, as a table, as a picture of all images, and as a file that is read again."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from dbkit.doctor import Finding
from dbkit.report import REPORT, DatasetReport, Kept, earlier, write_contact_sheet, write_report

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


@pytest.fixture
def report(tmp_path):
    kept = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
        kept.append(Kept(f"{name}.png", f"{name}.jpg", 400, 300, 0.75, False, f"a {name} thing", "0" * 64))
    findings = [
        Finding("blurred", "red.jpg", "red.jpg is blurred; take a sharper one"),
        Finding("too few", None, "3 images are few; add some"),
    ]
    return DatasetReport(
        tmp_path, kept, {"x.jpg": "x.jpg cannot be read"}, findings, {"y.jpg": "y.jpg is dark"}, {"z": "no"}
    )


def test_in_words_everything_is_said_once(report):
    lines = str(report).splitlines()
    assert lines[0] == f"3 images, 3 captions, 1 refused, 1 left out, 2 findings: {report.folder}"
    assert lines[1:] == [
        "  red.jpg is blurred; take a sharper one",
        "  3 images are few; add some",
        "  red.jpg: 400 x 300, of which 75% is trained",
        "  green.jpg: 400 x 300, of which 75% is trained",
        "  blue.jpg: 400 x 300, of which 75% is trained",
        "  left out: y.jpg: y.jpg is dark",
        "  refused: x.jpg cannot be read",
        "  ignored: z: no",
    ]


def test_the_contact_sheet_shows_every_image_and_marks_what_was_found(report):
    path = write_contact_sheet(report)
    assert path == report.contact_sheet and path.parent.name == "report"
    assert str(report).splitlines()[-1] == f"look at it: {path}"
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    places = []
    for colour in COLOURS.values():
        near = np.abs(sheet - colour).max(axis=2) < 40
        # 64 pixels are shown twice as large.
        assert near.sum() == pytest.approx(128 * 128, rel=0.05)
        places.append(np.argwhere(near).mean(axis=0)[1])
    assert places == sorted(places)
    # What was found about the first is written in red below it, and nothing red is below the others.
    reddish = (sheet[..., 0] > 120) & (sheet[..., 1] < 110) & (sheet[..., 2] < 110)
    below = np.argwhere(reddish[170:])
    assert len(below) and below[:, 1].max() < 168


def test_a_training_does_not_take_the_contact_sheet_for_an_image(report):
    from dbkit.images import list_images

    write_contact_sheet(report)
    assert [path.name for path in list_images(report.folder)] == ["blue.png", "green.png", "red.png"]


def test_the_table_has_a_row_for_every_image_and_its_findings(report):
    shown = report._repr_html_().replace(" style='text-align:left'", "")
    assert shown.count("<img ") == 3
    assert "<td>red.jpg is blurred; take a sharper one</td>" in shown
    assert "<li>3 images are few; add some</li>" in shown
    assert "<td>left out</td><td>y.jpg</td>" in shown and "<td>refused</td><td>x.jpg</td>" in shown


def test_the_file_holds_everything_and_is_read_again(report):
    write_report(report, 64, {"new.jpg": "new.png"})
    facts = json.loads((report.folder / REPORT).read_text(encoding="utf-8"))
    assert facts["findings"][0] == {"check": "blurred", "image": "red.jpg", "says": report.findings[0].says}
    assert (facts["refused"], facts["left_out"], facts["ignored"]) == (report.refused, report.left_out, report.ignored)
    kept, names = earlier(report.folder)
    assert kept == report.kept
    assert names == {"red.jpg": "red.png", "green.jpg": "green.png", "blue.jpg": "blue.png", "new.jpg": "new.png"}


def test_long_names_keep_their_end_on_the_contact_sheet(report):
    from PIL import ImageFont

    from dbkit.report import _fitting

    font = ImageFont.load_default(12)
    text = _fitting("photographs/" * 10 + "dog.png", font, 160)
    assert text.endswith("dog.png") and text.startswith("…") and font.getlength(text) <= 160


def test_thousands_of_images_fit_on_one_contact_sheet(report):
    many = dataclasses.replace(report, kept=report.kept * 1000)
    with Image.open(write_contact_sheet(many)) as sheet:
        assert max(sheet.size) < 20_000


def test_of_many_findings_of_one_kind_three_are_printed_and_the_rest_counted(report):
    findings = [Finding("caption", f"{n}.jpg", f"{n}.jpg has no caption") for n in range(10)]
    lines = str(dataclasses.replace(report, findings=findings)).splitlines()
    assert lines[1:5] == [
        "  0.jpg has no caption",
        "  1.jpg has no caption",
        "  2.jpg has no caption",
        "  7 more of this kind (caption); report.json has them all",
    ]
