"""What the doctor finds in damaged pictures, and that it leaves good ones alone."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

import dbkit
from dbkit.doctor import examine
from dbkit.measures import Measures, fingerprint, measure

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "dreambooth"
DRAWINGS = Path(__file__).parents[1] / "data_templates"

needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the photographs of {PHOTOS} are not here")


@pytest.fixture(scope="module")
def photos():
    found = sorted(PHOTOS.rglob("*.jpg"))
    assert len(found) >= 12
    # Half the size, for speed: they are looked at in 512 px.
    return {f"{path.parent.name}/{path.name}": Image.open(path).convert("RGB").reduce(2) for path in found}


@pytest.fixture(scope="module")
def some(photos):
    """One photograph of each subject."""
    return {name: photo for name, photo in photos.items() if name.endswith("00.jpg")}


def found(images, resolution=512, **settings):
    """The findings in pictures, as pairs (check, image), apart from their number."""
    settings = {"method": "dreambooth", "cropped": True, "captions": {}, **settings}
    measured = {name: measure(image, text=False) for name, image in images.items()}
    findings = examine(measured, settings.pop("captions"), resolution=resolution, **settings)
    return [(finding.check, finding.image) for finding in findings if finding.check != "too few"]


def said(images, captions=None, **settings):
    """The findings in measures."""
    settings = {"method": "dreambooth", "cropped": True, "resolution": 512, **settings}
    return examine(images, captions or {}, **settings)


def every(check, images):
    return [(check, name) for name in images]


def scene(seed=0, size=(640, 512)):
    """A picture of many sharp ellipses, other for each seed."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(int(value) for value in random.integers(60, 200, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, a, b = random.integers(0, size[0]), random.integers(0, size[1]), *random.integers(10, 90, 2)
        colour = tuple(int(value) for value in random.integers(20, 230, 3))
        draw.ellipse((int(x - a), int(y - b), int(x + a), int(y + b)), fill=colour)
    return image


def cut_out(background):
    """A scene in an oval on a plain background, as people cut their subjects out."""
    mask = Image.new("L", (640, 512), 0)
    ImageDraw.Draw(mask).ellipse((170, 60, 470, 450), fill=255)
    return Image.composite(scene(3), Image.new("RGB", mask.size, background), mask)


def moved(image, length, down=0):
    """The image as a camera sees it that moves: the mean over so many places."""
    pixels = np.asarray(image, dtype=np.float32)
    total = sum(np.roll(pixels, (step * down, step), (0, 1)) for step in range(length))
    return Image.fromarray((total / length).astype(np.uint8))


def lit(image, factor):
    return image.point(lambda value: min(value * factor, 255))


def barred(image, colour, thick=0.06):
    bar = round(image.height * thick)
    whole = Image.new("RGB", (image.width, image.height + 2 * bar), colour)
    whole.paste(image, (0, bar))
    return as_jpeg(whole, 85)


def as_jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def plain(width=640, height=640, bits="0" * 64, mirrored="f" * 64, **figures):
    """Measures in which nothing is wrong."""
    good = {"blur": 0.2, "burnt": 0.0, "glow": 0.0, "light": 200.0, "border": 0.0, "text": 0.0}
    return Measures(width, height, phash=bits, mirrored=mirrored, **{**good, **figures})


def different(count):
    """Measures of pictures that do not equal each other."""
    random = np.random.default_rng(0)
    return {f"{n}.png": plain(bits=random.bytes(32).hex(), mirrored=random.bytes(32).hex()) for n in range(count)}


@needs_photos
def test_good_photographs_are_left_alone(photos):
    assert found(photos) == []


@pytest.mark.parametrize("side", [256, 32])
def test_the_drawings_that_come_with_dbkit_are_left_alone(side):
    drawings = {path.name: Image.open(path).convert("RGB") for path in DRAWINGS.rglob("*.png")}
    assert len(drawings) > 20
    small = {name: image.resize((side, side), Image.Resampling.LANCZOS) for name, image in drawings.items()}
    assert found(small, 32) == []


@pytest.mark.parametrize("background", ["white", "black", (200, 190, 60)])
def test_a_cut_out_is_left_alone(background):
    assert found({"a.png": cut_out(background)}) == []
    assert found({"a.jpg": as_jpeg(cut_out(background), 85)}) == []


DAMAGES = {
    "blurred": lambda photo: photo.filter(ImageFilter.GaussianBlur(photo.width / 100)),
    "overexposed": lambda photo: lit(photo, 3),
    "underexposed": lambda photo: lit(photo, 0.15),
    "small": lambda photo: photo.resize((200, 200), Image.Resampling.LANCZOS),
}


@needs_photos
@pytest.mark.parametrize("check", DAMAGES)
def test_a_damaged_photograph_is_found(some, check):
    assert found({name: DAMAGES[check](photo) for name, photo in some.items()}) == every(check, some)


@needs_photos
@pytest.mark.parametrize("down", [0, 1])
def test_motion_is_found_as_blur(some, down):
    length = 13 if down == 0 else 9
    assert found({name: moved(photo, length, down) for name, photo in some.items()}) == every("blurred", some)


@needs_photos
@pytest.mark.parametrize("turn", [None, Image.Transpose.ROTATE_90])
def test_bars_are_found(some, turn):
    damaged = {name: barred(photo, "black") for name, photo in some.items()}
    turned = {name: image.transpose(turn) if turn is not None else image for name, image in damaged.items()}
    assert found(turned) == every("border", some)


@pytest.mark.parametrize("colour", ["white", "black", (150, 40, 40)])
def test_a_frame_is_found_and_measured(colour):
    framed = ImageOps.expand(scene().crop((0, 0, 512, 512)), 32, colour)
    assert measure(framed, text=False).border == pytest.approx(1 - (512 / 576) ** 2, abs=0.01)


def test_a_frame_hides_neither_blur_nor_darkness_nor_a_copy():
    framed = ImageOps.expand(lit(scene().filter(ImageFilter.GaussianBlur(5)), 0.15), 30, "white")
    assert found({"a.png": framed}) == [("blurred", "a.png"), ("underexposed", "a.png"), ("border", "a.png")]
    large = scene().resize((960, 768), Image.Resampling.LANCZOS)
    both = found({"a.png": large, "bars.png": barred(scene(), "black")})
    assert both == [("border", "bars.png"), ("near-duplicate", "bars.png")]


def test_bars_of_two_colours_are_a_scene():
    image = scene()
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 640, 40), fill="navy")
    draw.rectangle((0, 472, 640, 512), fill="tan")
    assert found({"a.png": image}) == []


def test_a_sharp_subject_before_a_blurred_background_is_sharp():
    mask = Image.new("L", (640, 512), 0)
    ImageDraw.Draw(mask).ellipse((220, 156, 420, 356), fill=255)
    soft = scene().filter(ImageFilter.GaussianBlur(8))
    assert measure(Image.composite(scene(), soft, mask.filter(ImageFilter.GaussianBlur(6))), text=False).blur < 0.4
    assert measure(soft, text=False).blur > 0.4


def test_blur_does_not_depend_on_size_or_a_plain_surround():
    sharp, soft = scene(), scene().filter(ImageFilter.GaussianBlur(6))
    for factor in (1, 2, 4):
        size = (640 * factor, 512 * factor)
        sizes = [image.resize(size, Image.Resampling.LANCZOS) for image in (sharp, soft)]
        assert [measure(image, text=False).blur > 0.4 for image in sizes] == [False, True]
    # The surround is grown from the edge's own pixels, so that no new edge comes in.
    pixels = [np.pad(np.asarray(image), ((150, 150), (300, 300), (0, 0)), mode="edge") for image in (sharp, soft)]
    assert [measure(Image.fromarray(image), text=False).blur > 0.4 for image in pixels] == [False, True]


def test_a_picture_without_anything_in_it_is_blurred():
    assert measure(Image.new("RGB", (300, 200), "teal"), text=False).blur == 1
    assert measure(Image.new("RGB", (40, 40), "teal"), text=False).blur == 0


@pytest.mark.parametrize("size", [(8, 8), (9, 2000), (70, 64), (3000, 40)])
def test_every_size_can_be_measured(size):
    seen = measure(scene(size=size), text=True)
    assert (seen.width, seen.height) == size
    assert len(seen.phash) == len(seen.mirrored) == 64


COPIES = {
    "compressed": lambda image: as_jpeg(image, 50),
    "smaller": lambda image: image.resize((image.width // 2, image.height // 2)),
    "mirrored": ImageOps.mirror,
    "cropped": lambda image: ImageOps.crop(image, round(image.width * 0.02)),
    "all of it": lambda image: ImageOps.mirror(as_jpeg(ImageOps.crop(image, round(image.width * 0.02)), 60)),
}


@needs_photos
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_found_and_the_better_one_kept(photos, some, how):
    name = "dog6/00.jpg"
    others = {other: photo for other, photo in some.items() if other != name}
    copy = COPIES[how](photos[name])
    assert found({"a copy.jpg": copy, name: photos[name], **others}, 64) == [
        # Of two of the same size the later one is reported.
        ("near-duplicate", name if copy.size == photos[name].size else "a copy.jpg")
    ]


def test_a_copy_names_the_other_and_one_of_each_group_is_left():
    near = "f" * 5 + "0" * 59  # 20 bits from the plain one
    images = {"a.png": plain(500, 500), "b.png": plain(900, 900, bits=near), "c.png": plain(900, 900)}
    findings = [finding for finding in said(images) if finding.check == "near-duplicate"]
    assert [finding.image for finding in findings] == ["a.png", "c.png"]
    assert findings[0].says.startswith("a.png nearly equals b.png (20 of 256 bits differ)")
    reflected = {"a.png": plain(), "b.png": plain(bits="f" * 60 + "0" * 4, mirrored="0" * 64)}
    assert "b.png is nearly the mirror image of a.png" in said(reflected)[0].says


def test_an_instance_image_among_the_class_images_is_found():
    image = scene()
    class_images = {"1.png": fingerprint(scene(1)), "2.png": fingerprint(ImageOps.mirror(image))}
    assert found({"dog.png": image}, class_images=class_images) == [("class", "dog.png")]
    findings = said({"dog.png": measure(image, text=False)}, class_images=class_images)
    assert "the class image 2.png" in findings[0].says


def test_enlargement_is_told_with_its_factor():
    assert "enlarged 2 times to 512" in said({"a.png": plain(256, 400)})[0].says
    # 490 pixels are enlarged by 1.04, which nobody sees.
    assert [finding.check for finding in said({"a.png": plain(490, 600)})] == ["too few"]
    # A whole image is brought to the area of the square.
    assert [finding.check for finding in said({"a.png": plain(400, 900)}, cropped=False)] == ["too few"]
    assert "enlarged 2.6 times" in said({"a.png": plain(200, 200)}, cropped=False)[0].says


def test_extreme_aspect_depends_on_the_crop():
    assert "the square keeps 40%" in said({"a.png": plain(1500, 600)})[0].says
    assert [finding.check for finding in said({"a.png": plain(1500, 600)}, cropped=False)] == ["too few"]
    assert "sides of 1 to 3" in said({"a.png": plain(1800, 600)}, cropped=False)[0].says
    assert [finding.check for finding in said({"a.png": plain(1600, 900)})] == ["too few"]


def test_native_training_wants_a_caption_for_each_image():
    images = different(3)
    captions = {"0.png": "a red boat", "1.png": None, "2.png": "  "}
    findings = said(images, captions, method="native")
    told = {(finding.check, finding.image): finding.says for finding in findings}
    assert list(told) == [("caption", "1.png"), ("caption", "2.png"), ("captions", None), ("too few", None)]
    assert "has no caption" in told["caption", "1.png"] and "empty caption file" in told["caption", "2.png"]
    assert "1 of 3 images have a caption and these have none: 1.png, 2.png" in told["captions", None]


def test_a_subject_needs_no_captions_but_all_or_none():
    images = different(5)
    assert said(images, dict.fromkeys(images)) == []
    assert [finding.check for finding in said(images, {"0.png": "a dog"})] == ["captions"]
    assert said(images, dict.fromkeys(images, "photo of zwx dog")) == []


def test_long_and_repeated_captions_are_told():
    images = different(20)
    captions = {name: f"boat {name}" for name in images} | {"3.png": "a  cat", "4.png": "a cat", "5.png": "word " * 76}
    findings = said(images, captions, method="native", count_tokens=lambda text: len(text.split()))
    assert [(finding.check, finding.image) for finding in findings] == [("caption", "5.png"), ("captions", None)]
    assert "76 tokens, of which the model reads the first 75" in findings[0].says
    assert '2 images have the same caption, "a cat" (3.png, 4.png)' in findings[1].says
    exact = captions | {"4.png": "a dog", "5.png": "word " * 75}
    assert said(images, exact, method="native", count_tokens=lambda text: len(text.split())) == []


@pytest.mark.parametrize(("method", "count"), [("dreambooth", 5), ("native", 20)])
def test_too_few_images_are_told(method, count):
    captions = {f"{n}.png": f"caption {n}" for n in range(count)}
    assert said(different(count), captions, method=method) == []
    few = said(different(count - 1), captions, method=method)
    assert [finding.check for finding in few] == ["too few"]
    assert f"{count - 1} images are few for {method} training" in few[0].says
    assert ("100 or more" in few[0].says) == (method == "native")


def test_each_finding_is_a_sentence_with_its_image_and_figure():
    damaged = plain(blur=0.8, burnt=0.3, glow=0.2, light=20.0, border=0.12, text=0.05, words="SAMPLE")
    findings = said({"a.png": damaged})[:-1]
    checks = ["blurred", "overexposed", "underexposed", "border", "text"]
    assert [finding.check for finding in findings] == checks
    for finding, figure in zip(findings, ["0.80", "30 %", "8%", "12 %", '5 % of the picture ("SAMPLE")']):
        assert finding.says.startswith("a.png ") and figure in finding.says and ";" in finding.says
    assert [finding.check for finding in said({"a.png": replace(damaged, text=None)})] == [*checks[:-1], "too few"]


def written(image, text, size, opacity=255):
    layer = Image.new("RGBA", image.size, (255, 255, 255, 0))
    place, font = (image.width * 0.15, image.height * 0.6), ImageFont.load_default(image.width * size)
    ImageDraw.Draw(layer).text(place, text, font=font, fill=(255, 255, 255, opacity))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


@needs_photos
def test_text_is_found_and_read(some):
    pytest.importorskip("rapidocr")
    for name, photo in some.items():
        for text, size, opacity in (("SAMPLE", 0.12, 128), ("my holiday 2022", 0.05, 255)):
            seen = measure(written(photo, text, size, opacity))
            assert "text" in [finding.check for finding in said({name: seen})]
            assert "MPLE" in seen.words or "holiday" in seen.words
        assert measure(photo).text == 0


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime"])
def test_without_a_reader_text_is_not_looked_for(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from PIL import Image; from dbkit.measures import measure\n"
        "print(measure(Image.new('RGB', (100, 100))).text)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root())
    assert done.stdout.strip() == "None"


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, dbkit.doctor, dbkit.faces\n"
        "print([name for name in 'numpy PIL cv2 imagehash rapidocr scipy'.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root())
    assert done.stdout.strip() == "[]"


def root():
    return Path(dbkit.__file__).parents[1]
