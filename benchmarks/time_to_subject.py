"""How long until a subject is learnt: dbkit beside another project's script, on the embedded model.

    python benchmarks/time_to_subject.py --peer "diffusers=python /path/to/examples/dreambooth/train_dreambooth.py"

All train the sample poodle with prior preservation and the settings that suit the model (dbkit/embedded.py), on the
same photographs and class images, as whole processes with one thread, in turns; dbkit once with the very settings of
the other script, and once with a rate of its own for the text encoder, which that script does not have. Each `--every`
steps the weights are kept, and afterwards judged: learnt is what tests/test_learning.py asks for, a subject fidelity of
the base's + 0.25 and a prompt match above 0.6. The time is that from the start of the process to the first step, and
then so many steps of the median's length, so that neither side pays for keeping weights. CPU is enough.
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

GAIN, MATCH = 0.25, 0.6
OWN_RATE = {"text_encoder_learning_rate": 5e-4}
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


def is_learnt(weights: Path, place: Path, seed: int) -> tuple[bool, list[float]]:
    """Whether these weights draw the subject in the settings that are asked for, and both figures."""
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
            num_per_prompt=4,
            sample_batch_size=16,
            seed=seed,
            device="cpu",
            output=place / "judged.png",
        )
    figures = [made.model.subject_fidelity, made.model.prompt_match]
    return figures[0] >= made.base.subject_fidelity + GAIN and figures[1] > MATCH, figures


def one_run(command: str, flags: list[str], place: Path, options, seed: int) -> dict:
    output = place / "output"
    probed = run(command, flags, place)
    timed = figures_of(probed, on_gpu=False)
    first, each = timed["first step"], timed["wall step"]
    learnt, curve = None, {}
    for step in range(options.every, options.steps + 1, options.every):
        if weights := kept_weights(output, step):
            done, curve[step] = is_learnt(weights, place, seed)
            if done:
                learnt = step
                break
    seconds = first + learnt * each if learnt else None
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
    own = "dbkit, own rate"
    dbkit = f"{sys.executable} -m dbkit train"
    commands = {"dbkit": dbkit, own: dbkit, peer: command}
    # max_train_steps lies past the last save, since dbkit's last step has its weights in model/.
    more = {
        "dbkit": ["--auto_test_model=off", f"--save_model_every_n_steps={options.every}", "--save_precision=fp32"],
        peer: [f"--checkpointing_steps={options.every}"],
    }
    more["dbkit"] += ["--checkpoints_total_limit=1000", "--save_every_n_minutes=1000"]
    more[own] = more["dbkit"] + as_flags(OWN_RATE)
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
    print("| round | | s to first step | s a step | steps until learnt | s until learnt | × as fast |")
    print("| --: | -- | --: | --: | --: | --: | --: |")
    ratios: dict[str, list[float]] = {"dbkit": [], own: []}
    for number in range(options.rounds):
        other = found[peer][number]["seconds"]
        for who, rounds in found.items():
            each, ratio = rounds[number], ""
            if who != peer and other and each["seconds"]:
                ratios[who].append(other / each["seconds"])
                ratio = f"{ratios[who][-1]:.2f}"
            seconds = f"{each['seconds']:.1f}" if each["seconds"] else "not"
            print(
                f"| {number + 1} | {who} | {each['first']:.1f} | {each['each']:.3f} | {each['steps'] or 'not'} | "
                f"{seconds} | {ratio} |"
            )
    medians = {who: median(values) if values else None for who, values in ratios.items()}
    for who, middle in medians.items():
        print(f"| median of {len(ratios[who])} | {who} | | | | | {middle and f'{middle:.2f}'} |")
    figures.write(options.json, {"ratios": medians, "rounds": found})


if __name__ == "__main__":
    main()
