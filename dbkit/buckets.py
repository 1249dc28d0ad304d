"""Aspect-ratio buckets: the sizes that training images may have, and which of them suits an image.

The idea is NovelAI's (github.com/NovelAI/novelai-aspect-ratio-bucketing); the distance between shapes is that of the
logarithms, so that a portrait and the same picture turned are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from dbkit.train_config import TrainConfig

Size = tuple[int, int]


def bucket_sizes(base: int, max_area: int, step: int, min_side: int, max_side: int) -> list[Size]:
    """Every (width, height) in pixels: for each width the greatest height that max_area allows, and for each height.

    Sides are min_side plus a multiple of step, at most max_side; the square of side `base` is always there.
    """
    tall = set()
    for side in range(min_side, max_side + 1, step):
        if (most := min(max_side, max_area // side)) >= min_side:
            tall.add((side, most - (most - min_side) % step))
    return sorted({*tall, *((height, width) for width, height in tall), (base, base)}, key=lambda s: (s[0], -s[1]))


def sizes_of(config: TrainConfig) -> list[Size]:
    """The sizes that a training uses: its buckets, or the one square."""
    if not config.use_aspect_ratio_bucket:
        return [config.size]
    return bucket_sizes(config.resolution, *bucket_limits(config))


def bucket_limits(config: TrainConfig) -> tuple[int, int, int, int]:
    """Greatest area, step, shortest and longest side; those that are not given follow the resolution."""
    area, step, shortest, longest = usual_limits(config.resolution)
    return (
        config.bucket_max_area or area,
        config.bucket_step or step,
        config.bucket_min_side or shortest,
        config.bucket_max_side or longest,
    )


def usual_limits(side: int) -> tuple[int, int, int, int]:
    """The limits that suit a resolution: those of the published list at 512, multiples of 8 at any other."""
    return 3 * side * side // 2, max(8, 8 * round(side / 64)), max(8, 8 * round(side / 16)), 2 * side


def nearest(width: int, height: int, sizes: Iterable[Size]) -> Size:
    """The size whose shape is nearest to that of an image; of two equally near ones the larger."""
    shape = math.log(width / height)
    # Rounded, so that two shapes that differ only in the last bit count as equal.
    return min(sizes, key=lambda size: (round(abs(shape - math.log(size[0] / size[1])), 9), -size[0] * size[1]))


def kept_share(width: int, height: int, size: Size) -> float:
    """The share of an image that is left when it is resized to cover a size and cropped."""
    scale = max(size[0] / width, size[1] / height)
    return size[0] * size[1] / (width * height * scale * scale)


def share_out(total: int, counts: dict[Size, int]) -> dict[Size, int]:
    """Split a number over sizes in proportion to their counts, at least one each."""
    whole = sum(counts.values())
    exact = {size: total * count / whole for size, count in counts.items()}
    shares = {size: max(1, math.floor(part)) for size, part in exact.items()}
    for size in sorted(exact, key=lambda size: (shares[size] - exact[size], size)):
        if sum(shares.values()) >= total:
            break
        shares[size] += 1
    return shares
