"""The exceptions for a user's mistake and a user's wish to stop, and what their sentences are made of."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


class DbkitError(Exception):
    """What is wrong, with the value, then what to do next, in one sentence.

    Programmer mistakes keep Python's own exceptions. In a notebook the sentence is shown without frames, and
    "Run all" still stops.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"DbkitError: {self}"]


class CannotGoOn(DbkitError):
    """What is saved of a run cannot be gone on with as asked; start_over moves it aside."""


class DiskError(DbkitError):
    """A disk is full or failing: what a training survives."""


class Stopped(KeyboardInterrupt):
    """Somebody stopped it; the sentence says what of it is saved. Shown without frames in a notebook too."""

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]


def reason_of(error: BaseException) -> str:
    """What a library says of its error, in one line of at most 200 characters that ends with a word."""
    text = " ".join(str(error).split()) or type(error).__name__
    # Of a first word that is longer itself, as a path may be, the standard library leaves nothing.
    short = textwrap.shorten(text, 200, placeholder=" …")
    return short if short.strip("… ") else f"{text[:199]}…"


def counted(number: int, thing: str) -> str:
    """A number of things: 1 image, 2 images."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def some(items: Sequence[str], most: int = 5) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
