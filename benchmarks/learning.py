"""What DreamBooth and native training do to the embedded model, over several subjects and seeds.

    python benchmarks/learning.py --seeds 5

The margins of tests/test_learning.py and the settings in dbkit/embedded.py are read off this table. CPU is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import multiprocessing
import shlex
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

import torch

from dbkit import embedded, evaluate, train
from dbkit.evaluate import Evaluation, Figures

CLASSES = {"poodle": "dog", "clownfish": "fish", "racer": "car"}
STYLE_PROMPTS = tuple(
    f"a photo of a {scene} in zwx style"
    for scene in (
        "house in the snow",
        "boat on the beach",
        "flower in a room",
        "dog in space",
        "mushroom in the desert",
    )
)


COMMON = {
    "resolution": embedded.RESOLUTION,
    "auto_test_model": False,
    "save_model_every_n_steps": None,
    "device": "cpu",
}
# A LoRA needs more steps than the whole model; with a higher rate of the text encoder the settings are forgotten.
LORA = {
    "adapter": "lora",
    "learning_rate": 2e-3,
    "text_encoder_learning_rate": 5e-4,
    "max_train_steps": 400,
}
MEASURED = {"sample_batch_size": 16, "device": "cpu"}


def learn_subject(
    subject: str, seed: int, prior: bool, folder: Path, num_per_prompt: int = 4, identifier: str = "zwx", **changes
) -> Evaluation:
    settings = {
        "pretrained_model_name_or_path": embedded.NAME,
        "instance_data_dir": embedded.data_templates() / subject,
        "instance_prompt": f"photo of {identifier} {CLASSES[subject]}",
        "output_dir": folder / f"{subject}-{identifier}-{seed}-{prior}-{_name(changes)}",
    }
    training = dict(embedded.TRAINING)
    class_prompt = f"photo of a {CLASSES[subject]}"
    if prior:
        settings |= {"with_prior_preservation": True, "class_prompt": class_prompt}
        settings |= {"class_data_dir": folder / "class_images" / f"{subject}-{seed}"}
    model = train(**training | settings | COMMON | {"seed": seed} | changes)
    return evaluate(model, class_prompt=class_prompt, seed=seed, num_per_prompt=num_per_prompt, **MEASURED)


def learn_style(seed: int, folder: Path, num_per_prompt: int = 4, **changes) -> Evaluation:
    model = train(
        **embedded.TRAINING
        | {
            "pretrained_model_name_or_path": embedded.NAME,
            "instance_data_dir": embedded.data_templates() / "print",
            "use_txt_as_label": True,
            "output_dir": folder / f"print-{seed}-{_name(changes)}",
        }
        | COMMON
        | {"seed": seed}
        | changes
    )
    return evaluate(model, prompt=STYLE_PROMPTS, seed=seed, num_per_prompt=num_per_prompt, **MEASURED)


def _name(changes: dict) -> str:
    """Runs of other settings have folders of their own."""
    return "-".join(f"{name}={value}" for name, value in sorted(changes.items())) or "as_suggested"


def table(results: dict[str, list[Evaluation]]) -> str:
    """Mean and range over the seeds of each figure, before and after."""
    names = list(Figures.__dataclass_fields__)
    rows = [f"| run | seeds | | {' | '.join(names)} |", f"| :-- | --: | :-- |{' --: |' * len(names)}"]
    for run, evaluations in results.items():
        for which in ("base", "model"):
            figures = [getattr(evaluation, which) for evaluation in evaluations]
            cells = [_cell([getattr(figure, name) for figure in figures]) for name in names]
            rows.append(f"| {run} | {len(evaluations)} | {which} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _cell(values: list[float | None]) -> str:
    return "" if values[0] is None else f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _run(job: tuple, folder: Path, changes: dict) -> tuple[str, Evaluation]:
    subject, seed, prior, *identifier = job
    torch.set_num_threads(1)  # so small a model is fastest on one
    with contextlib.redirect_stdout(io.StringIO()):
        if subject == "print":
            return "print, native training", learn_style(seed, folder, **changes)
        if identifier:
            return f"{subject} as {identifier[0]}", learn_subject(
                subject, seed, prior, folder, identifier=identifier[0], **changes
            )
        name = f"{subject}, {'with' if prior else 'without'} prior preservation"
        return name, learn_subject(subject, seed, prior, folder, **changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--subjects", default="poodle,clownfish,print")
    parser.add_argument(
        "--identifiers",
        help="measure instead how well the first subject is learnt under each of these words, separated by commas",
    )
    parser.add_argument("--steps", type=int, default=embedded.TRAINING["max_train_steps"])
    parser.add_argument("--learning_rate", type=float, default=embedded.TRAINING["learning_rate"])
    parser.add_argument("--text_encoder_learning_rate", type=float)
    parser.add_argument("--lora", action="store_true", help="train a LoRA, with its own steps and rates")
    parser.add_argument("--folder", type=Path, help="keep the runs and grids here; a run that is there is not repeated")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/learning.md"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="dbkit-learning-"))
    names = ("learning_rate", "text_encoder_learning_rate")
    changes = LORA if args.lora else {"max_train_steps": args.steps} | {name: getattr(args, name) for name in names}
    jobs = [
        (subject, seed, prior)
        for subject in args.subjects.split(",")
        for prior in ((False,) if subject == "print" else (True, False))
        for seed in range(args.seeds)
    ]
    if args.identifiers:
        jobs = [(args.subjects.split(",")[0], seed, True) for seed in range(args.seeds)]
        jobs = [(*job, word) for word in args.identifiers.split(",") for job in jobs]
    results: dict[str, list[Evaluation]] = {}
    # Fresh processes: a forked one may inherit torch's threads in a state that hangs.
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for (_, seed, *_), (name, made) in zip(
            jobs, pool.map(functools.partial(_run, folder=folder, changes=changes), jobs)
        ):
            results.setdefault(name, []).append(made)
            print(f"{name}, seed {seed}\n{made}", flush=True)
    said = f"{changes['max_train_steps']} steps, learning rate {changes['learning_rate']}, {args.seeds} seeds: "
    said += "mean (lowest to highest).\n\n"
    args.output.write_text(
        f"# What training does to tiny-sd\n\nMade by `python {shlex.join(sys.argv)}`. " + said + table(results)
    )
    print(table(results))


if __name__ == "__main__":
    main()
