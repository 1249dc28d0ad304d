"""The one exception for a user's mistake."""


class DbkitError(Exception):
    """What is wrong, with the value, then what to do next, in one sentence.

    Programmer mistakes keep Python's own exceptions. In a notebook the sentence is shown without frames, and
    "Run all" still stops.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"DbkitError: {self}"]
