"""What a launcher starts in each of several processes: the trainings or measurements that a test asks for.

torchrun --nproc_per_node 2 tests/several_processes.py train [{"setting": value, ...}, ...]
torchrun --nproc_per_node 2 tests/several_processes.py command train --flag value ...
torchrun --nproc_per_node 2 tests/several_processes.py objectives FOLDER MODEL V_MODEL
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def launch(*arguments: str, config_file: Path | None = None, **environment: str) -> subprocess.Popen:
    """Start this file in two processes on the CPU, or by accelerate launch as its configuration file says."""
    options = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if config_file:
        options = ["accelerate.commands.launch", "--config_file", str(config_file), "--main_process_port", "0"]
    command = [sys.executable, "-m", *options]
    # accelerate launch --cpu would start one.
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*command, __file__, *arguments],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def finish(started: subprocess.Popen) -> str:
    """What the processes said, once they have ended well."""
    said, _ = started.communicate()
    assert started.returncode == 0, said
    return said


def plain(settings: dict) -> dict:
    """Settings as JSON holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    task, *arguments = sys.argv[1:]
    if task == "command":
        from dbkit.cli import main as command_line

        sys.argv[1:] = arguments
        sys.exit(command_line())
    elif task == "train":
        import dbkit

        for settings in json.loads(arguments[0]):
            dbkit.train(**settings)
    else:
        from test_objectives import measure_all

        measure_all(*map(Path, arguments))


if __name__ == "__main__":
    main()
