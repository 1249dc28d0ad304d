"""Whatever is in a folder of photographs ends in the report or in one sentence; none stops the others, none is lost."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from dbkit import DbkitError, prepare_dataset
from dbkit.images import SUFFIXES, read_image

GOOD = ("one.png", "two.png")


def drawn(size=(80, 60), mode="RGB") -> Image.Image:
    """A picture with a red left half and a blue right half."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two good photographs."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in zip(GOOD, ((80, 60), (60, 90))):
        (folder / name).write_bytes(encoded(drawn(size), "PNG"))
    return folder


def prepare(source: Path, **changes):
    report = prepare_dataset(source, source.parent / "out", **{"resolution": 32, "look_for_text": False, **changes})
    # The good ones are always there.
    assert {"one.png", "two.png"} <= {Path(image.source).name for image in report.kept}
    for image in report.kept:
        with Image.open(report.folder / image.file) as made:
            assert (made.mode, made.format) == ("RGB", "PNG")
    return report


JPEG, PNG, GIF = (encoded(drawn(), kind) for kind in ("JPEG", "PNG", "GIF"))

REFUSED = {
    "zero bytes": ("a.jpg", b"", "a.jpg cannot be read as an image"),
    "truncated JPEG": ("a.jpg", JPEG[: len(JPEG) // 2], "a.jpg cannot be read as an image"),
    "truncated PNG": ("a.png", PNG[: len(PNG) // 2], "a.png cannot be read as an image"),
    "only a header": ("a.png", PNG[:33], "a.png cannot be read as an image"),
    "a text called jpg": ("a.jpg", b"this is no picture", "a.jpg cannot be read as an image"),
    "a web page called png": ("a.png", b"<!DOCTYPE html><html>404</html>", "a.png cannot be read as an image"),
    "an SVG called png": ("a.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a.png cannot be read as an image"),
    "random bytes": ("a.webp", bytes(np.random.default_rng(0).bytes(5000)), "a.webp cannot be read as an image"),
    "PostScript, which Pillow would run": ("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", "a.jpg cannot be read as an image"),
    "a bomb by its header": ("a.png", png_claiming(60_000, 60_000), "too many pixels"),
    "more than 100 million pixels": ("a.png", png_claiming(12_000, 12_000), "smaller than 100 million"),
    "no pixels": ("a.png", png_claiming(0, 0), "a.png cannot be read as an image"),
    "damaged data": ("a.png", PNG[:60] + b"\xff" * 30 + PNG[90:], "a.png cannot be read as an image"),
    "one pixel": ("a.png", encoded(drawn((1, 1)), "PNG"), "a.png has 1 x 1 pixels; too small"),
    "fully transparent": (
        "a.png",
        encoded(Image.new("RGBA", (80, 60), (254, 0, 0, 0)), "PNG"),
        "a.png is transparent all over",
    ),
    "a line": ("a.png", encoded(drawn((500, 3)), "PNG"), "a.png has 500 x 3 pixels; too small"),
    "a raw photograph": ("a.dng", b"raw", "a.dng is of a kind that dbkit does not read"),
    "a Photoshop file": ("a.PSD", b"8BPS", "a.PSD is of a kind that dbkit does not read"),
    "a damaged HEIC": ("a.heic", b"\0\0\0\x18ftypheic", "a.heic cannot be read as an image"),
}


@pytest.mark.parametrize(("name", "content", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_usable_image_is_refused_by_name(folder, name, content, sentence):
    (folder / name).write_bytes(content)
    report = prepare(folder)
    assert list(report.refused) == [name]
    assert sentence in report.refused[name]
    assert len(report.kept) == 2


def cmyk():
    return encoded(drawn(mode="CMYK"), "JPEG")


def sideways():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(drawn(), "JPEG", exif=exif)


def sixteen_bit():
    return encoded(Image.fromarray(np.full((60, 80), 40_000, np.uint16)), "PNG")


def animated(kind):
    return encoded(drawn(), kind, save_all=True, append_images=[Image.new("RGB", (80, 60), "lime")] * 3)


def heic():
    import pillow_heif

    pillow_heif.register_heif_opener()
    return encoded(drawn(), "HEIF")


RED, BLUE, WHITE = (254, 0, 0), (0, 0, 254), (255, 255, 255)
READ = {
    "a JPEG called png": ("a.png", lambda: JPEG, RED),
    "a PNG called jpg": ("a.jpg", lambda: PNG, RED),
    "capital letters": ("A.JPEG", lambda: JPEG, RED),
    "CMYK": ("a.jpg", cmyk, RED),
    "palette": ("a.png", lambda: encoded(drawn(mode="P"), "PNG"), RED),
    "palette with transparency": ("a.gif", lambda: encoded(drawn(mode="P"), "GIF", transparency=255), RED),
    "grey": ("a.png", lambda: encoded(drawn(mode="L"), "PNG"), (76, 76, 76)),
    "black and white": ("a.tif", lambda: encoded(Image.new("1", (80, 60), 1), "TIFF"), WHITE),
    "16 bits": ("a.png", sixteen_bit, (155, 155, 155)),
    "16 bits TIFF": (
        "a.tiff",
        lambda: encoded(Image.fromarray(np.full((60, 80), 40_000, np.uint16)), "TIFF"),
        (155,) * 3,
    ),
    "floating point": (
        "a.tif",
        lambda: encoded(Image.fromarray(np.full((60, 80), 0.5, np.float32)), "TIFF"),
        (127,) * 3,
    ),
    "grey with alpha": ("a.png", lambda: encoded(Image.new("LA", (80, 60), (0, 1)), "PNG"), WHITE),
    "animated GIF, its first frame": ("a.gif", lambda: animated("GIF"), RED),
    "animated WEBP, its first frame": ("a.webp", lambda: animated("WEBP"), RED),
    "animated PNG, its first frame": ("a.png", lambda: animated("PNG"), RED),
    "BMP": ("a.bmp", lambda: encoded(drawn(), "BMP"), RED),
    "TIFF": ("a.tif", lambda: encoded(drawn(), "TIFF"), RED),
    "progressive JPEG": ("a.jpg", lambda: encoded(drawn(), "JPEG", progressive=True), RED),
    "HEIC": ("a.heic", heic, RED),
    "a JPEG called heic": ("a.heic", lambda: JPEG, RED),
    "a HEIC called jpg": ("a.jpg", heic, RED),
    "1:100": ("a.png", lambda: encoded(drawn((2000, 20)), "PNG"), None),
    "trailing bytes": ("a.jpg", lambda: JPEG + b"more" * 1000, RED),
}


@pytest.mark.parametrize(("name", "content", "colour"), READ.values(), ids=READ)
def test_an_odd_image_is_read_as_what_it_shows(folder, name, content, colour):
    (folder / name).write_bytes(content())
    report = prepare(folder)
    assert report.refused == {}
    (made,) = (image for image in report.kept if image.source == name)
    with Image.open(report.folder / made.file) as image:
        if colour:
            assert np.abs(np.subtract(image.getpixel((2, 16)), colour)).max() <= 8
        else:
            assert any(finding.image == name and finding.check == "extreme aspect" for finding in report.findings)


def test_a_photograph_taken_sideways_is_turned_upright(folder):
    (folder / "a.jpg").write_bytes(sideways())
    image = read_image(folder / "a.jpg")
    # Its left half was red; turned clockwise, the upper half is.
    assert image.size == (60, 80)
    assert image.getpixel((30, 5))[0] > 200 and image.getpixel((30, 75))[2] > 200
    assert len(prepare(folder).kept) == 3


CAPTIONS = {
    "UTF-8": ("ein größerer Hund 犬".encode(), "ein größerer Hund 犬"),
    "UTF-8 with a mark": ("\ufeffa dog".encode(), "a dog"),
    "UTF-16": ("ein größerer Hund".encode("utf-16"), "ein größerer Hund"),
    "UTF-16, big end first": (b"\xfe\xff" + "a dog".encode("utf-16-be"), "a dog"),
    "several lines": (b"a dog\r\n\r\n  on grass\n", "a dog on grass"),
}


@pytest.mark.parametrize(("content", "caption"), CAPTIONS.values(), ids=CAPTIONS)
def test_a_caption_is_read_whatever_program_wrote_it(folder, content, caption):
    (folder / "one.txt").write_bytes(content)
    (image,) = (image for image in prepare(folder).kept if image.source == "one.png")
    assert image.caption == caption


BAD_CAPTIONS = {
    "Latin-1": ("ein größerer Hund".encode("latin-1"), "is not UTF-8 text; save it again as UTF-8"),
    "UTF-16 without a mark": ("a dog".encode("utf-16-le"), "is not text; save it again as UTF-8"),
    "a picture called txt": (PNG, "is not UTF-8 text"),
    "a book": (b"a dog " * 50_000, "is too long to be a caption"),
}


@pytest.mark.parametrize(("content", "sentence"), BAD_CAPTIONS.values(), ids=BAD_CAPTIONS)
def test_an_image_whose_caption_cannot_be_read_is_refused_with_the_reason(folder, content, sentence):
    (folder / "a.png").write_bytes(PNG)
    (folder / "a.txt").write_bytes(content)
    report = prepare(folder)
    assert list(report.refused) == ["a.png"] and sentence in report.refused["a.png"]


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\xef\xbb\xbf"])
def test_an_empty_caption_is_a_finding(folder, content):
    (folder / "one.txt").write_bytes(content)
    report = prepare(folder)
    assert any(finding.image == "one.png" and finding.check == "caption" for finding in report.findings)


def test_two_images_of_one_stem_do_not_share_a_caption_by_accident(folder):
    (folder / "one.jpg").write_bytes(JPEG)
    (folder / "one.png.txt").write_text("a PNG")
    (folder / "one.txt").write_text("either")
    captions = {image.source: image.caption for image in prepare(folder).kept}
    assert (captions["one.png"], captions["one.jpg"]) == ("a PNG", "either")


def test_what_is_no_picture_is_listed_and_clutter_is_not(folder):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._one.png", ".ipynb_checkpoints/one.png", "__MACOSX/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"clutter")
    (folder / "movie.mp4").write_bytes(b"movie")
    (folder / "IMG_0001").write_bytes(JPEG)
    (folder / "notes.txt").write_text("my notes")
    (folder / "more.zip").write_bytes(b"PK")
    ignored = prepare(folder).ignored
    assert ignored == {
        "IMG_0001": "a JPEG picture by another name; rename it to end in .jpeg",
        "more.zip": "a zip inside; unpack it, or give it as the source",
        "movie.mp4": "not a picture by its name",
        "notes.txt": "a text without a picture of its name",
    }


def test_names_of_any_script_and_spaces_come_through(folder):
    for name in ("犬 と 猫.png", "كلب.png", "größe.png", "a  b.png", "emoji🐕.png", "-rf.png", "100%.png", "it's.png"):
        (folder / name).write_bytes(PNG)
    report = prepare(folder)
    assert len(report.kept) == 10 and report.refused == {}


def test_a_folder_called_like_a_picture_is_looked_into(folder):
    (folder / "sub.png").mkdir()
    (folder / "sub.png" / "three.png").write_bytes(PNG)
    assert "sub.png/three.png" in {image.source for image in prepare(folder).kept}


@pytest.mark.skipif(os.name == "nt", reason="Windows lets only administrators make links")
def test_links_that_loop_or_lead_nowhere_are_named(folder):
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "again").symlink_to(folder)
    (folder / "good.png").symlink_to(folder / "one.png")
    report = prepare(folder)
    assert set(report.refused) == {"loop.png", "gone.png"}
    assert all("leads nowhere" in reason for reason in report.refused.values())
    assert report.ignored == {"again": "a link to a folder, which is not followed; give that folder itself"}
    assert "good.png" in {image.source for image in report.kept}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_a_pipe_called_like_a_picture_does_not_hang(folder):
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe")
    report = prepare(folder)
    assert list(report.refused) == ["pipe.png"] and list(report.ignored) == ["pipe"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator may read everything")
def test_what_may_not_be_read_is_named(folder):
    (folder / "secret.png").write_bytes(PNG)
    (folder / "secret.png").chmod(0)
    (folder / "closed").mkdir()
    (folder / "closed" / "x.png").write_bytes(PNG)
    (folder / "closed").chmod(0)
    try:
        refused = prepare(folder).refused
    finally:
        (folder / "closed").chmod(0o700)
    assert set(refused) == {"secret.png", "closed"}
    assert all("Permission denied" in reason for reason in refused.values())


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**dict.fromkeys(GOOD, PNG), **files}.items():
            archive.writestr(name, content)
    return path


def test_a_zip_writes_nothing_outside_and_loses_nothing(tmp_path):
    names = ["../up.png", "/root.png", "a/../../b.png", "C:\\x.png", "..\\win.png"]
    report = prepare(zipped(tmp_path / "photos.zip", dict.fromkeys(names, PNG)))
    assert len(report.kept) + len(report.refused) == len(GOOD) + len(names)
    assert {path.name for path in tmp_path.iterdir()} - {"workspace", ".out.lock"} == {"photos.zip", "out"}


def test_a_file_in_a_zip_that_unpacks_to_too_much_is_refused_and_the_others_are_not(tmp_path):
    path = zipped(tmp_path / "photos.zip", {"bomb.png": b""})
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x01\x02", 0, content.rfind(b"bomb.png"))
    content[at + 24 : at + 28] = (2 * 10**9).to_bytes(4, "little")
    path.write_bytes(content)
    report = prepare(path)
    assert list(report.refused) == ["bomb.png"]
    assert "unpacks to more than 1 GB" in report.refused["bomb.png"]


def test_a_zip_of_zeros_that_claims_to_be_small_is_refused(tmp_path):
    path = zipped(tmp_path / "photos.zip", {"bomb.png": b"\0" * 20_000_000})
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x01\x02", 0, content.rfind(b"bomb.png"))
    content[at + 24 : at + 28] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    report = prepare(path)
    assert list(report.refused) == ["bomb.png"]
    assert not any(path.stat().st_size > 10**6 for path in tmp_path.rglob("*") if path.is_file())


def test_a_link_in_a_zip_reads_nothing_from_the_machine(tmp_path):
    path = zipped(tmp_path / "photos.zip", {})
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
    assert list(prepare(path).refused) == ["link.png"]


def test_every_suffix_that_is_said_to_be_read_is_read(folder):
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".heic": "HEIF", ".heif": "HEIF"}
    heic()
    for suffix in SUFFIXES:
        (folder / f"x{suffix}").write_bytes(encoded(drawn(), kinds.get(suffix, suffix[1:].upper())))
    report = prepare(folder)
    assert report.refused == {} and len(report.kept) == 2 + len(SUFFIXES)


def test_a_folder_with_nothing_but_bad_input_is_one_sentence_with_every_reason(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, content in (("a.jpg", b""), ("b.png", PNG[:50]), ("c.dng", b"raw")):
        (tmp_path / "photos" / name).write_bytes(content)
    with pytest.raises(DbkitError) as raised:
        prepare_dataset(tmp_path / "photos", tmp_path / "out", look_for_text=False)
    assert all(name in str(raised.value) for name in ("a.jpg", "b.png", "c.dng"))
    assert not (tmp_path / "out").exists()
