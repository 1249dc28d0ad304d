"""What sentences are made of."""

import pytest

from dbkit.errors import reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("no  such\n file"), "no such file"),
        (ValueError(), "ValueError"),
        (RuntimeError("check your connection " * 20), "check your connection " * 9 + "…"),
        (OSError("x" * 300), "x" * 199 + "…"),
    ],
)
def test_what_a_library_says_becomes_one_short_line_of_whole_words(error, reason):
    assert reason_of(error) == reason
