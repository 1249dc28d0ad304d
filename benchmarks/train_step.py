"""The training step: dbkit beside other projects' scripts, the same model, data, arithmetic and device.

    python benchmarks/train_step.py --peer "diffusers=python /path/to/examples/dreambooth/train_dreambooth.py"

Each peer is a name and a command: variables of its environment, its interpreter (which may have older libraries), its
script. Beside a torch for the CPU, torchvision needs PROBE_TORCHVISION=1; a diffusers before 0.18 needs OLD_NAMES=1.
dbkit and the peers run as whole processes, in turns, `--rounds` times, and what counts is the ratio within a round. A
step's time is the median between two passes of the U-Net, in CPU seconds on a CPU and in wall seconds on a GPU. The
model is Stable Diffusion 1.5 with every width divided by four, at 256 px, or with --width full the real size at 512 px;
the weights are random, so no download is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
PROBE = Path(__file__).with_name("probe.py")
# The first steps warm up; dbkit's caches are filled before the first.
WARM = 3
CASES = {
    "fp32": {},
    "fp32, batch 4": {"train_batch_size": 4},
    "fp32, prior preservation": {"with_prior_preservation": True},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "fp16, batch 4": {"mixed_precision": "fp16", "train_batch_size": 4},
}


def make_data(folder: Path) -> dict[str, Path]:
    """Eight sample photographs, and sixteen others as class images: turned ones, since none may be among the first."""
    sample = sorted(path for path in (ROOT / "data_templates").rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    made = {"instance_data_dir": (0, 8), "class_data_dir": (90, 16)}
    for name, (angle, count) in made.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            with Image.open(sample[number % len(sample)]) as image:
                image.convert("RGB").rotate(angle, expand=True).save(folder / name / f"{number:02d}.png")
    return {name: folder / name for name in made}


def with_old_names(model: Path) -> Path:
    """A copy whose VAE has the names of attention that diffusers before 0.18 reads."""
    copy = model.with_name(f"{model.name} with old names")
    if not copy.exists():
        shutil.copytree(model, copy)
        path = copy / "vae" / "diffusion_pytorch_model.safetensors"
        renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        weights = {}
        for name, tensor in load_file(path).items():
            for new, old in renamed.items():
                name = name.replace(f".{new}.", f".{old}.")
            weights[name] = tensor.clone()
        save_file(weights, path, metadata={"format": "pt"})
    return copy


def flags_of(case: dict[str, object], model: Path, data: dict[str, Path], output: Path, options) -> list[str]:
    """The settings under the names that all of these scripts share."""
    settings = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": data["instance_data_dir"],
        "instance_prompt": "photo of zwx dog",
        "output_dir": output,
        "resolution": options.resolution,
        "train_batch_size": 1,
        "max_train_steps": options.steps,
        "learning_rate": 1e-6,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": "no",
        "seed": 1,
        **case,
    }
    if case.get("with_prior_preservation"):
        settings |= {"class_data_dir": data["class_data_dir"], "class_prompt": "photo of a dog", "num_class_images": 16}
    return as_flags(settings)


def as_flags(settings: dict[str, object]) -> list[str]:
    """Settings on a command line, as diffusers' scripts take them too: what is on has no value."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]


def run(command: str, flags: list[str], place: Path) -> dict:
    """What the probe found of one process."""
    words = shlex.split(command)
    given = {}
    while "=" in words[0] and "/" not in words[0].partition("=")[0]:
        name, _, given[name] = words.pop(0).partition("=")
    result = place / "result.json"
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **given, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [words[0], PROBE, result, *words[1:], *flags], env=environment, cwd=place, capture_output=True, text=True
    )
    if done.returncode or not result.exists():
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(result.read_text())


def figures_of(found: dict, on_gpu: bool) -> dict[str, float]:
    """Seconds of a step, peak memory in bytes, seconds to the first step and of the whole process."""
    steps = found["steps"][WARM:]
    clock = 0 if on_gpu else 1
    return {
        "step": median(two[clock] - one[clock] for one, two in pairwise(steps)),
        "wall step": median(two[0] - one[0] for one, two in pairwise(steps)),
        "memory": found["cuda" if on_gpu else "rss"],
        "first step": found["steps"][0][0],
        "process": found["wall"],
    }


def work_of(model: Path, case: dict[str, object], resolution: int) -> int:
    """Operations of the U-Net's forward and backward pass in one step, counted without computing them."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    config = UNet2DConditionModel.load_config(model / "unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        batch = int(case.get("train_batch_size", 1)) * (2 if case.get("with_prior_preservation") else 1)
        latents = torch.empty(batch, unet.config.in_channels, resolution // 8, resolution // 8)
        text = torch.empty(batch, 77, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.zeros(batch), text).sample.mean().backward()
    return counter.get_total_flops()


def matrix_rate(precision: str) -> float:
    """Operations a second of large matrix products on the device, in one thread on a CPU: the most to be had of it."""
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side, times = (8192, 20) if on_gpu else (1024, 5)
    factor = torch.randn(side, side, dtype=dtype, device="cuda" if on_gpu else "cpu")
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(times):
            factor @ factor
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return times * 2 * side**3 / best


def measure(options, place: Path) -> dict:
    from convert import make_model

    model, on_gpu = place / "model", torch.cuda.is_available()
    make_model(model, "sd1", options.width, torch.float32)
    data = make_data(place / "data")
    commands = {"dbkit": f"{sys.executable} -m dbkit train"} | dict(peer.split("=", 1) for peer in options.peer)
    found: dict = {"cases": {}}
    for name in options.cases:
        rows: dict[str, list[dict[str, float]]] = {who: [] for who in commands}
        for number in range(options.rounds):
            # Whoever goes first in one round goes last in the next.
            for who in list(commands)[:: -1 if number % 2 else 1]:
                with tempfile.TemporaryDirectory(dir=place) as folder:
                    base = with_old_names(model) if "OLD_NAMES=1" in commands[who] else model
                    flags = flags_of(CASES[name], base, data, Path(folder) / "output", options)
                    if who == "dbkit":
                        flags.append("--auto_test_model=off")
                    probed = run(commands[who], flags, Path(folder))
                found.setdefault("versions", {})[who] = probed["versions"]
                found["device"] = probed.get("device")
                rows[who].append(figures_of(probed, on_gpu))
            last = {who: f"{rounds[-1]['step']:.3f}" for who, rounds in rows.items()}
            print(f"{name}, round {number + 1}: seconds a step {last}", file=sys.stderr, flush=True)
        found["cases"][name] = rows
        rate = matrix_rate(str(CASES[name].get("mixed_precision", "no")))
        seconds = median(each["step"] for each in rows["dbkit"])
        found.setdefault("shares", {})[name] = work_of(model, CASES[name], options.resolution) / seconds / rate
    return found


def table(found: dict) -> str:
    """The medians over the rounds as Markdown; how many times as fast dbkit is, of the ratios within the rounds."""
    clock = "" if found["device"] else "CPU "
    lines = [
        f"| settings | | {clock}s a step | wall s a step | peak GB | s to first step | s whole process | dbkit's steps "
        "are × as fast | dbkit's memory is × |",
        "| -- | -- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, rows in found["cases"].items():
        for who, rounds in rows.items():
            middle = {key: median(each[key] for each in rounds) for key in rounds[0]}
            own = rows["dbkit"]
            faster = [one["step"] / two["step"] for one, two in zip(rounds, own)]
            leaner = median(two["memory"] / one["memory"] for one, two in zip(rounds, own))
            ratios = f"{median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f}) | {leaner:.2f}"
            lines.append(
                f"| {name} | {who} | {middle['step']:.3f} | {middle['wall step']:.3f} | {middle['memory'] / 1e9:.2f} | "
                f"{middle['first step']:.1f} | {middle['process']:.1f} | {'| ' if who == 'dbkit' else ratios} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND, may be given several times")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["fp32", "fp32, prior preservation", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--width", choices=["quarter", "full"], default="quarter")
    parser.add_argument("--resolution", type=int, help="256, or 512 at full width")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    options.resolution = options.resolution or (512 if options.width == "full" else 256)
    with tempfile.TemporaryDirectory() as place:
        found = measure(options, Path(place))
    found["machine"] = found["device"] or f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    versions = "; ".join(
        f"{who}: {', '.join(f'{name} {version}' for name, version in found['versions'][who].items())}"
        for who in found["versions"]
    )
    print(f"{options.width} width at {options.resolution} px, {options.rounds} rounds of {options.steps} steps on")
    print(f"{found['machine']}. {versions}.\n")
    print(table(found))
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found["shares"].items())
    print(
        f"\nThe U-Net's passes as a share of what large matrix products would do in the time of dbkit's step: {shares}."
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
