"""The five notebooks in real kernels: in order, twice in a row, and each alone in an empty workspace."""

import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file
from tiny_tagger import save_tagger

import dbkit
from dbkit.checkpoint import find_fault
from dbkit.log import read_log

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SETTINGS = Path(__file__).parent / "notebook_settings"


@pytest.fixture
def seeded(workspace_folder):
    """A workspace whose forms were filled in with a very short training."""
    shutil.copytree(SETTINGS, workspace_folder / "settings")
    save_tagger(workspace_folder / "models" / "tagger")
    return workspace_folder


def run(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    return notebook


def test_in_order_and_again_they_make_an_export_that_reloads_to_the_trained_tensors(seeded, tmp_path):
    notebooks = [run(path) for path in [*NOTEBOOKS, *NOTEBOOKS]]
    (previews,) = (cell for cell in notebooks[3].cells if "dbkit.preview(" in cell.source)
    assert "image/jpeg" in previews.outputs[-1].data
    # The captions that notebook 3 wrote are in the prepared folder.
    assert all(path.with_suffix(".txt").stat().st_size for path in (seeded / "datasets" / "poodle").glob("*.png"))
    trained = seeded / "runs" / "poodle"
    assert find_fault(trained / "model") is None
    assert [line["step"] for line in read_log(trained / "log.jsonl")] == [1, 4]
    assert sorted(path.name for path in (trained / "previews").glob("*.png"))[-1] == "step_000004.png"
    assert (trained / "preview.png").stat().st_size and (
        seeded / "models" / "sample-diffusers" / "model_index.json"
    ).exists()
    assert len(list(seeded.glob("class_images/*/class-*.png"))) == 2
    best = dbkit.status(trained).best
    back = dbkit.convert(seeded / "exports" / f"poodle-{best.step}.safetensors", tmp_path / "back")
    for part, name in dbkit.models.WEIGHTS.items():
        before, after = load_file(best.folder / part / name), load_file(back / part / name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_each_runs_alone_in_a_fresh_workspace(path, seeded):
    run(path)
    made = {"2": "models/sample-diffusers/model_index.json", "3": "datasets/poodle/report.json"}
    made |= {"4": "exports/poodle-?.safetensors", "5": "exports/tiny-sd.safetensors"}
    assert any(seeded.glob(made[path.stem[0]]))
