"""Photographs become training images: from folders and zips, again and again."""

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_photo
from PIL import Image
from test_faces import portrait

from dbkit import DbkitError, PrepareConfig, prepare_dataset
from dbkit.files import one_process
from dbkit.report import CONTACT_SHEET, REPORT, backgrounds

REAL_PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "dreambooth" / "dog6"


def picture(path, colour="teal", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def hashes(folder):
    """Every file below a folder, with its hash."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CONTACT_SHEET.name)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def prepare(source, destination, **changes):
    return prepare_dataset(source, destination, **{"resolution": 32, "look_for_text": False, **changes})


def names(report):
    return {image.source: image.file for image in report.kept}


def colour_of(path):
    with Image.open(path) as image:
        return image.getpixel((0, 0))


def zip_of(path, files):
    """A zip with these names and contents."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def png(colour="teal"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


# What prepare_dataset() makes.


def test_the_images_are_square_rgb_pngs_of_one_size_and_the_source_is_as_before(photos, tmp_path):
    picture(photos / "sub" / "tall.jpg", size=(20, 90))
    before = hashes(photos)
    report = prepare(photos, tmp_path / "out", default_caption="photo of zwx thing", framing="random")
    assert hashes(photos) == before
    assert len(report.kept) == 4
    assert report.refused == {}
    for image in report.kept:
        with Image.open(tmp_path / "out" / image.file) as made:
            assert (made.format, made.mode, made.size) == ("PNG", "RGB", (32, 32))


def test_the_same_settings_give_the_same_files(photos, tmp_path):
    for name in ("one", "two", "two"):
        prepare(photos, tmp_path / name, framing="random", seed=3)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_another_seed_crops_elsewhere(photos, tmp_path):
    for seed in (0, 1):
        prepare(photos, tmp_path / str(seed), framing="random", seed=seed)
    assert hashes(tmp_path / "0") != hashes(tmp_path / "1")


def test_the_report_says_what_was_kept_and_cropped_and_refused(photos, tmp_path):
    picture(photos / "wide.png", size=(100, 20))
    (photos / "broken.png").write_bytes(b"no image")
    report = prepare(photos, tmp_path / "out")
    lines = str(report).splitlines()
    assert lines[0].startswith("4 images, 3 captions, 1 refused, ")
    assert lines[0].endswith(f" findings: {tmp_path / 'out'}")
    assert "  wide.png: 100 x 20, of which 20% is trained" in lines
    assert any(line.startswith("  wide.png has 100 x 20 pixels and is enlarged 1.6 times to 32") for line in lines)
    assert "  teal.png: 96 x 80, of which 83% is trained" in lines
    assert sum(line.startswith("  refused: broken.png cannot be read as an image") for line in lines) == 1
    facts = json.loads((tmp_path / "out" / REPORT).read_text(encoding="utf-8"))
    assert {image["source"] for image in facts["images"]} == {"crimson.png", "gold.png", "teal.png", "wide.png"}
    assert list(facts["refused"]) == ["broken.png"]
    assert facts["resolution"] == 32


def test_the_report_shows_pictures_and_escaped_captions_in_a_notebook(photos, tmp_path):
    (photos / "teal.txt").write_text("<b>a thing</b>")
    (photos / "broken & bad.png").write_bytes(b"no image")
    shown = prepare(photos, tmp_path / "out")._repr_html_()
    assert shown.count("data:image/jpeg;base64,") == 3
    assert "&lt;b&gt;a thing&lt;/b&gt;" in shown
    assert "broken &amp; bad.png" in shown


def test_an_unreadable_image_is_refused_while_others_are_kept(photos, tmp_path):
    (photos / "broken.png").write_bytes(b"")
    picture(photos / "dot.png", size=(40, 7))
    report = prepare(photos, tmp_path / "out")
    assert set(report.refused) == {"broken.png", "dot.png"}
    assert report.refused["dot.png"] == "dot.png has 40 x 7 pixels; too small to learn from"
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"teal.png", "crimson.png", "gold.png"}


def test_an_image_whose_caption_cannot_be_read_is_refused_and_leaves_nothing(photos, tmp_path):
    (photos / "teal.txt").write_bytes("Hündin".encode("latin-1"))
    report = prepare(photos, tmp_path / "out")
    assert list(report.refused) == ["teal.png"]
    assert "teal.txt is not UTF-8 text" in report.refused["teal.png"]
    assert not list((tmp_path / "out").glob("teal*"))


def test_a_full_disk_is_not_counted_as_refused_images(photos, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gold.png.partial").symlink_to("/dev/full")
    with pytest.raises(DbkitError, match=r"the disk of .* is full"):
        prepare(photos, tmp_path / "out")
    assert len(prepare(photos, tmp_path / "out").kept) == 3


# Captions.


def test_captions_come_along(photos, tmp_path):
    (photos / "gold.txt").unlink()
    (photos / "teal.png.txt").write_text("exactly\nteal")
    report = prepare(photos, tmp_path / "out")
    assert {image.source: image.caption for image in report.kept} == {
        "crimson.png": "a crimson thing",
        "gold.png": None,
        "teal.png": "exactly teal",
    }
    assert (tmp_path / "out" / "teal.txt").read_bytes() == b"exactly teal\n"
    assert not (tmp_path / "out" / "gold.txt").exists()
    assert report.captions == 2


def test_a_default_caption_is_written_only_where_there_is_none(photos, tmp_path):
    (photos / "gold.txt").unlink()
    (photos / "teal.txt").write_text(" \n")
    report = prepare(photos, tmp_path / "out", default_caption="photo of zwx thing")
    captions = {image.source: image.caption for image in report.kept}
    assert captions["gold.png"] == captions["teal.png"] == "photo of zwx thing"
    assert captions["crimson.png"] == "a crimson thing"
    assert report.captions == 3


def test_an_empty_caption_does_not_count_as_one(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    (tmp_path / "out" / "teal.txt").write_text("")
    assert prepare(photos, tmp_path / "out").captions == 2


def test_captions_edited_in_the_destination_are_kept(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    (tmp_path / "out" / "teal.txt").write_text("edited by hand")
    report = prepare(photos, tmp_path / "out", default_caption="photo of zwx thing")
    assert {image.file: image.caption for image in report.kept}["teal.png"] == "edited by hand"
    assert (tmp_path / "out" / "teal.txt").read_text() == "edited by hand"


# Names.


def test_adding_a_photograph_renames_no_other(photos, tmp_path):
    picture(photos / "sub" / "a.jpg")
    before = names(prepare(photos, tmp_path / "out"))
    for name in ("aaa.jpg", "sub/0.png", "zzz.webp", "sub/sub/a.jpg"):
        picture(photos / name)
    after = names(prepare(photos, tmp_path / "out"))
    assert len(after) == len(before) + 4
    assert {source: after[source] for source in before} == before


def test_two_images_of_one_name_are_both_kept(tmp_path):
    picture(tmp_path / "in" / "a.jpg", "black")
    picture(tmp_path / "in" / "a.png", "white")
    # These two differ in nothing that every file system tells apart.
    picture(tmp_path / "in" / "x-b.png", "red")
    picture(tmp_path / "in" / "x" / "B.png", "blue")
    report = prepare(tmp_path / "in", tmp_path / "out")
    assert len({image.file.casefold() for image in report.kept}) == 4
    assert colour_of(tmp_path / "out" / names(report)["a.jpg"]) == (0, 0, 0)
    assert colour_of(tmp_path / "out" / names(report)["a.png"]) == (255, 255, 255)


def test_a_photograph_of_the_same_name_takes_neither_the_place_nor_the_caption_of_an_earlier_one(tmp_path):
    picture(tmp_path / "in" / "a.png", "white")
    prepare(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "a.txt").write_text("a white wall")
    picture(tmp_path / "in" / "a.jpg", "black")
    report = prepare(tmp_path / "in", tmp_path / "out")
    assert names(report)["a.png"] == "a.png"
    assert colour_of(tmp_path / "out" / "a.png") == (255, 255, 255)
    captions = {image.source: image.caption for image in report.kept}
    assert captions == {"a.png": "a white wall", "a.jpg": None}


def test_names_of_every_script_and_length_become_files(tmp_path):
    given = [
        "犬 と 猫.jpg",
        "con.png",
        "a:b?.png" if sys.platform != "win32" else "ab.png",
        "🐕" * 40 + "/" + "🐕" * 40 + ".png",
    ]
    for name in (*given, "🐕" * 40 + "/" + "🐕" * 40 + ".webp"):
        picture(tmp_path / "in" / name)
    made = names(prepare(tmp_path / "in", tmp_path / "out"))
    assert made["犬 と 猫.jpg"] == "犬 と 猫.png"
    assert made["con.png"] == "con-.png"
    assert len(set(made.values())) == 5


# Running again.


def test_an_image_whose_photograph_is_gone_is_removed_with_its_caption(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    (photos / "teal.png").unlink()
    prepare(photos, tmp_path / "out")
    assert set(hashes(tmp_path / "out")) == {"crimson.png", "crimson.txt", "gold.png", "gold.txt", REPORT}


def test_a_changed_image_or_caption_is_not_removed(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    picture(tmp_path / "out" / "teal.png", "black")
    (tmp_path / "out" / "gold.txt").write_text("edited by hand")
    (tmp_path / "out" / "own notes.md").write_text("mine")
    (photos / "teal.png").unlink()
    (photos / "gold.png").unlink()
    prepare(photos, tmp_path / "out")
    left = set(hashes(tmp_path / "out"))
    assert left == {"crimson.png", "crimson.txt", "teal.png", "teal.txt", "gold.txt", "own notes.md", REPORT}


def test_a_killed_run_is_taken_up_again(photos, tmp_path):
    prepare(photos, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    # What a kill during the first image and during the second one leaves.
    (tmp_path / "out" / "crimson.png.partial").write_bytes(b"half")
    assert len(prepare(photos, tmp_path / "out").kept) == 3
    (tmp_path / "out" / "gold.png").unlink()
    planned = {f"{name}.png": f"{name}.png" for name in ("crimson", "gold", "teal")}
    begun = {"resolution": 32, "images": [], "refused": {}, "planned": planned}
    (tmp_path / "out" / REPORT).write_text(json.dumps(begun), encoding="utf-8")
    prepare(photos, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_picture_that_someone_put_into_the_destination_is_not_overwritten(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    own = picture(tmp_path / "out" / "cat.png", "black")
    picture(photos / "cat.jpg")
    assert names(prepare(photos, tmp_path / "out"))["cat.jpg"] == "cat-jpg.png"
    assert colour_of(own) == (0, 0, 0)


def stopped_after(count, photos, out, monkeypatch, **changes):
    """Prepare, and stop as a kill would when `count` images are written."""
    written, rename = [], Path.replace

    def replace(partial, target):
        if Path(target).suffix == ".png":
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(target)
        return rename(partial, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare(photos, out, **changes)
    monkeypatch.setattr(Path, "replace", rename)


def test_a_stopped_run_remembers_the_captions_that_it_wrote(photos, tmp_path, monkeypatch):
    for path in photos.glob("*.txt"):
        path.unlink()
    stopped_after(2, photos, tmp_path / "out", monkeypatch, default_caption="photo of a dgo")
    report = prepare(photos, tmp_path / "out", default_caption="photo of a dog")
    assert {image.caption for image in report.kept} == {"photo of a dog"}


def test_a_stopped_runs_images_are_removed_when_their_photographs_are_gone(photos, tmp_path, monkeypatch):
    stopped_after(2, photos, tmp_path / "out", monkeypatch)
    (photos / "crimson.png").unlink()
    prepare(photos, tmp_path / "out")
    assert set(hashes(tmp_path / "out")) == {"gold.png", "gold.txt", "teal.png", "teal.txt", REPORT}


def test_a_prepared_image_that_someone_retouched_is_left_as_it_is_and_said(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    picture(tmp_path / "out" / "teal.png", "black", (32, 32))
    for _ in range(2):
        report = prepare(photos, tmp_path / "out", framing="random")
        assert colour_of(tmp_path / "out" / "teal.png") == (0, 0, 0)
        assert [image.file for image in report.kept if image.retouched] == ["teal.png"]
        assert "  teal.png: changed by you in the prepared folder, and left as it is" in str(report)
    (tmp_path / "out" / "teal.png").unlink()
    prepare(photos, tmp_path / "out")
    assert colour_of(tmp_path / "out" / "teal.png") != (0, 0, 0)


def test_a_caption_that_is_gone_from_the_source_goes_here_too_unless_it_was_edited(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    (tmp_path / "out" / "gold.txt").write_text("edited here")
    for name in ("gold", "teal"):
        (photos / f"{name}.txt").unlink()
    captions = {image.file: image.caption for image in prepare(photos, tmp_path / "out").kept}
    assert captions == {"crimson.png": "a crimson thing", "gold.png": "edited here", "teal.png": None}


def test_a_second_run_into_one_destination_is_refused(photos, tmp_path):
    with (
        one_process(tmp_path / "out"),
        pytest.raises(DbkitError, match=r"another process is at work in .*out; wait for it, or choose another folder"),
    ):
        prepare(photos, tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_is_refused_and_the_others_are_not(photos, tmp_path):
    picture(photos / "x.png").rename(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png"))
    report = prepare(photos, tmp_path / "out")
    assert len(report.kept) == 3
    assert list(report.refused.values()) == ["caf\\udce9.png has a name that is no text; rename it"]


# Framing.


def test_a_face_is_framed_and_head_and_background_are_added(tmp_path):
    source = tmp_path / "in"
    picture(source / "a-head.png", size=(64, 64))
    portrait((640, 400), (400, 80, 160)).save(source / "a.png")
    (source / "a.txt").write_text("photo of zwx man")
    report = prepare(source, tmp_path / "out", framing="face", head_crops=True, background_caption="photo of a room")
    made = {(image.source, image.part): image for image in report.kept}
    assert set(made) == {("a-head.png", "whole"), ("a.png", "whole"), ("a.png", "head"), ("a.png", "background")}
    assert len({image.file for image in report.kept}) == 4
    assert made["a.png", "head"].caption == "photo of zwx man, close-up of the face"
    assert made["a.png", "background"].caption == "photo of a room"
    assert made["a-head.png", "whole"].caption is None
    assert backgrounds(tmp_path / "out") == {made["a.png", "background"].file}
    # The face lies at the right, where a square around the centre would cut it: its skin fills the middle of this one.
    with Image.open(tmp_path / "out" / made["a.png", "whole"].file) as image:
        assert min(image.getpixel((16, 13))) > 150
    again = prepare(source, tmp_path / "out")
    assert {image.part for image in again.kept} == {"whole"}
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_without_a_crop_whole_images_are_kept_no_larger_than_buckets_need(tmp_path):
    picture(tmp_path / "in" / "large.png", size=(400, 200))
    picture(tmp_path / "in" / "small.png", size=(40, 60))
    report = prepare(tmp_path / "in", tmp_path / "out", framing="none")
    sizes = {image.source: Image.open(tmp_path / "out" / image.file).size for image in report.kept}
    assert sizes == {"large.png": (128, 64), "small.png": (40, 60)}


def test_other_photographs_do_not_take_the_captions_of_those_prepared_before(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    (tmp_path / "out" / "teal.txt").write_text("edited here")
    picture(tmp_path / "others" / "teal.png", "navy")
    with pytest.raises(DbkitError, match=r"out holds images prepared from .*photos, and none of them is in .*others; "):
        prepare(tmp_path / "others", tmp_path / "out")
    assert colour_of(tmp_path / "out" / "teal.png") == (255, 255, 255)
    # The same photographs in another place are the same set.
    shutil.copytree(photos, tmp_path / "moved")
    captions = {image.file: image.caption for image in prepare(tmp_path / "moved", tmp_path / "out").kept}
    assert captions["teal.png"] == "edited here"


def test_where_no_face_is_found_that_is_said(photos, tmp_path):
    report = prepare(photos, tmp_path / "out", framing="face")
    said = [finding.image for finding in report.findings if finding.check == "framing"]
    assert said == ["crimson.png", "gold.png", "teal.png"]


def test_what_is_said_of_the_set_is_about_what_is_left_of_it(photos, tmp_path):
    (photos / "gold.txt").unlink()
    report = prepare(photos, tmp_path / "out", leave_out="caption", method="native")
    assert list(report.left_out) == ["gold.png"] and len(report.kept) == 2
    assert not any("gold.png" in finding.says for finding in report.findings)
    assert any(finding.check == "too few" and finding.says.startswith("2 images") for finding in report.findings)


def test_doubtful_images_are_left_out_only_if_asked(photos, tmp_path):
    shutil.copy(photos / "teal.png", photos / "teal again.png")
    assert len(prepare(photos, tmp_path / "all").kept) == 4
    report = prepare(photos, tmp_path / "some", leave_out=["near-duplicate"])
    assert all("nearly equals" in reason for reason in report.left_out.values())
    assert len(report.left_out) + len(report.kept) == 4 and report.left_out


# What is refused.


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DbkitError, match=r"^there are no images in .*in; put 5 to 20 photographs there \(.bmp, .gif, "):
        prepare(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_usable_image_is_refused_with_every_reason(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "in" / name).write_bytes(b"no image")
    with pytest.raises(DbkitError, match=r"^none of the 2 images in .*in is usable: a.png cannot.*; b.png cannot"):
        prepare(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gone", "gone.zip", "notes.txt"])
def test_a_source_that_is_no_folder_or_zip_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DbkitError, match=f"^there is no folder or .zip .*{name}; check the path$"):
        prepare(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("destination", ["photos", "photos/out", ".", "photos/../photos/x"])
def test_a_destination_in_or_around_the_source_is_refused(photos, tmp_path, destination):
    before = hashes(tmp_path)
    with pytest.raises(DbkitError, match=r"lie in one another; choose a destination elsewhere$"):
        prepare(photos, tmp_path / destination)
    assert hashes(tmp_path) == before


def test_a_destination_that_is_a_file_is_refused(photos, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(DbkitError, match=r"out is a file; choose a folder as destination$"):
        prepare(photos, tmp_path / "out")


@pytest.mark.parametrize("name", ["teal.png", "thesis.docx", "a.txt"])
def test_a_destination_with_files_of_the_users_own_is_refused_and_left_alone(photos, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(DbkitError, match=rf"out holds files that dbkit did not make \({name}\); choose a new folder$"):
        prepare(photos, tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_clutter_in_a_new_destination_is_no_matter(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_text("x")
    assert len(prepare(photos, tmp_path / "out").kept) == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"images": [{"file": "a.png"}]}', '{"images": 3}', "{}"])
def test_a_report_of_another_program_is_refused(photos, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / REPORT).write_text(content)
    with pytest.raises(
        DbkitError, match=r"report.json is damaged or not made by dbkit; choose a new folder as destinat"
    ):
        prepare(photos, tmp_path / "out")


def test_a_report_cannot_name_files_outside_its_folder(photos, tmp_path):
    prepare(photos, tmp_path / "out")
    victim = shutil.copy(tmp_path / "out" / "teal.png", tmp_path / "victim.png")
    report = tmp_path / "out" / REPORT
    report.write_text(report.read_text().replace('"teal.png"', '"../victim.png"', 1))
    (photos / "teal.png").unlink()
    prepare(photos, tmp_path / "out")
    assert Path(victim).is_file()


# Zips.


def test_a_zip_gives_the_same_images_as_its_folder(photos, tmp_path):
    archive = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", photos))
    before = archive.read_bytes()
    prepare(photos, tmp_path / "from folder")
    prepare(archive, tmp_path / "from zip")
    made, expected = (hashes(tmp_path / name) for name in ("from zip", "from folder"))
    assert made.pop(REPORT) != expected.pop(REPORT)  # it says where they came from
    assert made == expected
    assert archive.read_bytes() == before


def test_a_zip_cannot_write_outside_and_its_clutter_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    files = {
        "photos/dog.png": png(),
        "photos/dog.txt": "a dog",
        "../evil.png": png("red"),
        "photos/../../evil.png": png("red"),
        "/evil.png": png("red"),
        "__MACOSX/photos/._dog.png": b"clutter",
        "photos/.DS_Store": b"clutter",
        "photos/run.sh": "echo",
    }
    report = prepare(zip_of(tmp_path / "photos.zip", files), tmp_path / "out")
    assert set(report.refused) == {"../evil.png", "photos/../../evil.png"}
    assert all("would lie outside the zip's folder" in reason for reason in report.refused.values())
    assert report.ignored == {"photos/run.sh": "not a picture by its name"}
    assert names(report)["photos/dog.png"] == "photos-dog.png"
    assert report.captions == 1
    assert not Path("/evil.png").exists()
    # Only the one with the leading slash is taken, without it.
    assert list(tmp_path.rglob("evil.png")) == [tmp_path / "out" / "evil.png"]
    assert list((tmp_path / "temp").iterdir()) == []


def with_a_password(content):
    """The zip with the mark of encryption on its first file, in both headers."""
    content = bytearray(content)
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def with_damaged_data(content):
    """The zip with its first compressed stream overwritten."""
    start = 30 + int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
    return content[:start] + b"\xff" * 20 + content[start + 20 :]


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"no zip", lambda content: b""])
def test_a_zip_that_cannot_be_opened_is_refused(tmp_path, damage):
    path = zip_of(tmp_path / "photos.zip", {"dog.png": png(), "cat.png": png()})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DbkitError, match=r"photos.zip cannot be unpacked \(.+\); make the zip again$"):
        prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_a_wrong_checksum(content):
    """The zip with one bit of its first file's data turned."""
    content = bytearray(content)
    content[60] ^= 1
    return bytes(content)


@pytest.mark.parametrize("damage", [with_a_password, with_damaged_data, with_a_wrong_checksum])
def test_a_damaged_file_in_a_zip_is_refused_and_the_others_are_not(tmp_path, damage):
    path = zip_of(tmp_path / "photos.zip", {"dog.png": png(), "cat.png": png()})
    path.write_bytes(damage(path.read_bytes()))
    report = prepare(path, tmp_path / "out")
    assert list(names(report)) == ["cat.png"]
    (reason,) = report.refused.values()
    assert reason.startswith("dog.png cannot be unpacked (") and reason.endswith("without a password")
    assert "dog.png" in report.refused


def test_a_zip_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path):
    path = zip_of(tmp_path / "photos.zip", {f"{number}.png": png() for number in range(5)})
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        # The size that the list of contents claims: just under 4 GiB for each file.
        content[at + 24 : at + 28] = (2**32 - 2).to_bytes(4, "little")
        at = content.find(b"PK\x01\x02", at + 1)
    path.write_bytes(content)
    with pytest.raises(DbkitError, match=r"photos.zip unpacks to more than 20 GB; zip only the photographs$"):
        prepare(path, tmp_path / "out")


def test_a_zip_without_images_is_refused_by_its_own_name(tmp_path):
    with pytest.raises(DbkitError, match=r"^there are no images in .*photos.zip; a.txt is a text without .*; put 5"):
        prepare(zip_of(tmp_path / "photos.zip", {"a.txt": "a"}), tmp_path / "out")


# Photographs from real cameras.


def test_real_photographs_are_prepared_without_refusal(tmp_path):
    if not REAL_PHOTOGRAPHS.is_dir():
        pytest.skip("the folder shared with real photographs is not beside this checkout")
    before = hashes(REAL_PHOTOGRAPHS)
    report = prepare(REAL_PHOTOGRAPHS, tmp_path / "out")
    assert report.refused == {}
    assert len(report.kept) == len(before) >= 4
    assert hashes(REAL_PHOTOGRAPHS) == before


def test_preparing_takes_a_settings_object_too(photos, tmp_path):
    report = prepare_dataset(PrepareConfig(photos, tmp_path / "out", resolution=16))
    with Image.open(report.folder / report.kept[0].file) as image:
        assert image.size == (16, 16)


def test_a_caption_corrected_in_the_source_arrives_unless_it_was_edited_here_too(photos, tmp_path):
    out = tmp_path / "out"
    prepare(photos, out)
    (out / "gold.txt").write_text("edited here\n", encoding="utf-8")
    for name in ("teal", "gold"):
        (photos / f"{name}.txt").write_text("corrected\n", encoding="utf-8")
    for _ in range(2):
        captions = {image.file: image.caption for image in prepare(photos, out).kept}
        assert captions == {"crimson.png": "a crimson thing", "gold.png": "edited here", "teal.png": "corrected"}


def test_photographs_of_kinds_that_are_not_read_are_named(photos, tmp_path):
    (photos / "IMG_1.DNG").write_bytes(b"phone")
    report = prepare(photos, tmp_path / "out")
    assert list(report.refused) == ["IMG_1.DNG"]
    assert "save it as JPEG or PNG" in report.refused["IMG_1.DNG"] and len(report.kept) == 3


def test_only_unread_kinds_are_said_to_be_so(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.dng").write_bytes(b"phone")
    with pytest.raises(DbkitError, match=r"there are no images .* a\.dng is of a kind that dbkit does not read"):
        prepare(tmp_path / "photos", tmp_path / "out")


def test_masks_come_along_with_the_same_cut(tmp_path):
    source = tmp_path / "source"
    image = draw_photo(source / "one.png", size=(96, 64))
    opacity = Image.new("L", (96, 64), 0)
    opacity.paste(255, (16, 0, 48, 64))
    with Image.open(draw_photo(source / "two.png", size=(96, 64))) as clear:
        clear.putalpha(opacity)
        clear.save(source / "two.png")
    (source / "masks").mkdir()
    # Half as large as its image.
    opacity.resize((48, 32)).save(source / "masks" / "one.png")
    opacity.save(source / "masks" / "three.png")
    report = prepare_dataset(source, tmp_path / "out", resolution=32)
    assert [kept.file for kept in report.kept] == ["one.png", "two.png"]
    assert report.ignored == {"masks/three.png": "a mask without a picture of its name"}
    assert str(report).startswith("2 images, 0 captions, 2 masks, 0 refused")
    for name in ("one.png", "two.png"):
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / name))
        # The middle square of 64 pixels begins at 16, where the mask begins.
        assert mask.shape == (32, 32) and mask[:, :14].min() > 200 and mask[:, 18:].max() < 20
    image.unlink()
    (source / "masks" / "one.png").unlink()
    prepare_dataset(source, tmp_path / "out", resolution=32)
    assert [path.name for path in (tmp_path / "out" / "masks").iterdir()] == ["two.png"]


def masked_source(folder) -> Path:
    """Two photographs of one stem, each with a mask of its own."""
    for suffix, colour in (("jpg", "teal"), ("png", "crimson")):
        draw_photo(folder / f"one.{suffix}", size=(64, 64), colour=colour)
    draw_photo(folder / "masks" / "one.jpg.png", size=(64, 64), colour="black")
    draw_photo(folder / "masks" / "one.png.png", size=(64, 64), colour="gray")
    return folder


def test_masks_of_pictures_of_one_stem_are_told_apart_and_are_no_pictures(tmp_path):
    source = masked_source(tmp_path / "source")
    report = prepare_dataset(source, tmp_path / "out", resolution=32)
    assert [kept.source for kept in report.kept] == ["one.jpg", "one.png"]
    darkest = {path.name: Image.open(path).getextrema()[0] for path in (tmp_path / "out" / "masks").iterdir()}
    assert darkest["one.png"] < 20 and darkest["one-png.png"] > 100


def test_masks_drawn_or_edited_by_hand_stay(tmp_path):
    source, out = masked_source(tmp_path / "source"), tmp_path / "out"
    draw_photo(source / "two.png", size=(64, 64), colour="gold")
    prepare_dataset(source, out, resolution=32)
    edited, drawn = out / "masks" / "one.png", out / "masks" / "two.png"
    for path in (edited, drawn):
        Image.new("L", (32, 32), 200).save(path)
    before = edited.read_bytes()
    # The source's masks change or go, a mask comes where one was drawn, and its photograph goes.
    (source / "masks" / "one.png.png").unlink()
    draw_photo(source / "masks" / "two.png", size=(64, 64), colour="black")
    for _ in range(2):
        prepare_dataset(source, out, resolution=32)
        assert edited.read_bytes() == drawn.read_bytes() == before
        assert not (out / "masks" / "one-png.png").exists()
    for name in ("one.jpg", "two.png"):
        (source / name).unlink()
    prepare_dataset(source, out, resolution=32)
    assert edited.read_bytes() == drawn.read_bytes() == before


def test_a_head_is_cut_with_its_mask_and_a_background_has_none(tmp_path):
    image = portrait((400, 300), (60, 90, 80))
    (tmp_path / "source" / "masks").mkdir(parents=True)
    image.save(tmp_path / "source" / "one.png")
    face = Image.new("L", image.size)
    face.paste(255, (60, 90, 140, 170))
    face.save(tmp_path / "source" / "masks" / "one.png")
    prepare(tmp_path / "source", tmp_path / "out", head_crops=True, background_caption="photo of a room")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "one-background.png",
        "one-head.png",
        "one.png",
    ]
    masks = {path.name: np.asarray(Image.open(path)).mean() for path in (tmp_path / "out" / "masks").iterdir()}
    # The face is a larger part of the head than of the whole.
    assert masks.keys() == {"one.png", "one-head.png"} and masks["one-head.png"] > 2 * masks["one.png"]


def test_a_mask_that_changes_in_the_source_changes_in_the_destination(tmp_path):
    source, out = masked_source(tmp_path / "source"), tmp_path / "out"
    prepare_dataset(source, out, resolution=32)
    before = (out / "masks" / "one.png").read_bytes()
    draw_photo(source / "masks" / "one.jpg.png", size=(64, 64), colour="gray")
    prepare_dataset(source, out, resolution=32)
    assert (out / "masks" / "one.png").read_bytes() != before


def test_a_picture_whose_mask_cannot_be_used_is_refused(tmp_path):
    source = masked_source(tmp_path / "source")
    draw_photo(source / "masks" / "one.png.png", size=(96, 64))
    report = prepare_dataset(source, tmp_path / "out", resolution=32)
    assert [kept.source for kept in report.kept] == ["one.jpg"]
    assert "masks/one.png.png is 96 x 64 and one.png 64 x 64, which is another shape" in report.refused["one.png"]


def test_a_folder_of_masks_without_their_images_is_a_folder_of_pictures(tmp_path):
    draw_photo(tmp_path / "source" / "masks" / "venice.png")
    assert len(prepare_dataset(tmp_path / "source", tmp_path / "out").kept) == 1
