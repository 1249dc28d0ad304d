"""Reading images upright, in RGB, whatever a camera, scanner or drawing program wrote; cutting squares from them."""

import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dbkit import DbkitError
from dbkit.images import View, crop_place, is_hidden, list_images, mask_of, read_image, read_mask, render


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    return exif


def pixels(image):
    return np.asarray(image).astype(int)


def quarters(width=24, height=16):
    """A picture whose quarters are red, green, blue and white, so that every turn and flip shows."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 2 - 1, height // 2 - 1), fill=(255, 0, 0))
    draw.rectangle((width // 2, 0, width, height // 2 - 1), fill=(0, 255, 0))
    draw.rectangle((0, height // 2, width // 2 - 1, height), fill=(0, 0, 255))
    return image


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_comes_out_as_the_camera_was_held(tmp_path, orientation, suffix):
    stored = quarters()
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif_of(orientation), **({"lossless": True} if suffix == "webp" else {}))
    assert (pixels(read_image(path)) == UPRIGHT[orientation](pixels(stored))).all()


def test_a_photograph_of_a_camera_held_upright_comes_out_rotated(tmp_path):
    stored = quarters()
    stored.save(tmp_path / "a.jpg", exif=exif_of(6), quality=95, subsampling=0)
    image = read_image(tmp_path / "a.jpg")
    assert image.size == (16, 24)
    assert np.abs(pixels(image) - np.rot90(pixels(stored), -1)).mean() < 5


def test_odd_tags_of_a_camera_do_not_keep_a_photograph_from_being_turned(tmp_path):
    # The maker's name, which is text, filed under a tag that is a fraction.
    exif = exif_of(6).tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x1f\x00\x02")
    quarters().save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (16, 24)


def palette_with_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 0, 0, 0, 0, 0, 0])
    for x in range(3):
        image.putpixel((x, 0), x)
    return image


@pytest.mark.parametrize(
    ("image", "facts"),
    [
        (Image.frombytes("RGBA", (3, 1), bytes([0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 255])), {}),
        (Image.frombytes("LA", (3, 1), bytes([0, 0, 0, 128, 0, 255])), {}),
        (palette_with_transparency(), {"transparency": bytes([0, 128, 255])}),
    ],
    ids=["RGBA", "LA", "palette"],
)
def test_what_is_transparent_becomes_white(tmp_path, image, facts):
    image.save(tmp_path / "a.png", **facts)
    read = read_image(tmp_path / "a.png")
    assert read.mode == "RGB"
    assert pixels(read).tolist() == [[[255] * 3, [127] * 3, [0] * 3]]


def test_a_scan_with_16_bits_of_grey_is_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    grey = pixels(read_image(tmp_path / "a.png"))
    assert grey.shape == (1, 256, 3)
    assert np.abs(grey[0, :, 0] - np.arange(256)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB", "YCbCr"])
def test_every_usual_mode_becomes_the_same_rgb(tmp_path, mode):
    image = quarters().convert("L").point(lambda value: 255 if value > 100 else 0)
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    image.convert("RGB").convert(mode).save(path)
    read = read_image(path)
    assert read.mode == "RGB"
    assert np.abs(pixels(read) - pixels(image.convert("RGB"))).max() <= 2


def test_a_photograph_for_print_keeps_its_colours(tmp_path):
    quarters().convert("CMYK").save(tmp_path / "a.jpg", quality=95, subsampling=0)
    assert np.abs(pixels(read_image(tmp_path / "a.jpg")) - pixels(quarters())).mean() < 5


def png(*chunks):
    """A PNG of these chunks, each a kind and its content."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        parts += [struct.pack(">I", len(content)), kind, content, struct.pack(">I", zlib.crc32(kind + content))]
    return b"".join(parts)


def header(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is text\n" * 50,
        png(),
        png((b"IHDR", b"cut")),
        png(header(8, 8), (b"IDAT", b""), (b"\xc0D]\xe3", b"")),
        png(header(8, 8), (b"IDAT", b""), (b"IEND", b"")),
    ],
    ids=["nothing", "text", "no header", "half a header", "damaged", "no pixels"],
)
def test_a_file_that_is_no_image_is_refused_by_name(tmp_path, content):
    (tmp_path / "dog.png").write_bytes(content)
    with pytest.raises(DbkitError, match=r"^dog.png cannot be read as an image \(.+\); replace it or take it out$"):
        read_image(tmp_path / "dog.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
def test_a_truncated_image_is_refused_by_name(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"dog.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DbkitError, match=rf"^dog.{suffix} cannot be read as an image \("):
        read_image(path)


@pytest.mark.parametrize("name", ["dog.heic", "dog.jpg"])
def test_a_heic_photograph_that_cannot_be_read_here_is_said_to_be_one(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DbkitError, match=rf"^{name} is a HEIC photograph; pip install pillow-heif, or save it as JPEG"):
        read_image(tmp_path / name)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DbkitError, match=r"^gone.png cannot be read as an image"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize(
    ("width", "height", "sentence"),
    [
        (12_500, 8_001, "huge.png has 12500 x 8001 pixels; make it smaller than 100 million"),
        (60_000, 60_000, "huge.png has far too many pixels; make it smaller than 100 million"),
    ],
)
def test_a_huge_image_is_refused_by_name_before_it_is_decoded_and_without_a_warning(tmp_path, width, height, sentence):
    (tmp_path / "huge.png").write_bytes(png(header(width, height), (b"IDAT", b""), (b"IEND", b"")))
    with warnings.catch_warnings(), pytest.raises(DbkitError) as caught:
        warnings.simplefilter("error")
        read_image(tmp_path / "huge.png")
    assert str(caught.value) == sentence


def extent(image):
    """Width and height of what is dark."""
    dark = pixels(image.convert("L")) < 128
    columns, rows = np.flatnonzero(dark.any(axis=0)), np.flatnonzero(dark.any(axis=1))
    return columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (257, 201), (1200, 200)])
@pytest.mark.parametrize("side", [64, 200, 512])
def test_a_circle_stays_a_circle(width, height, side):
    image = Image.new("RGB", (width, height), "white")
    centre, radius = (width / 2, height / 2), 60
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
    ImageDraw.Draw(image).ellipse(box, fill="black")
    result = render(image, (side, side))
    assert result.size == (side, side)
    wide, high = extent(result)
    assert abs(wide - high) <= 1
    assert wide == pytest.approx(2 * radius * side / min(width, height), rel=0.03, abs=2)


@pytest.mark.parametrize(
    ("place", "colours"),
    [((0, 0), {(255, 0, 0), (0, 0, 255)}), ((1, 0.5), {(0, 255, 0), (255, 255, 255)}), ((0.5, 1), None)],
)
def test_the_place_says_which_part_of_a_wide_image_is_kept(place, colours):
    kept = render(quarters(32, 16), (16, 16), View(place))
    found = {colour for _, colour in kept.getcolors()}
    assert found == (colours or {(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)})


def test_a_square_of_the_right_size_is_left_as_it_is():
    image = quarters(32, 32)
    assert (pixels(render(image, (32, 32))) == pixels(image)).all()


def test_images_are_listed_by_name_without_clutter_folders_and_other_files(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp", "._a.jpg", ".DS_Store", "notes.txt", "Thumbs.db", "movie.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.png").write_bytes(b"")
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c.webp"]


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        (".DS_Store", True),
        (".ipynb_checkpoints/x.png", True),
        ("a/Thumbs.db", True),
        ("__MACOSX/._x.png", True),
        ("desktop.ini", True),
        ("a/b.c/x.png", False),
        ("thumbs/x.png", False),
    ],
)
def test_system_clutter_is_known(path, hidden):
    assert is_hidden(Path(path)) is hidden


def test_the_crop_place_depends_on_the_seed_and_the_name_alone():
    assert crop_place(True, 5, "a.png") == (0.5, 0.5)
    places = [crop_place(False, seed, name) for seed, name in [(0, "a.png"), (0, "b.png"), (1, "a.png"), (0, "a.png")]]
    assert len(set(places)) == 3
    assert places[0] == places[3]
    assert all(0 <= part <= 1 for place in places for part in place)


# Masks.


def test_a_mask_lies_beside_the_image_or_in_its_transparency(tmp_path):
    image = quarters()
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "masked.jpg")
    opacity = Image.new("L", image.size, 255)
    opaque = image.copy()
    opaque.putalpha(opacity)
    opaque.save(tmp_path / "opaque.png")
    opacity.paste(40, (0, 0, 5, 5))
    image.putalpha(opacity)
    image.save(tmp_path / "clear.png")
    (tmp_path / "masks").mkdir()
    opacity.save(tmp_path / "masks" / "masked.png")
    assert mask_of(tmp_path / "plain.png") is None
    assert mask_of(tmp_path / "opaque.png") is None
    assert mask_of(tmp_path / "masked.jpg") == tmp_path / "masks" / "masked.png"
    assert mask_of(tmp_path / "clear.png") == tmp_path / "clear.png"
    (tmp_path / "masks" / "masked.jpg.png").write_bytes((tmp_path / "masks" / "masked.png").read_bytes())
    assert mask_of(tmp_path / "masked.jpg") == tmp_path / "masks" / "masked.jpg.png"
    for path in (tmp_path / "clear.png", tmp_path / "masks" / "masked.png"):
        assert (pixels(read_mask(path)) == pixels(opacity)).all()


def test_a_mask_is_upright(tmp_path):
    mask = Image.new("L", (24, 16), 0)
    mask.paste(255, (0, 0, 12, 8))
    mask.save(tmp_path / "mask.png", exif=exif_of(6))
    assert (pixels(read_mask(tmp_path / "mask.png")) == UPRIGHT[6](pixels(mask))).all()
