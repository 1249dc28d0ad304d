"""How long until a subject is learnt: dbkit beside another project's script, on the embedded model.

    python benchmarks/time_to_subject.py --peer "diffusers=python /path/to/examples/dreambooth/train_dreambooth.py"

Both train the sample poodle with prior preservation and the settings that suit the model (dbkit/embedded.py), on the
same photographs and class images, as whole processes with one thread, in turns. Every `--every` steps the weights are
kept, and afterwards judged: learnt is what tests/test_learning.py asks for, a subject fidelity of the base's + 0.25.
The time is that from the start of the process to the first step, and then so many steps of the median's length, so that
neither side pays for keeping weights. CPU is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

import figures
import torch
from train_step import as_flags, figures_of, run

from dbkit import embedded, evaluate, generate_class_images

GAIN = 0.25
PROMPTS = {"instance_prompt": "photo of zwx dog", "class_prompt": "photo of a dog"}


def settings_of(output: Path, class_images: Path, steps: int, seed: int) -> dict[str, object]:
    names = ("learning_rate", "train_batch_size", "num_class_images", "train_text_encoder")
    return {
        "pretrained_model_name_or_path": embedded.MODEL,
        "instance_data_dir": embedded.data_templates() / embedded.SAMPLE,
        "class_data_dir": class_images,
        "with_prior_preservation": True,
        **PROMPTS,
        "output_dir": output,
        "resolution": embedded.RESOLUTION,
        "max_train_steps": steps,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": "no",
        "seed": seed,
        **{name: embedded.TRAINING[name] for name in names},
    }


def kept_weights(output: Path, step: int) -> Path | None:
    """The folder with the parts that were trained until a step, of dbkit's layout or of accelerate's."""
    folders = (output / "checkpoints" / f"step_{step:06d}", output / f"checkpoint-{step}")
    return next((folder for folder in folders if folder.exists()), None)


def fidelity(weights: Path, place: Path, seed: int) -> tuple[float, float]:
    """Subject fidelity of the base and of these weights."""
    model = place / "judged"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(embedded.MODEL, model)
    for part in ("unet", "text_encoder"):
        shutil.rmtree(model / part)
        shutil.copytree(weights / part, model / part)
    with contextlib.redirect_stdout(io.StringIO()):
        made = evaluate(
            model=model,
            pretrained_model_name_or_path=embedded.NAME,
            instance_data_dir=embedded.data_templates() / embedded.SAMPLE,
            **PROMPTS,
            guidance_scale=embedded.GUIDANCE_SCALE,
            num_per_prompt=2,
            sample_batch_size=16,
            seed=seed,
            device="cpu",
            output=place / "judged.png",
        )
    return made.base.subject_fidelity, made.model.subject_fidelity


def one_run(command: str, flags: list[str], place: Path, options, seed: int) -> dict:
    output = place / "output"
    probed = run(command, flags, place)
    timed = figures_of(probed, on_gpu=False)
    first, each = timed["first step"], timed["wall step"]
    learnt, curve = None, {}
    for step in range(options.every, options.steps + 1, options.every):
        if weights := kept_weights(output, step):
            base, curve[step] = fidelity(weights, place, seed)
            if curve[step] >= base + GAIN:
                learnt = step
                break
    seconds = first + learnt * each if learnt else float("inf")
    times = {"first": first, "each": each, "steps": learnt, "seconds": seconds}
    return {**times, "curve": curve, "versions": probed["versions"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", required=True, help="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=5, help="each has a seed of its own")
    parser.add_argument("--steps", type=int, default=240, help="how long to try")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peer, _, command = options.peer.partition("=")
    commands = {"dbkit": f"{sys.executable} -m dbkit train", peer: command}
    # max_train_steps lies past the last save, since dbkit's last step has its weights in model/.
    more = {
        "dbkit": ["--auto_test_model=off", f"--save_model_every_n_steps={options.every}", "--save_precision=fp32"],
        peer: [f"--checkpointing_steps={options.every}"],
    }
    more["dbkit"] += ["--checkpoints_total_limit=1000", "--save_every_n_minutes=1000"]
    found: dict[str, list[dict]] = {who: [] for who in commands}
    with tempfile.TemporaryDirectory() as root:
        class_images = Path(root) / "class"
        with contextlib.redirect_stdout(io.StringIO()):
            generate_class_images(
                pretrained_model_name_or_path=embedded.NAME,
                class_data_dir=class_images,
                class_prompt=PROMPTS["class_prompt"],
                num_class_images=embedded.TRAINING["num_class_images"],
                resolution=embedded.RESOLUTION,
                sample_batch_size=8,
                guidance_scale=embedded.GUIDANCE_SCALE,
                device="cpu",
            )
        (class_images / "manifest.json").unlink()  # other scripts take every file there for a picture
        for number in range(options.rounds):
            for who in list(commands)[:: -1 if number % 2 else 1]:
                with tempfile.TemporaryDirectory(dir=root) as place:
                    settings = settings_of(Path(place) / "output", class_images, options.steps + 1, number)
                    flags = as_flags(settings) + more[who]
                    found[who].append(one_run(commands[who], flags, Path(place), options, number))
                print(f"round {number + 1}, {who}: {found[who][-1]}", file=sys.stderr, flush=True)
    print(f"{options.rounds} rounds, a seed each, one thread: {figures.in_words(figures.made_on())}.\n")
    print("| round | | s to first step | s a step | steps until learnt | s until learnt | dbkit is × as fast |")
    print("| --: | -- | --: | --: | --: | --: | --: |")
    ratios = [two["seconds"] / one["seconds"] for one, two in zip(found["dbkit"], found[peer])]
    for number in range(options.rounds):
        for who, rounds in found.items():
            each = rounds[number]
            ratio = f"{ratios[number]:.2f}" if who == peer else ""
            print(
                f"| {number + 1} | {who} | {each['first']:.1f} | {each['each']:.3f} | {each['steps'] or 'not'} | "
                f"{each['seconds']:.1f} | {ratio} |"
            )
    print(f"| median | | | | | | {median(ratios):.2f} |")
    figures.write(options.json, {"ratio": median(ratios), "rounds": found})


if __name__ == "__main__":
    main()
