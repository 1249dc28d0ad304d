"""What saving costs: steps a second with a state and usable weights every 50 steps, copied to a slow home, and without.

    python benchmarks/saving.py --rounds 5

Trains the embedded model in alternating rounds: without any save, and saving every 50 steps while each write to its
home is held up so that it takes 20 MB a second (by tests/faults.c, so Linux with a C compiler). A round's time is that
of its steps and saves together. CPU is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import figures

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
STEPS, EVERY, SPEED = 200, 50, 20e6


def one_round(folder: Path, saves: bool) -> tuple[float, int]:
    """Seconds from the first to the last step, saves included, and the bytes that one save copies home."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    from dbkit import embedded, train

    seen: list[float] = []
    handle = register_module_forward_pre_hook(
        lambda module, _: seen.append(time.perf_counter()) if type(module).__name__ == "UNet2DConditionModel" else None
    )
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        train(
            pretrained_model_name_or_path=embedded.NAME,
            instance_data_dir=ROOT / "data_templates" / "poodle",
            instance_prompt="photo of zwx dog",
            resolution=embedded.RESOLUTION,
            train_batch_size=4,
            max_train_steps=STEPS,
            save_model_every_n_steps=EVERY if saves else None,
            save_every_n_minutes=None,
            auto_test_model=False,
            device="cpu",
            output_dir=folder / "home" / "run",
            local_dir=folder / "local",
        )
    handle.remove()
    home = folder / "home" / "run"
    copied = sum(p.stat().st_size for part in ("resume", "model") for p in (home / part).rglob("*") if p.is_file())
    return seen[STEPS - 1] - seen[0], copied


def rounds(count: int, place: Path) -> list[dict[str, float]]:
    from faults import Faults

    from dbkit import copies

    faults, results = Faults.of_this_process(), []
    for number in range(count):
        result = {}
        # Whichever goes first in one round goes second in the next.
        for saves in (False, True) if number % 2 else (True, False):
            folder = place / f"{number}-{saves}"
            folder.mkdir()
            faults.watch(folder / "home")
            faults.set("write", "stall", times=-1, seconds=copies._BLOCK / SPEED)
            seconds, copied = one_round(folder, saves)
            result |= {"with saves": seconds, "bytes": copied} if saves else {"without": seconds}
        results.append({**result, "ratio": result["without"] / result["with saves"]})
        print(
            f"round {number + 1}: {result['without']:.2f} s without, {result['with saves']:.2f} s with",
            file=sys.stderr,
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    if "FAULTS_CONTROL" not in os.environ:
        from faults import failing

        with tempfile.TemporaryDirectory() as place, failing(Path(place)) as faults:
            sys.exit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **faults.env}).returncode)
    with tempfile.TemporaryDirectory() as place:
        results = rounds(arguments.rounds, Path(place))
    ratio = median(result["ratio"] for result in results)
    made_on = figures.in_words(figures.made_on())
    print(f"\nMade by `python benchmarks/saving.py --rounds {arguments.rounds}`: {made_on}.\n")
    print("| round | seconds without saves | with | steps a second, with against without |\n| --: | --: | --: | --: |")
    for number, result in enumerate(results, 1):
        print(f"| {number} | {result['without']:.2f} | {result['with saves']:.2f} | {result['ratio']:.3f} |")
    print(f"| median | | | {ratio:.3f} |\n")
    print(f"A save copies {results[0]['bytes'] / 1e6:.0f} MB home, at {SPEED / 1e6:.0f} MB a second.")
    figures.write(arguments.json, {"ratio": ratio, "rounds": results})


if __name__ == "__main__":
    main()
