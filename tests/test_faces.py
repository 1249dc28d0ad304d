"""Where faces are found, and the squares that follow from them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

import dbkit
from dbkit.faces import background_box, face_place, head_box, largest_face

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "dreambooth"

cv2 = pytest.importorskip("cv2")


def portrait(size, *faces):
    """A drawn person for each face, given as left, top and side of the face; OpenCV's detector finds them by itself."""
    image = Image.new("RGB", size, (120, 140, 170))
    draw = ImageDraw.Draw(image)
    for left, top, side in faces:

        def oval(x, y, a, b, grey, left=left, top=top, side=side):
            box = (left + side * (x - a), top + side * (y - b), left + side * (x + a), top + side * (y + b))
            draw.ellipse(box, fill=(grey,) * 3)

        oval(0.5, 0.42, 0.46, 0.62, 60)  # hair
        oval(0.5, 1.75, 1.0, 0.55, 80)  # shoulders
        oval(0.5, 0.52, 0.40, 0.56, 195)  # skin
        for eye in (0.32, 0.68):
            oval(eye, 0.40, 0.115, 0.065, 120)
            oval(eye, 0.41, 0.055, 0.04, 35)
            oval(eye, 0.30, 0.12, 0.03, 60)  # brow
        oval(0.5, 0.58, 0.05, 0.10, 175)  # nose
        oval(0.5, 0.645, 0.07, 0.018, 110)
        oval(0.5, 0.80, 0.15, 0.04, 90)  # mouth
    return image.filter(ImageFilter.GaussianBlur(3))


def centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@pytest.mark.parametrize("scale", [1, 3])
def test_a_face_is_found_where_it_is(scale):
    box = largest_face(portrait((640 * scale, 400 * scale), (400 * scale, 80 * scale, 160 * scale)))
    assert centre(box) == pytest.approx((480 * scale, 165 * scale), abs=14 * scale)
    assert 130 * scale < box[2] - box[0] < 210 * scale


def test_the_largest_of_two_faces_is_taken():
    box = largest_face(portrait((800, 500), (100, 100, 90), (500, 100, 180)))
    assert centre(box)[0] == pytest.approx(590, abs=15)


def test_without_a_face_nothing_is_found():
    grey = np.random.default_rng(0).integers(0, 255, (400, 600, 3), dtype=np.uint8)
    for image in (Image.new("RGB", (600, 400), "teal"), Image.fromarray(grey), Image.new("RGB", (8, 3000))):
        assert largest_face(image) is None
        assert face_place(image, largest_face(image)) == (0.5, 0.5)
        assert head_box(image, largest_face(image)) is None and background_box(image, largest_face(image)) is None


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"the photographs of {PHOTOS} are not here")
def test_dogs_and_toys_are_no_faces():
    photos = sorted(PHOTOS.rglob("*.jpg"))
    assert len(photos) >= 12
    assert [path for path in photos if largest_face(Image.open(path).convert("RGB"))] == []


@pytest.mark.parametrize(
    ("size", "face", "expected"),
    [
        ((900, 500), (430, 100, 160), (250, None)),  # the square can follow
        ((900, 500), (60, 100, 160), (140, None)),  # the face is nearer to the edge than half a square
        ((500, 900), (170, 300, 160), (None, 250)),
        ((500, 500), (50, 100, 160), (None, None)),  # nothing to choose
    ],
)
def test_the_square_is_centred_on_the_face_as_far_as_the_image_reaches(size, face, expected):
    image = portrait(size, face)
    place = face_place(image, largest_face(image))
    assert all(0 <= part <= 1 for part in place)
    side = min(size)
    left, top = (round((length - side) * part) for length, part in zip(size, place))
    x, y = centre(largest_face(image.crop((left, top, left + side, top + side))))
    for found, wanted in zip((x, y), expected):
        assert wanted is None or found == pytest.approx(wanted, abs=15)
    assert place[0] == 0.5 or size[0] > size[1]


@pytest.mark.parametrize("face", [(400, 150, 160), (20, 40, 150), (470, 200, 160)])
def test_the_head_is_a_square_inside_the_image_around_the_face(face):
    image = portrait((640, 480), face)
    left, top, right, bottom = largest_face(image)
    box = head_box(image, largest_face(image))
    assert box[2] - box[0] == box[3] - box[1] == pytest.approx(1.8 * (right - left), abs=2)
    assert box[0] >= 0 and box[1] >= 0 and box[2] <= 640 and box[3] <= 480
    assert box[0] <= left and box[1] <= top and box[2] >= right and box[3] >= bottom


@pytest.mark.parametrize(("left", "far"), [(600, 0), (60, 900)])
def test_the_background_is_a_square_without_the_person(left, far):
    image = portrait((900, 500), (left, 100, 120))
    box = background_box(image, largest_face(image))
    assert box[2] - box[0] == box[3] - box[1] > 250
    assert far in (box[0], box[2])
    # Nothing but the wall: one colour.
    assert np.ptp(np.asarray(image.crop(box)).astype(int), axis=(0, 1)).max() == 0


def test_no_background_is_cut_where_there_is_no_room():
    image = portrait((400, 500), (110, 120, 180))
    assert background_box(image, largest_face(image)) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("sys.modules['cv2'] = None", "is not installed"),
        ("import cv2; del cv2.data", "is not or lacks its detector"),
        ("import cv2; cv2.data.haarcascades = '/nowhere/'", "is not or lacks its detector"),
    ],
)
def test_without_the_detector_a_sentence_says_what_to_install(damage, reason):
    code = (
        f"import sys\n{damage}\nfrom PIL import Image; from dbkit.errors import DbkitError; from dbkit import faces\n"
        "try:\n    faces.largest_face(Image.new('RGB', (90, 60)))\nexcept DbkitError as error:\n    print(error)"
    )
    root = Path(dbkit.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert reason in done.stdout and 'pip install "opencv-python-headless<5"' in done.stdout
