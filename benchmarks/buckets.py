"""How much of a picture each way of framing cuts off, and how often a picture is shown in a shape that is not its own.

    python benchmarks/buckets.py

Aspects are drawn log-normally around a slight portrait, sigma 0.35, as people's photographs have them. The alternative
is the published rule that the seed of aspect-ratio bucketing uses (NovelAI 2022): what does not fill a batch in its own
bucket is shown as a square. It is computed here from that rule, not run. CPU, seconds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from dbkit.buckets import bucket_sizes, kept_share, nearest
from dbkit.order import Order

SQUARE = (512, 512)
SIZES = bucket_sizes(512, 768 * 512, 64, 256, 1024)


def photographs(random: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Widths and heights of `count` pictures of about a megapixel."""
    shapes = np.exp(random.normal(-0.1, 0.35, count))
    return [(round(1000 * shape**0.5), round(1000 / shape**0.5)) for shape in shapes.tolist()]


def crops(count: int = 100_000) -> str:
    """The share of a picture that each framing keeps."""
    images = photographs(np.random.default_rng(0), count)
    kept = {
        "square": [kept_share(*image, SQUARE) for image in images],
        "nearest of the 19 buckets": [kept_share(*image, nearest(*image, SIZES)) for image in images],
    }
    rows = [
        f"| {name} | {np.mean(values):.1%} | {np.percentile(values, 5):.1%} | {min(values):.1%} |"
        for name, values in kept.items()
    ]
    return "\n".join(["| framing | kept, mean | kept, lowest 5 % | kept, least |", "| :-- | --: | --: | --: |", *rows])


def shown_elsewhere(count: int, batch: int, runs: int = 50) -> tuple[float, float, float]:
    """Shares of samples that are shown in another bucket than their nearest: by the rule of 2022 and by dbkit.

    The third figure is the share of dbkit's steps that need one forward pass alone.
    """
    square, other, alone, steps = [], 0, 0, 0
    for run in range(runs):
        images = photographs(np.random.default_rng(run), count)
        sizes = [nearest(*image, SIZES) for image in images]
        left = sum(number % batch for size, number in Counter(sizes).items() if size != SQUARE)
        square.append(left / count)
        order = Order(run, batch, tuple((0, size) for size in sizes))
        for step in range(2 * count // batch):
            shown = [order.instance(step * batch + k) for k in range(batch)]
            other += sum(order.instance_kinds[image][1] != sizes[image] for image in shown)
            alone += len({sizes[image] for image in shown}) == 1
            steps += 1
    return float(np.mean(square)), other / max(1, steps * batch), alone / max(1, steps)


def shapes() -> str:
    """The table of shown_elsewhere() for usual sizes of sets."""
    rows = ["| pictures | images a step | rule of 2022 | dbkit | dbkit's steps of one size |"]
    rows.append("| --: | --: | --: | --: | --: |")
    for count, batch in ((12, 2), (12, 4), (30, 4), (100, 8), (500, 8), (2000, 8)):
        rule, ours, alone = shown_elsewhere(count, batch, runs=50 if count < 1000 else 5)
        rows.append(f"| {count} | {batch} | {rule:.0%} | {ours:.0%} | {alone:.0%} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/buckets.md"))
    args = parser.parse_args()
    text = f"""# What framing cuts off, and in which shape pictures are shown

Made by `python benchmarks/buckets.py`. Aspects are log-normal around a slight portrait (sigma 0.35), at 512 px.

{crops()}

Share of samples that are shown in a bucket that is not their nearest:

{shapes()}
"""
    args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
