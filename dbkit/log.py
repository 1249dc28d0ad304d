"""What a run says while it trains: one line on screen, and log.jsonl, from which a view can be rebuilt."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import processes
from dbkit.errors import DbkitError
from dbkit.files import write_text

if TYPE_CHECKING:
    import torch

    from dbkit.trackers import Tracker


class Log:
    """One line of progress on screen, and one line of log.jsonl every few steps; the losses are only read then.

    Of several processes the main one alone says anything. images are those of a step; show, if given, is told each step
    and takes the place of the line on screen.
    """

    def __init__(
        self,
        run: Path,
        done: int,
        total: int,
        interval: int,
        track: Tracker | None = None,
        images: int = 0,
        show: Callable[[int], None] | None = None,
    ) -> None:
        from tqdm import tqdm

        self.silent = processes.rank() > 0
        if self.silent:
            return
        self.track = track or (lambda step, values: None)
        self.images, self.show = images, show or (lambda step: None)
        self.path, self.total, self.interval = run / "log.jsonl", total, interval
        # Lines after the state that is continued from belong to steps that are taken again.
        kept = [line for line in read_log(self.path) if line["step"] <= done]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.bar = tqdm(
            desc="training", initial=done, total=total, file=sys.stdout, mininterval=1, disable=show is not None
        )
        self.sums, self.count, self.since = 0, 0, time.perf_counter()

    def add(self, step: int, losses: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float) -> None:
        if self.silent:
            return
        self.sums, self.count = self.sums + losses, self.count + 1
        self.bar.update()
        self.show(step)
        if step % self.interval and step != self.total and step != 1:
            return
        loss, instance_loss, class_loss = (self.sums / self.count).tolist()
        if not math.isfinite(loss):
            raise DbkitError(
                f"the loss is {loss} at step {step}; lower learning_rate and train again, which continues "
                "from the last good state"
            )
        if step == 1 and grad_norm.item() == 0:
            raise DbkitError(
                "the first step gave no gradient, so nothing would be learnt; the model may be damaged, "
                "convert it again"
            )
        line = {"step": step, "loss": loss, "instance_loss": instance_loss, "class_loss": class_loss}
        line |= {"learning_rate": learning_rate, "grad_norm": grad_norm.item()}
        line |= {"seconds_per_step": (time.perf_counter() - self.since) / self.count}
        line |= {"images": self.images} if self.images else {}
        if losses.is_cuda:
            import torch

            # The allocator's own count: nothing waits for the GPU.
            line["gpu_memory"] = torch.cuda.max_memory_allocated(losses.device)
        # JSON knows no infinity, which an fp16 gradient norm may be while the loss scale is found.
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8", newline="\n") as file:
            # A disk too full for a line must not end the training; the next commit says so.
            file.write(json.dumps(line) + "\n")
        self._track(step, {name: value for name, value in line.items() if name != "step"})
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.1e}")
        self.sums, self.count, self.since = 0, 0, time.perf_counter()

    def close(self) -> None:
        if self.silent:
            return
        self.bar.close()
        self._track(self.total, {})

    def _track(self, step: int, values: dict[str, Any]) -> None:
        """Tell the tracker, if there is one. That it cannot write is said once, and ends its work, not the training."""
        try:
            self.track(step, values)
        except OSError as error:
            self.bar.write(f"the tracker cannot write ({error}); training goes on without it")
            self.track = lambda step, values: None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl. What a kill cut short or someone else wrote is left out."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int) and 0 <= found["step"] < 2**63:
            lines.append(found)
    return lines
