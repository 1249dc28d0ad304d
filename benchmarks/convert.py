"""Prove dbkit's conversion on models of full size, and measure its memory and time beside those of diffusers' own.

    python benchmarks/convert.py --family sd1 sd2 sd2-v --dtype fp16 --rounds 3

Models of the real classes with random weights are written, converted there and back, and read by other programs: by
diffusers, and with stable-diffusion-cpp-python by stable-diffusion.cpp. diffusers' script for the way from a folder to
a file (scripts/convert_diffusers_to_original_stable_diffusion.py of its repository) is run where --diffusers-script
says that it lies. Linux, CPU, 10 GB of disk and minutes for each model; nothing is downloaded. Ends with an exit status
that is not 0 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before the Hub's library is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel

from dbkit import convert
from dbkit.families import scheduler_config
from dbkit.libraries import quiet
from dbkit.models import WEIGHTS, Models, save_all_but_weights, state_dict
from dbkit.tensor_files import Stored, write_safetensors
from dbkit.tokenizer import load_tokenizer_tables, tokenizer_tables

LISTS = Path(__file__).parents[2] / "shared" / "data" / "checkpoints"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# Relative to the largest value of what is compared.
TOLERANCE = 1e-6
SETTINGS = ("model_index.json", *(f"{part}/config.json" for part in WEIGHTS), "scheduler/scheduler_config.json")
TOKENIZER = "tokenizer/tokenizer_config.json"
# What the libraries note about themselves.
NOTED = ("_diffusers_version", "_name_or_path", "transformers_version")
# ComfyUI takes a Stable Diffusion 2 for one that predicts v where the first spreads widely, AUTOMATIC1111 and
# stable-diffusion.cpp where a pass of the U-Net, which the second shifts, comes out low.
SPREAD, SHIFT = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias", "conv_out.bias"
SPREAD_OF_V, MEAN_OF_V = 0.09, -1.0
# Run by any interpreter that has stable-diffusion-cpp-python.
DRAW = """
import json, sys
from importlib.metadata import version
from stable_diffusion_cpp import StableDiffusion
model = StableDiffusion(model_path=sys.argv[1], n_threads=2)
picture = model.generate_image("photo of a dog", width=128, height=128, sample_steps=4, cfg_scale=1.0, seed=1)[0]
print(json.dumps({"extrema": picture.convert("RGB").getextrema(), "version": version("stable-diffusion-cpp-python")}))
"""


@dataclass
class Result:
    """What was found out about one model: each check's words and whether it passed, None where it was not tried."""

    name: str
    checks: dict[str, tuple[bool | None, str]] = field(default_factory=dict)
    runs: dict[tuple[str, str], list[dict[str, float]]] = field(default_factory=dict)
    bytes_of_parts: dict[str, int] = field(default_factory=dict)

    def check(self, name: str, faults: list[str], words: str) -> None:
        """Note that nothing, or what, is wrong."""
        self.checks[name] = (not faults, "; ".join(faults[:10]) if faults else words)
        print(f"{self.name}: {name}: {'FAILED: ' if faults else ''}{self.checks[name][1]}", file=sys.stderr, flush=True)


# The models.


def make_model(folder: Path, family: str, width: str, dtype: torch.dtype) -> None:
    """Write a diffusers folder of the real classes with random weights, one tensor in memory at a time."""
    with quiet():
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

    is_sd2, is_v = family != "sd1", family == "sd2-v"
    full, quarter = width == "full", width == "quarter"
    text_width = (1024 if is_sd2 else 768) if full else 192 if quarter else 96
    pads = {"pad_token": "!"} if is_sd2 else {}
    vocabulary, merges = clip_like_tables()
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=23 if is_sd2 else 12,
        num_attention_heads=16 if is_sd2 else 12,
        hidden_act="gelu" if is_sd2 else "quick_gelu",
        projection_dim=512 if is_sd2 else 768,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=1,
    )
    with quiet(), torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel(
                sample_size=96 if is_v else 64,
                block_out_channels=(
                    (320, 640, 1280, 1280) if full else (80, 160, 320, 320) if quarter else (32, 64, 128, 128)
                ),
                norm_num_groups=16 if quarter else 32,
                cross_attention_dim=text_width,
                attention_head_dim=([5, 10, 20, 20] if full else [1, 1, 2, 2]) if is_sd2 else 8,
                use_linear_projection=is_sd2,
                upcast_attention=is_sd2,
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512) if full else (32, 64, 128, 128),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                sample_size=512,
            ),
            "text_encoder": CLIPTextModel(text),
        }
    schedule = scheduler_config("v_prediction" if is_v else "epsilon")
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **pads}
    tokenizer = load_tokenizer_tables(vocabulary, merges, settings)
    save_all_but_weights(
        Models(tokenizer, noise_scheduler=DDPMScheduler(), scheduler_config=schedule, **modules), folder
    )
    for part, module in modules.items():
        weights = {name: drawn(part, name, tuple(t.shape), dtype, is_v) for name, t in state_dict(module, part).items()}
        write_safetensors(weights, folder / part / WEIGHTS[part], {"format": "pt"})


def drawn(part: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, is_v: bool) -> Stored:
    """A tensor of a model whose passes stay in range and feel each tensor; the same values whenever it is read."""

    def read() -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{part} {name}".encode()))
        values = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            values *= 2 * SPREAD_OF_V if is_v and name == SPREAD else 0.02
            values += 2 * MEAN_OF_V if is_v and name == SHIFT else 0
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        elif "embeddings." in name:
            values *= 0.02
        else:
            values *= 0.6 / (values[0].numel() ** 0.5)
        return values.to(dtype)

    return Stored(shape, dtype, read)


def clip_like_tables() -> tuple[dict[str, int], list[str]]:
    """A vocabulary and merges of CLIP's size and shape, with two of its words in their places, but not its words."""
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = ["p h", "ph o", "pho t", "phot o</w>", "d o", "do g</w>"]
    count = 49408 - len(words) - 2
    letters = "abcdefghijklmnopqrstuvwxyz"
    longer = (f"{''.join(head)} {tail}{end}" for head, tail, end in _pieces(letters))
    merges += list(itertools.islice((merge for merge in longer if merge not in set(merges)), count - len(merges)))
    words += [merge.replace(" ", "") for merge in merges]
    for word, number in (("photo</w>", 1125), ("dog</w>", 1929)):
        place = words.index(word)
        words[place], words[number] = words[number], words[place]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, merges


def _pieces(letters: str) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Each beginning of one to three letters, with one letter more, inside a word and at its end."""
    for length in (1, 2, 3):
        for head in itertools.product(letters, repeat=length):
            for tail in letters:
                for end in ("", "</w>"):
                    yield head, tail, end


# Conversions, each in a process of its own.


def by_dbkit(source: str, destination: str, tokenizer: str | None) -> None:
    convert(source, destination, tokenizer_name=tokenizer)


def by_from_single_file(source: str, destination: str, config: str, dtype: str) -> None:
    from diffusers import StableDiffusionPipeline

    options = {"config": config, "torch_dtype": DTYPES[dtype], "local_files_only": True}
    StableDiffusionPipeline.from_single_file(source, **options).save_pretrained(destination)


def by_script(source: str, destination: str, script: str) -> None:
    sys.argv = [script, "--model_path", source, "--checkpoint_path", destination, "--use_safetensors"]
    runpy.run_path(script, run_name="__main__")


CONVERSIONS: dict[str, Callable[..., None]] = {f.__name__: f for f in (by_dbkit, by_from_single_file, by_script)}


def measured(conversion: Callable[..., None], *arguments: str | None) -> dict[str, float]:
    """What a conversion in a process of its own takes, imports included: seconds, those of the CPU, bytes of memory.

    `peak` is the kernel's record of the most that was resident, pages of mapped files included. `own` is what was not
    mapped from files, looked at every 10 ms.
    """
    # What an earlier conversion wrote goes to the disk now and not during this one.
    os.sync()
    call = [sys.executable, __file__, "--convert", json.dumps([conversion.__name__, *arguments])]
    own, start = 0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(call, stdout=said, stderr=errors)
        while process.poll() is None:
            own = max(own, _status(process.pid, "RssAnon"))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        said.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{conversion.__name__} failed: {errors.read()[-2000:]}")
        peak, cpu = said.read().split()[-2:]
    return {"seconds": seconds, "cpu": float(cpu), "peak": int(peak), "own": own}


def _status(process: int | str, what: str) -> int:
    """Bytes that the kernel reports of a process; 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    return 0


# Checks.


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped, by the libraries' own readers."""
    if path.suffix == ".ckpt":
        return torch.load(path, weights_only=True, mmap=True)["state_dict"]
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names that are on one side alone, or whose tensors differ in type, shape or any bit."""
    different = [f"{name} is on one side alone" for name in sorted(one.keys() ^ other.keys())]
    for name in sorted(one.keys() & other.keys()):
        a, b = one[name], other[name]
        kind = {torch.float16: torch.int16, torch.float32: torch.int32}.get(a.dtype, a.dtype)
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.view(kind), b.view(kind)):
            different.append(f"{name} differs")
    return different


def check_folder(result: Result, source: Path, made: Path, by: str) -> None:
    """The folder that came back is the one that went."""
    faults, count = [], 0
    for part, file in WEIGHTS.items():
        one, other = tensors_of(source / part / file), tensors_of(made / part / file)
        faults += [f"{part} {fault}" for fault in differences(one, other)]
        count += len(one)
    result.check(f"folder → {by} → folder, every bit", faults, f"{count} tensors")
    faults = [name for name in (*SETTINGS, TOKENIZER) if _settings(source / name) != _settings(made / name)]
    if tokenizer_tables(source / "tokenizer") != tokenizer_tables(made / "tokenizer"):
        faults.append("tokenizer")
    result.check(f"folder → {by} → folder, settings", faults, f"{len(SETTINGS) + 1} files and the tokenizer's words")


def _settings(path: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in NOTED}


def check_names(result: Result, file: Path, family: str, width: str, dtype: torch.dtype) -> None:
    """Names, shapes and types are those of the original classes. Of a narrow model the names alone can be."""
    name, words = "names, shapes and types of the original classes", []
    if not LISTS.is_dir():
        result.checks[name] = (None, "the lists of names are not beside the checkout, so they were not compared")
        return
    listed = json.loads((LISTS / ("sd1_keys.json" if family == "sd1" else "sd2_keys.json")).read_text())
    known = {entry["key"]: entry for entry in listed["keys"]}
    allowed = {entry.split()[0] for entry in listed["allowed_extra"]}
    found = tensors_of(file)
    required = {key for key, entry in known.items() if entry["role"] == "required"}
    faults = [f"lacks {key}" for key in sorted(required - found.keys())]
    faults += [f"has {key}" for key in sorted(found.keys() - known.keys() - allowed)]
    for key in known.keys() & found.keys() if width == "full" else ():
        wanted = dtype if known[key]["dtype"] == "float32" else getattr(torch, known[key]["dtype"])
        if list(found[key].shape) != known[key]["shape"] or found[key].dtype != wanted:
            faults.append(f"{key} is {list(found[key].shape)} {found[key].dtype}")
    words = f"{len(required)} required, {len(found) - len(required)} optional"
    result.check(name, faults, words if width == "full" else f"{words} (names alone)")


def check_diffusers(result: Result, source: Path, file: Path, family: str, dtype: torch.dtype) -> None:
    """diffusers' own reader of single files makes modules that compute the same; clients' guesses come out right."""
    faults, largest, mean = [], 0.0, 0.0
    for part in WEIGHTS:
        theirs, ours = _part_of_file(source, file, part, dtype), _part_of_folder(source, part, dtype)
        faults += [f"{part} {fault}" for fault in differences(state_dict(theirs, part), state_dict(ours, part))]
        with torch.no_grad():
            found, expected = _computed(theirs.float(), part), _computed(ours.float(), part)
            if part == "unet":
                half = torch.full((1, 2, ours.config.cross_attention_dim), 0.5)
                mean = (ours(torch.full((1, 4, 8, 8), 0.5), 999, half).sample - 0.5).mean().item()
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        largest = max(largest, difference)
        # Not `>`: what is no number is a fault as well.
        if not difference <= TOLERANCE or expected.std() == 0:
            faults.append(f"{part} computes something else ({difference:.1g})")
        del theirs, ours
        gc.collect()
    result.check("text encoding, U-Net, VAE by diffusers' from_single_file", faults, f"differ by {largest:.1g}")
    if family != "sd1":
        spread = tensors_of(source / "unet" / WEIGHTS["unet"])[SPREAD].float().std().item()
        wrong = [] if (spread > SPREAD_OF_V) == (mean < MEAN_OF_V) == (family == "sd2-v") else ["they guess wrong"]
        result.check("what clients guess that it predicts", wrong, f"bias {spread:.2f}, pass {mean:.1f}")


def _part_of_file(source: Path, file: Path, part: str, dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import StableDiffusionPipeline

    others = {other: None for other in WEIGHTS if other != part}
    options = {"config": str(source), "torch_dtype": dtype, "local_files_only": True, "safety_checker": None}
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        return getattr(StableDiffusionPipeline.from_single_file(file, **options, **others), part)


def _part_of_folder(source: Path, part: str, dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    cls = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[part]
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        return cls.from_pretrained(source, subfolder=part, torch_dtype=dtype).eval()


def _computed(module: torch.nn.Module, part: str) -> torch.Tensor:
    """What a part makes of numbers that are always the same."""
    generator = torch.Generator().manual_seed(0)
    if part == "text_encoder":
        ids = torch.randint(0, 49406, (2, 77), generator=generator)
        ids[:, 0], ids[:, 20:] = 49406, 49407
        return module(ids).last_hidden_state
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    if part == "vae":
        return module.decode(latents).sample
    return module(latents, 500, torch.randn(1, 77, module.config.cross_attention_dim, generator=generator)).sample


def check_script(result: Result, made: Path, theirs: Path) -> None:
    """What diffusers' script writes is in dbkit's file, bit for bit; that may hold more, which some clients want."""
    ours, script = tensors_of(made), tensors_of(theirs)
    faults = differences({name: tensor for name, tensor in ours.items() if name in script}, script)
    result.check("the tensors of diffusers' script", faults, f"all {len(script)}; dbkit adds {len(ours) - len(script)}")


def check_sdcpp(result: Result, file: Path, family: str, interpreter: str) -> None:
    """stable-diffusion.cpp draws a picture from the file that is not of one colour, and knows what it predicts."""
    name = "a picture by stable-diffusion.cpp"
    done = subprocess.run([interpreter, "-c", "import stable_diffusion_cpp"], capture_output=True)
    if done.returncode:
        how = "`pip install stable-diffusion-cpp-python`, or give --sdcpp-python an interpreter that has it"
        result.checks[name] = (None, f"not tried: {how}")
        return
    done = subprocess.run([interpreter, "-c", DRAW, str(file)], capture_output=True, text=True, errors="replace")
    if done.returncode:
        result.check(name, [f"it ended with {done.returncode}: {done.stderr[-300:]}"], "")
        return
    drawn = json.loads(done.stdout.strip().splitlines()[-1])
    faults = [] if any(low < high for low, high in drawn["extrema"]) else ["it is of one colour"]
    took_v = "running in v-prediction mode" in done.stdout + done.stderr
    if took_v != (family == "sd2-v"):
        faults.append(f"it took the model for one that predicts {'v' if took_v else 'noise'}")
    colours = ", ".join(f"{low} to {high}" for low, high in drawn["extrema"])
    result.check(name, faults, f"version {drawn['version']}; red, green, blue {colours}")


def check_memory(result: Result) -> None:
    """dbkit's conversions stay below 1.2 times the largest part and 1 GB."""
    bound = 1.2 * max(result.bytes_of_parts.values()) + 1e9
    peak = max(one["peak"] for (_, by), runs in result.runs.items() if by == "dbkit" for one in runs)
    faults = [] if peak <= bound else [f"{peak / 1e9:.2f} GB, and the bound is {bound / 1e9:.2f} GB"]
    result.check(
        "peak memory of dbkit's conversions", faults, f"at most {peak / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB"
    )


# All of it.


def examine(family: str, arguments: argparse.Namespace, work: Path) -> Result:
    """Make a model, convert it every way and check everything. What is not needed any more is deleted."""
    dtype = DTYPES[arguments.dtype]
    result = Result(f"{family} {arguments.dtype}")
    source, file, ckpt, made = work / "source", work / "made.safetensors", work / "made.ckpt", work / "made"
    tokenizer = str(source / "tokenizer")
    make_model(source, family, arguments.width, dtype)
    result.bytes_of_parts = {part: (source / part / name).stat().st_size for part, name in WEIGHTS.items()}

    def run(conversion: Callable[..., None], *options: str | None, of: Path, to: Path, name: str) -> None:
        remove(to)
        by = "dbkit" if conversion is by_dbkit else "diffusers"
        # What a narrow model takes tells nothing, and the start of a process takes longer than everything else of it.
        if arguments.width == "full":
            result.runs.setdefault((name, by), []).append(measured(conversion, str(of), str(to), *options))
        else:
            with contextlib.redirect_stdout(sys.stderr):
                conversion(str(of), str(to), *options)

    for number in range(arguments.rounds):
        run(by_dbkit, None, of=source, to=file, name="folder → .safetensors")
        if arguments.diffusers_script:
            run(by_script, str(arguments.diffusers_script), of=source, to=made, name="folder → .safetensors")
            if not number:
                check_script(result, file, made.replace(work / "script.safetensors"))
            remove(made, work / "script.safetensors")
        run(by_dbkit, tokenizer, of=file, to=made, name=".safetensors → folder")
        if not number:
            check_folder(result, source, made, ".safetensors")
        run(by_from_single_file, str(source), arguments.dtype, of=file, to=made, name=".safetensors → folder")
        remove(made)
        run(by_dbkit, None, of=source, to=ckpt, name="folder → .ckpt")
        if not number:
            faults = differences(tensors_of(file), tensors_of(ckpt))
            result.check(".ckpt holds what .safetensors does", faults, "every bit")
        run(by_dbkit, tokenizer, of=ckpt, to=made, name=".ckpt → folder")
        if not number:
            check_folder(result, source, made, ".ckpt")
        remove(made, ckpt)
    check_names(result, file, family, arguments.width, dtype)
    check_diffusers(result, source, file, family, dtype)
    if arguments.width == "full":
        check_sdcpp(result, file, family, arguments.sdcpp_python)
        check_memory(result)
    return result


def remove(*paths: Path) -> None:
    """Delete files and folders, whether there or not."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def tables(results: list[Result]) -> str:
    """The checks of each model, and what its conversions took."""
    names = list(dict.fromkeys(name for result in results for name in result.checks))
    lines = [_row("", *(result.name for result in results)), _row(":--", *(":--" for _ in results))]
    for name in names:
        cells = []
        for result in results:
            passed, words = result.checks.get(name, (None, ""))
            cells.append(f"**FAILED**: {words}" if passed is False else words)
        lines.append(_row(name, *cells))
    if not any(result.runs for result in results):
        return "\n".join(lines)
    lines += [
        "",
        _row("model", "conversion", "by", "seconds", "of the CPU", "peak memory, GB", "without mapped files, GB"),
    ]
    lines.append(_row(":--", ":--", ":--", "--:", "--:", "--:", "--:"))
    for result in results:
        for (name, by), runs in sorted(result.runs.items()):
            # Whatever else the machine does makes times longer only, and memory not at all.
            times = [f"{min(run[what] for run in runs):.1f}" for what in ("seconds", "cpu")]
            sizes = [f"{max(run[what] for run in runs) / 1e9:.2f}" for what in ("peak", "own")]
            lines.append(_row(result.name, name, by, *times, *sizes))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = ("sd1", "sd2", "sd2-v")
    parser.add_argument("--family", nargs="+", choices=families, default=families, help="sd2 predicts noise, sd2-v v")
    parser.add_argument("--width", choices=("full", "small"), default="full", help="small: narrow models, in seconds")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp16", help="of the weights on the disk")
    parser.add_argument("--rounds", type=int, default=1, help="times that each conversion is measured")
    parser.add_argument("--folder", type=Path, help="where to work; empty: a temporary folder")
    parser.add_argument("--json", type=Path, help="also write everything there")
    parser.add_argument("--diffusers-script", type=Path, help="its convert_diffusers_to_original_stable_diffusion.py")
    parser.add_argument("--sdcpp-python", default=sys.executable, help="interpreter with stable-diffusion-cpp-python")
    parser.add_argument("--convert", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if arguments.convert:
        conversion, *rest = arguments.convert
        CONVERSIONS[conversion](*rest)
        print(_status("self", "VmHWM"), time.process_time())
        return
    if sys.platform != "linux":
        sys.exit("what a process took of memory is read as Linux tells it; run this on Linux")
    results = []
    for family in arguments.family:
        with tempfile.TemporaryDirectory(prefix="dbkit-", dir=arguments.folder) as work:
            results.append(examine(family, arguments, Path(work)))
    packages = ("torch", "diffusers", "transformers", "safetensors")
    versions = {"Python": platform.python_version(), **{name: version(name) for name in packages}}
    machine = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    print(f"\n{', '.join(f'{name} {number}' for name, number in versions.items())}; {machine}.\n")
    print(tables(results))
    if arguments.json:
        runs = [
            {
                "model": result.name,
                "bytes": result.bytes_of_parts,
                "checks": {name: {"passed": passed, "words": words} for name, (passed, words) in result.checks.items()},
                "runs": [{"conversion": name, "by": by, "rounds": r} for (name, by), r in result.runs.items()],
            }
            for result in results
        ]
        figures = {
            "versions": versions,
            "machine": f"{platform.machine()}, {machine}",
            "width": arguments.width,
            "models": runs,
        }
        arguments.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False))
    if any(passed is False for result in results for passed, _ in result.checks.values()):
        sys.exit("a check failed")


if __name__ == "__main__":
    main()
