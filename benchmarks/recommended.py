"""Is the step that dbkit recommends of an over-long run better than its last one, and what does finding it cost?

    python benchmarks/recommended.py --seeds 5

The embedded model is taught the sample poodle with prior preservation, three times as long as suits it. Both steps are
judged by evaluate() with other seeds and other prompts than the previews had from which the step was recommended.
Better is: it keeps most of the last step's gain in likeness with less drift, which is what the class took on of the
subject and what pictures lost of their prompts, added up. The cost is the processor time of measuring, without the
previews, which are made anyway, as a share of the training's. CPU is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dbkit import embedded, evaluate, open_workspace, saved_models, train
from dbkit.best_step import Recommendation
from dbkit.evaluate import PLACES, Figures
from dbkit.judge import Judge
from dbkit.planning import PLACE

# Of the last step's gain in likeness the recommended one is to keep this share.
KEPT = 0.8


@dataclass(frozen=True)
class Result:
    """What one over-long run gave: the recommendation, the figures of evaluate(), and the share of time."""

    found: Recommendation
    base: Figures
    best: Figures
    last: Figures
    cost: float

    @property
    def kept(self) -> float:
        """The share of the last step's gain in likeness that the recommended one has."""
        gains = [model.subject_fidelity - self.base.subject_fidelity for model in (self.best, self.last)]
        return gains[0] / gains[1]

    def drift(self, model: Figures) -> float:
        """How much more than at step 0 the class looks like the subject, and how much less pictures fit prompts."""
        leak = max(0.0, model.class_leak - self.base.class_leak)
        return leak + max(0.0, self.base.prompt_fidelity - model.prompt_fidelity)

    @property
    def is_better(self) -> bool:
        return self.kept >= KEPT and self.drift(self.best) < self.drift(self.last)


@contextlib.contextmanager
def measured_time(spent: list[float]):
    """Add the processor seconds of each measurement to a list for the time of the block."""
    measure = Judge.__call__

    def timed(self: Judge, step: int) -> None:
        began = time.process_time()
        measure(self, step)
        spent.append(time.process_time() - began)

    Judge.__call__ = timed
    try:
        yield
    finally:
        Judge.__call__ = measure


def one_run(seed: int, folder: Path, steps: int, every: int, num_per_prompt: int = 4, **changes) -> Result:
    """Train too long, look what is recommended, and judge that and the last step."""
    workspace = open_workspace(folder / f"seed-{seed}")
    settings = {
        "pretrained_model_name_or_path": embedded.NAME,
        "instance_data_dir": embedded.data_templates() / embedded.SAMPLE,
        "instance_prompt": "photo of zwx dog",
        "with_prior_preservation": True,
        "class_prompt": "photo of a dog",
        "class_data_dir": folder / "class_images" / str(seed),
        "output_dir": workspace.path / "runs" / "long",
        "resolution": embedded.RESOLUTION,
        "save_model_every_n_steps": every,
        "checkpoints_total_limit": steps // every,
        "save_every_n_minutes": None,
        "device": "cpu",
        "seed": seed,
    }
    spent: list[float] = []
    with measured_time(spent):
        began = time.process_time()
        train(**embedded.TRAINING | settings | {"max_train_steps": steps} | changes)
        whole = time.process_time() - began
    models = saved_models(workspace)
    best = models.best("long")
    judged = {"seed": 1000 + seed, "num_per_prompt": num_per_prompt, "sample_batch_size": 16, "device": "cpu"}
    # In other places than the previews showed.
    judged["prompt"] = [f"{settings['instance_prompt']} {place}" for place in PLACES if place != PLACE]
    one, two = (evaluate(folder, **judged) for folder in (best.folder, settings["output_dir"] / "model"))
    return Result(models.recommended["long"], one.base, one.model, two.model, sum(spent) / whole)


def table(results: dict[int, Result]) -> str:
    names = ("subject_fidelity", "class_leak", "prompt_fidelity", "prompt_match")
    rows = [f"| seed | | {' | '.join(names)} | drift | gain kept | better | measuring |"]
    rows += [f"| --: | :-- |{' --: |' * 8}"]
    for seed, result in results.items():
        best = [f"{result.kept:.0%}", "yes" if result.is_better else "no", f"{result.cost:.1%}"]
        for step, figures, more in (
            ("step 0", result.base, ["", "", ""]),
            (f"recommended: {result.found.step}", result.best, best),
            ("last", result.last, ["", "", ""]),
        ):
            cells = [f"{getattr(figures, name):.2f}" for name in names] + [f"{result.drift(figures):.2f}", *more]
            rows.append(f"| {seed} | {step} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3 * embedded.TRAINING["max_train_steps"])
    parser.add_argument("--every", type=int, default=50, help="steps between saves")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/recommended.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="dbkit-recommended-"))
    results: dict[int, Result] = {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with contextlib.redirect_stdout(io.StringIO()):
            results[seed] = one_run(seed, folder, args.steps, args.every)
        print(f"seed {seed}: {results[seed].found}\n{table({seed: results[seed]})}", flush=True)
        better = sum(result.is_better for result in results.values())
        title = f"# The recommended step of an over-long run\n\nMade by `python {shlex.join(sys.argv)}`.\n"
        said = f"{args.steps} steps, a save every {args.every}. Better: at least {KEPT:.0%} of the last step's gain in "
        said += (
            "likeness, with\nless drift, which is the rise of class_leak and the fall of prompt_fidelity since step 0. "
        )
        said += "Measuring is its\nprocessor time as a share of the training's. "
        said += f"{better} of {len(results)} seeds are better.\n\n"
        args.output.write_text(title + said + table(results))


if __name__ == "__main__":
    main()
