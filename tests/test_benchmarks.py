"""The benchmarks that take seconds run, and the figures of all say where they were made."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(monkeypatch):
    """A script of benchmarks/ as a module, which imports its neighbours as scripts do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module
    for name in ("figures", "startup"):
        sys.modules.pop(name, None)


def test_the_time_to_start_is_measured_in_whole_processes_in_turns(benchmark, tmp_path, monkeypatch, capsys):
    startup = benchmark("startup")
    monkeypatch.setattr(sys, "argv", ["startup.py", "--rounds=2", f"--json={tmp_path / 'found.json'}"])
    startup.main()
    found, said = json.loads((tmp_path / "found.json").read_text("utf-8")), capsys.readouterr().out
    assert found["seconds"].keys() == startup.COMMANDS.keys()
    for name, times in found["seconds"].items():
        assert len(times) == 2 and min(times) > 0
        assert f"| {name} | {sum(times) / 2:.2f} | " in said


def test_a_command_that_fails_has_no_time(benchmark):
    startup = benchmark("startup")
    with pytest.raises(startup.subprocess.CalledProcessError):
        startup.seconds(["-c", "import nothing_of_this_name"])


def test_figures_are_written_with_the_machine_and_the_versions(benchmark, tmp_path):
    figures = benchmark("figures")
    figures.write(None, {"ratio": 1})
    figures.write(tmp_path / "found.json", {"ratio": 1})
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert found["ratio"] == 1 and found["versions"]["torch"] == torch.__version__
    assert found["machine"] in figures.in_words(found) and f"torch {torch.__version__}" in figures.in_words(found)
