"""The notebooks are thin, carry no outputs, and share their first two cells: Drive, and the install of this version."""

import ast
import contextlib
import json
import os
import queue
import re
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from jupyter_client.manager import KernelManager

import dbkit
from dbkit.log import read_log
from dbkit.models import read_weights

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
def test_cells_after_the_first_two_import_show_and_call_only(path):
    cells = code_cells(path)[2:]
    assert len(cells) <= 8 and sum(len(source(cell).splitlines()) for cell in cells) <= 20
    for cell in cells:
        tree = ast.parse(source(cell))
        assert all(isinstance(node, ALLOWED) for node in tree.body)
        numbers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value is not None]
        assert all(isinstance(value, str) for value in numbers), "a setting belongs in the form"


@contextlib.contextmanager
def kernel(workspace: Path):
    """A kernel of its own, as its manager and its client."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "DBKIT_WORKSPACE": str(workspace), "OMP_NUM_THREADS": "1"})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run_until_trained(workspace: Path, killed_at: int | None = None) -> None:
    """Run notebook 4 in a kernel, from its first cell through the training.

    The kernel is killed, not interrupted, when the log of the run has reached the step killed_at.
    """
    cells = [source(cell) for cell in code_cells(NOTEBOOKS[3])]
    with kernel(workspace) as (manager, client):
        for cell in cells[: next(n for n, cell in enumerate(cells) if "dbkit.train(" in cell) + 1]:
            asked, reply = client.execute(cell), None
            while reply is None or reply["parent_header"].get("msg_id") != asked:
                if killed_at and any(step_of(path) >= killed_at for path in workspace.glob("runs/*/log.jsonl")):
                    manager.signal_kernel(signal.SIGKILL)
                    return
                with contextlib.suppress(queue.Empty):
                    reply = client.get_shell_msg(timeout=0.05)
                assert manager.is_alive()
            assert reply["content"]["status"] == "ok", reply["content"]


def step_of(log: Path) -> int:
    return max((line["step"] for line in read_log(log)), default=0)


@pytest.mark.skipif(sys.platform == "win32", reason="a kernel is killed by a signal")
def test_a_killed_kernel_costs_nothing_when_the_notebook_is_run_again_from_its_first_cell(tmp_path):
    settings = {"num_class_images": 2, "max_train_steps": 10, "save_model_every_n_steps": 3, "log_interval": 1}
    for name in ("straight", "killed"):
        (tmp_path / name / "settings").mkdir(parents=True)
        (tmp_path / name / "settings" / "train.yaml").write_text(json.dumps({**settings, "auto_test_model": False}))
    run_until_trained(tmp_path / "straight")
    run_until_trained(tmp_path / "killed", killed_at=5)
    straight, killed = (next((tmp_path / name).glob("runs/*/log.jsonl")).parent for name in ("straight", "killed"))
    assert not (killed / "model").exists() and step_of(killed / "log.jsonl") >= 5
    run_until_trained(tmp_path / "killed")
    for part in ("unet", "text_encoder"):
        one, two = (read_weights(run / "model", part) for run in (straight, killed))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert [line["step"] for line in read_log(killed / "log.jsonl")] == list(range(1, 11))


# A smaller queue than a kernel has, and a thread that sends as late as where others keep it from running.
HELD_UP = """
import time
from ipykernel.kernelapp import IPKernelApp

sends = IPKernelApp.instance().iopub_thread
sends.socket.sndhwm = 200
sends.schedule(lambda: time.sleep(2))
"""


def test_no_widget_of_a_form_is_lost_where_the_thread_of_the_kernel_that_sends_is_held_up(tmp_path):
    imports, shows = (source(cell) for cell in code_cells(NOTEBOOKS[3])[2:4])
    opened, used, running = set(), set(), True
    with kernel(tmp_path) as (_, client):
        client.execute(imports)
        asked = client.execute(HELD_UP + shows)
        while running:
            message = client.get_iopub_msg(timeout=60)
            content = message["content"]
            assert message["msg_type"] != "error", content
            if message["msg_type"] == "comm_open":
                opened.add(content["comm_id"])
                used.update(re.findall("IPY_MODEL_([0-9a-f]+)", json.dumps(content)))
            running = content.get("execution_state") != "idle" or message["parent_header"]["msg_id"] != asked
    assert used <= opened and len(opened) > 300


def test_the_first_cell_mounts_the_drive_and_does_nothing_else():
    (first,) = {source(code_cells(path)[0]) for path in NOTEBOOKS}
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(first)) if isinstance(node, ast.Call)]
    assert calls == ["drive.mount('/content/drive')"]


def test_the_second_cell_is_the_same_everywhere_and_installs_this_version():
    (second,) = {source(code_cells(path)[1]) for path in NOTEBOOKS}
    assert f'"dbkit-{dbkit.__version__}-py3-none-any.whl"' in second
    # By its path: a package of this name that someone puts on an index is never taken for it.
    assert second.endswith('    %pip install -q "{wheel}"') and "/content/drive/MyDrive/dbkit" in second


@pytest.mark.parametrize(("kaggle", "place"), [(True, "/kaggle/input"), (False, "/content/drive/MyDrive/dbkit")])
def test_a_wheel_that_is_not_there_is_said_with_what_to_do(monkeypatch, kaggle, place):
    second = source(code_cells(NOTEBOOKS[0])[1]).replace("%pip install", "pass  #")
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    if kaggle:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(FileNotFoundError) as error:
        exec(compile(second, "cell", "exec"), {})
    wheel, how = (
        f"dbkit-{dbkit.__version__}-py3-none-any.whl",
        "as a dataset" if kaggle else "in a folder dbkit of your",
    )
    assert str(error.value).startswith(f"{wheel} is not in {place}; make it by `make wheel`, add it {how}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_waits_for_typed_words_and_nothing_serves_a_page(path):
    text = "\n".join(source(cell) for cell in code_cells(path))
    assert not re.search(r"\b(input|getpass)\(|\b(gradio|streamlit|ngrok|cloudflared|localtunnel)\b", text)
