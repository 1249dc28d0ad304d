"""The notebooks are thin, carry no outputs, and share one first cell that names this version."""

import ast
import json
from pathlib import Path

import pytest

import dbkit

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
ALLOWED = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)


def code_cells(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_there_are_five_in_order():
    names = ["1_mount_drive", "2_convert", "3_caption", "4_train", "5_export"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_counts_or_widget_state_are_stored(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"] and notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_after_the_first_import_show_and_call_only(path):
    cells = code_cells(path)[1:]
    assert len(cells) <= 8 and sum(len(source(cell).splitlines()) for cell in cells) <= 20
    for cell in cells:
        tree = ast.parse(source(cell))
        assert all(isinstance(node, ALLOWED) for node in tree.body)
        numbers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value is not None]
        assert all(isinstance(value, str) for value in numbers), "a setting belongs in the form"


def test_the_first_cell_is_the_same_everywhere_and_installs_this_version():
    firsts = {source(code_cells(path)[0]) for path in NOTEBOOKS}
    assert len(firsts) == 1
    # By its path: a package of this name that someone puts on an index is never taken for it.
    wheel = f"/content/drive/MyDrive/dbkit/dbkit-{dbkit.__version__}-py3-none-any.whl"
    assert f"%pip install -q {wheel}\n" in firsts.pop() + "\n"
