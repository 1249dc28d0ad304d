"""When a run saves: after so many steps, after so many minutes, and once more before its session ends."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator

from dbkit.train_config import TrainConfig


class Due(enum.IntEnum):
    """What is to be done after a step; of several processes the most that any of them asks for."""

    NOTHING = 0
    STATE = 1  # the state to resume from
    WEIGHTS = 2  # and usable weights
    STOP = 3


class Saves:
    """Tells after each step whether to save. Times are in seconds of `clock`."""

    def __init__(
        self,
        config: TrainConfig,
        done: int,
        total: int,
        clock: Callable[[], float] = time.monotonic,
        session: float | None = None,
    ) -> None:
        self.every, self.done, self.total, self.clock = config.save_model_every_n_steps, done, total, clock
        self.pause = 60 * config.save_every_n_minutes if config.save_every_n_minutes else float("inf")
        self.start()
        # session is when session_minutes began to run: class images and loading take their part.
        began = self.began if session is None else session
        self.end = began + 60 * config.session_minutes if config.session_minutes else float("inf")
        # How long the longest save took, its copy to a slower place included.
        self.longest = 0.0
        self.before_end = self.said = False

    def start(self) -> None:
        """The first step begins now."""
        self.began = self.saved = self.clock()

    def weights(self, step: int) -> bool:
        """Whether a step is one whose usable weights are saved, and of which there are previews."""
        return bool(self.every) and 0 < step < self.total and step % self.every == 0

    def due(self, step: int) -> Due:
        """What is due after a step."""
        now = self.clock()
        if step == self.total:
            return Due.NOTHING  # the end of the run saves by itself
        if self.weights(step):
            return Due.WEIGHTS
        if now - self.saved >= self.pause:
            return Due.STATE
        # Once, with time for the copy; what is trained after that is saved as ever.
        if not self.before_end and now >= self.end - max(60.0, 3 * self.longest):
            self.before_end = True
            return Due.STATE
        return Due.NOTHING

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save: its time counts as none of training's."""
        began = self.clock()
        try:
            yield
        finally:
            self.saved = self.clock()
            self.took(self.saved - began)

    def took(self, seconds: float) -> None:
        """A save, or its copy, took so long."""
        self.longest = max(self.longest, seconds)

    def outlook(self, step: int) -> str | None:
        """Whether the run fits into the session: said once, when the speed is known after ten steps."""
        now, steps = self.clock(), step - self.done
        if self.said or self.end == float("inf") or steps < 10:
            return None
        self.said = True
        each = (now - self.began) / steps
        needed, left = each * (self.total - step), max(0.0, self.end - now)
        both = f"at {each:.2g} s a step the run needs {_minutes(needed)} more, and this session has {_minutes(left)}"
        if needed <= left:
            return f"{both}: it fits"
        reached = min(self.total, step + int(left / each))
        return (
            f"{both}: it will be near step {reached} of {self.total}; what is saved until then goes on in the next "
            "session by the same command or cell"
        )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"
