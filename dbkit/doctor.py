"""Look at photographs before training and say what may harm. Nothing is changed or deleted; only the user can judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from dbkit.errors import some
from dbkit.measures import HASH_SIDE, Measures

# Thresholds, with what was measured on the pictures that measures.py names.

# An enlargement that nobody sees.
ENLARGED = 1.05
# Sharp photographs and drawings reach 0.21, cut-outs 0.31, a sharp subject before a blurred background 0.38; Gaussian
# blur with a radius of 1 % of the side gives at least 0.81 (0.5 %: 0.69), motion over 2 % of it 0.43.
BLURRED = 0.40
# Burnt: two channels at their end, and bright. Undamaged photographs have no such pixels, drawings 0.065 at most,
# photographs three times as bright 0.087 at least. Burnt and glowing pixels together are at least 0.25 of those
# photographs, and at most 0.15 of the drawings that have enough burnt ones.
BURNT, BURNT_OR_GLOWING = 0.06, 0.20
# What nineteen of twenty pixels stay below, of 255: at least 134 in undamaged pictures and cut-outs, at most 35 where
# the light is down to 15 %, at most 58 at a quarter.
DARK = 64
# Bits of 256 by which two pictures' hashes differ. Distinct photographs of one sitting differ by 82 and more (cut out
# and put on white: 62), a copy saved as JPEG by 4, one with 2 % cut off every side by at most 54, mirrored or not;
# unrelated pictures by about 128.
SAME = 56
# A crop that throws away more than half of a picture often cuts the subject; 16:9 keeps 56 %.
CROP_KEEPS = 0.5
# Without a crop. At the area of a square of 512 px this is 324 x 810: what is left across is under two thirds of what
# the model has learnt to draw in, and along it repeats its subject.
EXTREME = 2.5
# A date of 3 % of the height takes 0.006 of the picture.
TEXT_SHARE = 0.002

MAX_TOKENS = 75
FEWEST = {"dreambooth": 5, "native": 20}
_ENOUGH = {
    "dreambooth": "add some, from other sides and in other surroundings: 5 to 20 are usual",
    "native": "a style wants many, 100 or more are recommended: add some",
}


@dataclass(frozen=True)
class Finding:
    """Something that may harm."""

    # One of config.DOUBTS, or "captions", "too few", "class" for what concerns the whole set.
    check: str
    # Name of the image, None for the whole set.
    image: str | None
    # One sentence: what is wrong, and what to do next.
    says: str


def examine(
    images: dict[str, Measures],
    captions: dict[str, str | None],
    *,
    resolution: int,
    method: Literal["dreambooth", "native"],
    cropped: bool,
    count_tokens: Callable[[str], int] | None = None,
    class_images: dict[str, str] | None = None,
) -> list[Finding]:
    """What may harm in these images and captions, by image in the order given, then what concerns the whole set.

    captions has None for an image without a caption file and "" for an empty one. cropped says whether a square will be
    cut. count_tokens counts a caption's tokens without start and end. class_images are class images by name, each as
    its fingerprint().
    """
    copies = _copies(images)
    findings = []
    for name, seen in images.items():
        told = [*_size(seen, resolution, cropped), *_quality(seen), *_additions(seen)]
        if name in copies:
            told.append(("near-duplicate", copies[name]))
        told += _caption(captions.get(name), method, count_tokens)
        told += _class(seen, class_images or {})
        findings += [Finding(check, name, f"{name} {says}") for check, says in told]
    together = [*_caption_set(images, captions, method), *_number(images, method)]
    return findings + [Finding(check, None, says) for check, says in together]


# What is wrong with one image: the check, and a sentence that begins with the image's name, without it.
Told = Iterable[tuple[str, str]]


def _size(seen: Measures, resolution: int, cropped: bool) -> Told:
    short, long = sorted((seen.width, seen.height))
    size = f"{seen.width} x {seen.height} pixels"
    # A whole image is brought to the area of the square, not to its side.
    factor = resolution / (short if cropped else math.sqrt(short * long))
    if factor > ENLARGED:
        yield (
            "small",
            f"has {size} and is enlarged {factor:.2g} times to {resolution}, so it looks soft; take a larger original",
        )
    if cropped and short < CROP_KEEPS * long:
        yield (
            "extreme aspect",
            f"has {size}, of which the square keeps {short / long:.0%}; crop it by hand around the subject",
        )
    elif not cropped and long > EXTREME * short:
        yield (
            "extreme aspect",
            f"has {size}, sides of 1 to {long / short:.2g}, which is longer than the model can learn from; crop it to "
            f"1 to {EXTREME:g} or less",
        )


def _quality(seen: Measures) -> Told:
    if seen.blur > BLURRED:
        yield (
            "blurred",
            f"is blurred ({seen.blur:.2f} of 1; sharp is below {BLURRED:.2f}), and the model learns blur too; take a "
            "sharper one",
        )
    if seen.burnt >= BURNT and seen.burnt + seen.glow >= BURNT_OR_GLOWING:
        yield (
            "overexposed",
            f"is burnt out to white over {_percent(seen.burnt)}; take one with less light, or darken the raw file",
        )
    if seen.light < DARK:
        yield (
            "underexposed",
            f"is dark: all but the brightest 5 % lies below {seen.light / 255:.0%} of full brightness; take one with "
            "more light, or brighten it",
        )


def _additions(seen: Measures) -> Told:
    if seen.border:
        yield (
            "border",
            f"has bars or a frame over {_percent(seen.border)}, which the model would learn to draw; crop them off",
        )
    if seen.text is not None and seen.text >= TEXT_SHARE:
        read = seen.words if len(seen.words) <= 40 else f"{seen.words[:40]}…"
        yield (
            "text",
            f'has text over {_percent(seen.text)} ("{read}"), which the model would learn to draw; crop or retouch it '
            "unless it belongs to the subject",
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} % of the picture"


def _copies(images: dict[str, Measures]) -> dict[str, str]:
    """What is said of each image that nearly equals a larger one, or an earlier one of the same size.

    Images are only compared with those that have nothing said of them, so one of each group is left.
    """
    # Python's sort is stable: the given order decides among equals.
    by_size = sorted(images, key=lambda name: -images[name].width * images[name].height)
    kept: dict[str, tuple[int, int]] = {}
    copies = {}
    for name in by_size:
        own, mirror = int(images[name].phash, 16), int(images[name].mirrored, 16)
        for other, (hashed, reflected) in kept.items():
            straight = (own ^ hashed).bit_count()
            turned = min((own ^ reflected).bit_count(), (mirror ^ hashed).bit_count())
            if min(straight, turned) <= SAME:
                how = "nearly equals" if straight <= turned else "is nearly the mirror image of"
                copies[name] = (
                    f"{how} {other} ({min(straight, turned)} of {HASH_SIDE**2} bits differ), which then counts twice; "
                    "leave one of them out"
                )
                break
        else:
            kept[name] = own, mirror
    return copies


def _class(seen: Measures, class_images: dict[str, str]) -> Told:
    for other, hashed in class_images.items():
        if min(_distance(seen.phash, hashed), _distance(seen.mirrored, hashed)) <= SAME:
            yield (
                "class",
                f"also is the class image {other}, which has to show another of its class; take {other} out of the "
                "class images",
            )


def _distance(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def _caption(caption: str | None, method: str, count_tokens: Callable[[str], int] | None) -> Told:
    if caption is None:
        if method == "native":
            yield "caption", "has no caption, and native training learns from captions; write one (dbkit caption does)"
    elif not caption.strip():
        yield "caption", "has an empty caption file; write what the image shows, or remove the file"
    elif count_tokens is not None and (tokens := count_tokens(caption)) > MAX_TOKENS:
        yield (
            "caption",
            f"has a caption of {tokens} tokens, of which the model reads the first {MAX_TOKENS}; shorten it",
        )


def _caption_set(images: dict[str, Measures], captions: dict[str, str | None], method: str) -> Told:
    without = [name for name in images if not (captions.get(name) or "").strip()]
    if without and len(without) < len(images):
        yield (
            "captions",
            f"{len(images) - len(without)} of {len(images)} images have a caption and these have none: {some(without)}"
            "; caption all of them or none",
        )
    if method != "native":
        return
    same: dict[str, list[str]] = {}
    for name in images:
        same.setdefault(" ".join((captions.get(name) or "").split()), []).append(name)
    for caption, names in same.items():
        if caption and len(names) > 1:
            yield (
                "captions",
                f'{len(names)} images have the same caption, "{caption}" ({some(names)}); say what tells them apart',
            )


def _number(images: dict[str, Measures], method: str) -> Told:
    if len(images) < FEWEST[method]:
        plural = "image is" if len(images) == 1 else "images are"
        yield "too few", f"{len(images)} {plural} few for {method} training; {_ENOUGH[method]}"
