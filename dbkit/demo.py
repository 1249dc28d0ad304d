"""The main job on what dbkit carries: a subject that the embedded model has never seen. No download, no GPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from dbkit import embedded
from dbkit.checkpoint import find_fault
from dbkit.class_images import generate_class_images
from dbkit.config import DemoConfig
from dbkit.convert import convert
from dbkit.dataset import prepare_dataset
from dbkit.evaluate import Evaluation, evaluate
from dbkit.log import read_log
from dbkit.settings import configured_by, read_yaml
from dbkit.train import train
from dbkit.workspace import default_folder


@dataclass(frozen=True)
class Demo:
    """What the demo made, what it measured, and how many seconds each part took."""

    evaluation: Evaluation
    model: Path
    checkpoint: Path
    seconds: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.seconds.items())
        return f"{self.evaluation}\nmodel folder:     {self.model}\ncheckpoint:       {self.checkpoint}\n{parts}"


@configured_by(DemoConfig)
def demo(config: DemoConfig) -> Demo:
    """Prepare, generate class images, train, sample before and after, and convert, with the embedded model."""
    import torch

    threads = torch.get_num_threads()
    # Several threads gain little on so small a model, and wait for one another where the cores are shared.
    torch.set_num_threads(1)
    try:
        return _demo(config)
    finally:
        torch.set_num_threads(threads)


def _demo(config: DemoConfig) -> Demo:
    folder = config.folder or default_folder() / "demo"
    subject = read_yaml(embedded.data_templates() / "train_object.yaml")
    print(
        "The demo teaches dbkit's own small model a subject that it has never seen: a "
        f"{embedded.SAMPLE}. The model draws {embedded.RESOLUTION} px pictures."
    )
    clock = _Clock()
    data, run = folder / "datasets" / embedded.SAMPLE, folder / "runs" / embedded.SAMPLE
    prepared = prepare_dataset(embedded.data_templates() / embedded.SAMPLE, data, resolution=embedded.RESOLUTION)
    print(prepared)
    clock.lap("prepare")
    settings = {
        "pretrained_model_name_or_path": embedded.NAME,
        "resolution": embedded.RESOLUTION,
        "class_prompt": subject["class_prompt"],
        "class_data_dir": folder / "class_images",
        "num_class_images": embedded.TRAINING["num_class_images"],
        "guidance_scale": embedded.GUIDANCE_SCALE,
        "seed": 1,
    }
    generate_class_images(**settings)
    clock.lap("class images")
    training = {**embedded.TRAINING, **settings}
    done = max((line["step"] for line in read_log(run / "log.jsonl")), default=0)
    if config.max_train_steps:
        training["max_train_steps"] = config.max_train_steps
    model = train(
        **training,
        instance_data_dir=data,
        instance_prompt=subject["instance_prompt"],
        with_prior_preservation=True,
        output_dir=run,
        save_model_every_n_steps=None,
        auto_test_model=False,  # the pictures before and after show more
    )
    clock.lap("training")
    clock.split("training", "loading, caching and saving", _steps_took(run, done))
    evaluation = evaluate(model)
    clock.lap("pictures before and after")
    checkpoint = convert(model, folder / "exports" / f"{embedded.SAMPLE}.safetensors", overwrite=True)
    clock.lap("export")
    assert find_fault(model) is None and checkpoint.stat().st_size and evaluation.grid.stat().st_size
    return Demo(evaluation, model, checkpoint, clock.seconds)


def _steps_took(run: Path, done: int) -> float:
    """The seconds of the optimizer steps alone that were taken after those done before, by the run's log."""
    lines = read_log(run / "log.jsonl")
    counts = [line["step"] - before for line, before in zip(lines, [0, *(line["step"] for line in lines)])]
    return sum(line["seconds_per_step"] * count for line, count in zip(lines, counts) if line["step"] > done)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, part: str) -> None:
        self.seconds[part], self._since = time.monotonic() - self._since, time.monotonic()

    def split(self, part: str, rest: str, seconds: float) -> None:
        """Of a part's time, what is known to be its own; the rest goes under another name."""
        seconds = min(seconds, self.seconds[part])
        self.seconds |= {rest: self.seconds[part] - seconds, part: seconds}
