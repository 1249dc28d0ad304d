"""How long it takes until dbkit is imported or has shown its help, beside importing torch or diffusers alone.

    python benchmarks/startup.py

Whole processes by the wall, in turns, `--rounds` times. Each was run once before, so that the files lie in memory and
are compiled. CPU, half a minute.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import figures

# Seconds that `import dbkit` and `dbkit --help` may take.
BAR = 0.5
COMMANDS = {
    "Python alone": ["-c", "pass"],
    "import dbkit": ["-c", "import dbkit"],
    "dbkit --help": ["-m", "dbkit", "--help"],
    "dbkit train --help": ["-m", "dbkit", "train", "--help"],
    "import torch": ["-c", "import torch"],
    "import diffusers": ["-c", "import diffusers"],
}


def seconds(arguments: list[str]) -> float:
    """What a process of this interpreter takes from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def measure(rounds: int) -> dict[str, list[float]]:
    for arguments in COMMANDS.values():
        seconds(arguments)
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds):
        for name in list(COMMANDS)[:: -1 if number % 2 else 1]:
            found[name].append(seconds(COMMANDS[name]))
    return found


def table(found: dict[str, list[float]]) -> str:
    lines = ["| | median s | fastest | slowest | bar |", "| -- | --: | --: | --: | --: |"]
    for name, times in found.items():
        bar = f"{BAR:g}" if name in ("import dbkit", "dbkit --help") else ""
        lines.append(f"| {name} | {median(times):.2f} | {min(times):.2f} | {max(times):.2f} | {bar} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    found = measure(options.rounds)
    print(f"Made by `python benchmarks/startup.py --rounds {options.rounds}`: {figures.in_words(figures.made_on())}.\n")
    print(table(found))
    figures.write(options.json, {"bar": BAR, "seconds": found})


if __name__ == "__main__":
    main()
