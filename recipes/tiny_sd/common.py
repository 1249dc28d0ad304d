"""What the training stages share: processes, exact restart, the learning-rate curve, and pictures of how it goes.

Every stage runs as it is, or on two CPU cores by `torchrun --nproc_per_node 2 STAGE.py`, which gives each process one
core: tiny layers gain little from two threads, and nearly twofold from two processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw


def arguments(description: str, steps: int, batch: int, rate: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/tiny_sd"), help="where all stages work")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help="images in a step, over all processes")
    parser.add_argument("--learning_rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between states, which a restart continues from")
    return parser.parse_args()


def start(seed: int) -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and the device; the same weights in each from here on."""
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(seed)
    return rank, world, device


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """One sum over the processes for all gradients together."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.view(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """A short warm-up, then half a cosine down to a fiftieth."""
    warm = min(1.0, (step + 1) / 200)
    return args.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps))))


def steps(
    name: str,
    args: argparse.Namespace,
    rank: int,
    modules: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[int, torch.Generator]]:
    """The steps that are still to do, each with a generator of its own, so that a restart draws what was drawn.

    Sets the learning rate before each, and saves the state after every args.every steps and after the last.
    """
    path = args.out / f"{name}.state.pt"
    done = 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        done = state["step"]
        for key, module in modules.items():
            module.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        if rank == 0:
            _drop_lines_after(args.out / f"{name}.jsonl", done)
            print(f"{name}: continues after step {done}", flush=True)
    for step in range(done, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        yield step, torch.Generator().manual_seed(args.seed * 1_000_003 + step * 17 + rank)
        if rank == 0 and ((step + 1) % args.every == 0 or step + 1 == args.steps):
            state = {key: module.state_dict() for key, module in modules.items()}
            torch.save(state | {"optimizer": optimizer.state_dict(), "step": step + 1}, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)


def _drop_lines_after(path: Path, step: int) -> None:
    """Lines of a log after the state that is continued from are written again."""
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))


class Log:
    """A line of NAME.jsonl and of the screen every few steps, and a picture of the loss curve."""

    def __init__(self, name: str, args: argparse.Namespace, rank: int):
        self.name, self.args, self.rank = name, args, rank
        self.path, self.sums, self.count, self.since = args.out / f"{name}.jsonl", {}, 0, time.monotonic()

    def add(self, step: int, **losses: torch.Tensor) -> None:
        for key, loss in losses.items():
            self.sums[key] = self.sums.get(key, 0) + loss.detach()
        self.count += 1
        if self.rank == 0 and (step + 1) % 100 == 0:
            line = {key: round(float(total) / self.count, 5) for key, total in self.sums.items()}
            seconds = time.monotonic() - self.since
            line = {"step": step + 1, **line, "images_per_second": round(self.count * self.args.batch / seconds, 1)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(self.name, line, flush=True)
            self.sums, self.count, self.since = {}, 0, time.monotonic()

    def draw(self) -> None:
        """NAME.curve.png: the loss over the steps, on a logarithmic scale."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        values = np.log([max(line["loss"], 1e-6) for line in lines])
        if len(values) < 2 or np.ptp(values) == 0:
            return
        image = Image.new("RGB", (640, 320), "white")
        xs = np.linspace(40, 620, len(values))
        ys = 290 - (values - values.min()) / np.ptp(values) * 260
        pen = ImageDraw.Draw(image)
        pen.line(list(zip(xs.tolist(), ys.tolist())), "navy", 2)
        pen.text((44, 4), f"{self.name} loss: {np.exp(values[0]):.4g} to {np.exp(values[-1]):.4g}", fill="black")
        pen.text((44, 300), f"{lines[0]['step']} to {lines[-1]['step']} steps", fill="black")
        image.save(self.args.out / f"{self.name}.curve.png")


def load_images(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return {key: data[key] for key in data}


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) as float (N, 3, H, W) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def save_grid(images: torch.Tensor, columns: int, path: Path, zoom: int = 3) -> None:
    """(N, 3, H, W) in -1..1 as one enlarged picture."""
    pixels = images.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    side, rows = pixels.shape[1], -(-len(pixels) // columns)
    grid = np.full((rows * side, columns * side, 3), 255, np.uint8)
    for number, picture in enumerate(pixels):
        row, column = divmod(number, columns)
        grid[row * side : (row + 1) * side, column * side : (column + 1) * side] = picture
    size = grid.shape[1] * zoom, grid.shape[0] * zoom
    Image.fromarray(grid).resize(size, Image.Resampling.NEAREST).save(path)
