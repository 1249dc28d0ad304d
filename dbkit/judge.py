"""What is measured of each saved step while a run trains: the figures from which a step is recommended.

The previews are judged as evaluate() judges its samples, and the loss is taken at noise and timesteps that are the same
each time, so that it differs by the weights alone. Neither makes a picture or touches a random number of the training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from dbkit import processes
from dbkit.errors import DbkitError
from dbkit.evaluate import Clip, Dino, judges_of, own_words, without_identifier
from dbkit.files import write_text
from dbkit.images import read_image, render
from dbkit.log import read_log
from dbkit.planning import RunPlan
from dbkit.preview import single_picture
from dbkit.run_folder import FIGURES, preview_of
from dbkit.train_config import TrainConfig

if TYPE_CHECKING:
    import torch

# Photographs that previews are compared with; more would cost time and hardly move a mean.
_MOST_PHOTOGRAPHS = 16
# Settings that decide the previews and may change in a run. All that the losses depend on is fixed, but for the
# arithmetic, which moves either little.
_OF_PREVIEWS = ("test_seed", "test_num_per_prompt", "test_negative_prompt", "guidance_scale")


class Judge:
    """Measures steps, and writes a line of figures.jsonl for each; the main process alone does.

    losses returns the losses at fixed noise by name.
    """

    def __init__(self, config: TrainConfig, run: Path, plan: RunPlan, losses: Callable[[], dict[str, float]]) -> None:
        self.config, self.run, self.plan, self.losses = config, run, plan, losses
        self.judges: tuple[Clip, Dino] | None = None
        self.photographs: dict[int, torch.Tensor] = {}  # features of those of each concept
        self.blind = not config.auto_test_model
        self.on = config.judge_steps and processes.rank() == 0
        self.lines: list[dict[str, Any]] = []
        self.is_read = self.is_failing = False
        # Lines of steps that are taken again go, measured or not.
        if self.on or (processes.rank() == 0 and (run / FIGURES).exists()):
            self._write()

    def __call__(self, step: int) -> None:
        """Measure the live model and the previews of a step, unless a kill came after that was done."""
        if not self.on or any(line["step"] == step for line in self.lines):
            return
        try:
            self.lines.append({"step": step, **self.losses(), **self._of_previews(step)})
        except (DbkitError, OSError, RuntimeError) as error:
            # What only advises must not end a training: too little memory, a picture that is gone.
            print(f"step {step} is not measured: {error}")
        else:
            self._write()

    def _write(self) -> None:
        path = self.run / FIGURES
        try:
            if not self.is_read:
                self._read(path)
            # All of them at once: half a line that a full disk took would spoil the next one.
            write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
            self.is_failing = False
        except (DbkitError, OSError) as error:
            if not self.is_failing:
                print(f"the figures of saved steps cannot be kept: {error}; {FIGURES} stays as it is until they can")
            self.is_failing = True

    def _read(self, path: Path) -> None:
        """Put what is there before the lines of this session. What cannot be read yet must not be replaced."""
        kept = [line for line in read_log(path) if self.plan.done and line["step"] <= self.plan.done]
        known = {line["step"] for line in kept}
        self.lines = [*kept, *(line for line in self.lines if line["step"] not in known)]
        self.is_read = True

    def _of_previews(self, step: int) -> dict[str, Any]:
        """The figures of the preview pictures, each a mean, and what decides them; none without pictures or judges."""
        shown = [(row, prompt, self._pictures(step, row, prompt)) for row, prompt in enumerate(self.plan.previews)]
        if self.blind or not all(path.is_file() for _, _, paths in shown for path in paths) or not self._load():
            return {}
        clip, dino = self.judges
        found: dict[str, list[float]] = {}
        for _, prompt, paths in shown:
            pictures = [read_image(path) for path in paths]
            concepts = [n for n, concept in enumerate(self.plan.concepts) if prompt == concept.class_prompt]
            named = concepts or self._named(prompt)
            if named:
                likeness = float((dino(pictures) @ self._subject(named).T).mean())
                found.setdefault("class_leak" if concepts else "subject_fidelity", []).append(likeness)
            if not concepts:
                text = prompt
                for concept in self.plan.concepts:
                    text = without_identifier(text, concept.instance_prompt, concept.class_prompt)
                found.setdefault("prompt_fidelity", []).append(float((clip(pictures) @ clip.texts([text]).T).mean()))
        settings = {name: getattr(self.config, name) for name in _OF_PREVIEWS}
        settings["judges"] = [Path(name).name for name in judges_of(self.config.pretrained_model_name_or_path)]
        figures = {name: mean(values) for name, values in found.items()}
        return figures | {"previews": {"prompts": self.plan.previews, **settings}}

    def _pictures(self, step: int, row: int, prompt: str) -> list[Path]:
        first, grid = self.config.test_seed, preview_of(self.run, step)
        seeds = range(first, first + self.config.test_num_per_prompt)
        return [single_picture(grid, row, prompt, seed, self.config.guidance_scale) for seed in seeds]

    def _named(self, prompt: str) -> list[int]:
        """The concepts that a prompt is of: by the words that only their instance prompts have, or by none of them."""
        words = set(prompt.split())
        return [
            number
            for number, concept in enumerate(self.plan.concepts)
            if own_words(concept.instance_prompt, concept.class_prompt) <= words
        ]

    def _subject(self, concepts: list[int]) -> torch.Tensor:
        """Features of the photographs of some concepts, (N, D)."""
        import torch

        side = (self.config.resolution, self.config.resolution)
        for number in concepts:
            if number not in self.photographs:
                paths = [example.path for example in self.plan.instance if example.concept == number]
                paths = paths[:: -(-len(paths) // _MOST_PHOTOGRAPHS)]
                self.photographs[number] = self.judges[1]([render(read_image(path), side) for path in paths])
        return torch.cat([self.photographs[number] for number in concepts])

    def _load(self) -> bool:
        """Have the judges ready, on the CPU, where they take nothing from the training; False where they are not."""
        import torch

        if self.judges is None:
            clip, dino = judges_of(self.config.pretrained_model_name_or_path)
            try:
                self.judges = Clip(clip, torch.device("cpu")), Dino(dino, torch.device("cpu"))
            except (DbkitError, OSError):
                self.blind = True
                print(
                    f"previews are not judged, since {clip} or {dino} cannot be loaded; steps are compared by the loss "
                    "at fixed noise alone"
                )
        return self.judges is not None
