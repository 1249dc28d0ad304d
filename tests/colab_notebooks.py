"""The five notebooks in an environment of Colab's versions, each on a new machine, with one Drive between them.

`make colab-test` runs this; it is no part of `make test`, for the environment takes 2 GB and minutes. COLAB_VENV names
it, COLAB_WHEEL the wheel. The Drive knows no links, locks, modes or syncing of folders (colab/drive.c).
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent / "colab"
NOTEBOOKS = sorted((HERE.parents[1] / "notebooks").glob("*.ipynb"))
VENV, WHEEL = Path(os.environ["COLAB_VENV"]).absolute(), Path(os.environ["COLAB_WHEEL"]).absolute()
PACKAGES = """
import json
from importlib.metadata import distributions
print(json.dumps({one.metadata["Name"].lower(): one.version for one in distributions()}))
"""


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """The library that makes a folder behave like Drive."""
    made = tmp_path_factory.mktemp("library") / "drive.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", made, HERE / "drive.c", "-ldl"], check=True)
    return made


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    """What a person's account holds: a Drive with the wheel, and settings that end soon."""
    account = tmp_path_factory.mktemp("account")
    (account / "browser").mkdir()
    (account / "MyDrive" / "dbkit" / "settings").mkdir(parents=True)
    shutil.copy(WHEEL, account / "MyDrive" / "dbkit")
    for name in ("train.yaml", "preview.yaml"):
        shutil.copy(HERE.parent / "notebook_settings" / name, account / "MyDrive" / "dbkit" / "settings")
    # An upload is asked for nowhere: the secret is read by the cells of a test.
    (account / "secrets.json").write_text('{"HF_TOKEN": {"payload": "hf_writes", "access": true}}')
    return account


class Manager(AsyncKernelManager):
    """Starts a kernel as Colab does, on a machine of its own."""

    @property
    def kernel_spec(self):
        command = ["sh", str(HERE / "machine.sh"), str(VENV), "python", "-m", "ipykernel_launcher"]
        command += ["--IPKernelApp.kernel_class=google.colab._kernel.Kernel", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Colab", language="python")


@pytest.fixture
def run(account, drive, tmp_path):
    """Run cells on a new machine; returns what each of them printed."""

    def run(sources, **changes):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("DBKIT_", "HF_"))},
            **{"PYTHONPATH": str(HERE), "COLAB_ACCOUNT": str(account), "LD_PRELOAD": str(drive)},
            **{"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DRIVE": "/content/drive/MyDrive"},
            **changes,
        }
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        client = NotebookClient(notebook, km=Manager(), timeout=1200)
        client.execute(env=environment, cwd=str(tmp_path))
        return ["".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells]

    return run


def cells(path):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_install_changes_no_package_that_is_there(run, path):
    mount, install, *rest = cells(path)
    # As people do: the first two twice, and a second time at the end.
    said = run([mount, mount, PACKAGES, install, install, PACKAGES, *rest, mount, install])
    assert said[0] == "Mounted at /content/drive\n" and said[1].startswith("Drive already mounted at /content/drive;")
    before, after = json.loads(said[2]), json.loads(said[5])
    assert len(before) > 100 and before["ipywidgets"] == "7.7.1"
    assert {name: after.get(name) for name in before} == before
    # IPython wants jedi, which Colab leaves out.
    assert set(after) - set(before) == {"dbkit", "imagehash", "jedi"}


def test_what_the_five_made_is_in_the_drive(account):
    home = account / "MyDrive" / "dbkit"
    (exported,) = (home / "exports").glob("*.safetensors")
    assert exported.stat().st_size > 1_000_000
    (run,) = (home / "runs").glob("*/")
    assert (run / "model" / "manifest.json").is_file() and list((run / "previews").rglob("*.png"))
    assert not list(home.rglob("*.partial"))


def test_a_finished_training_on_a_new_machine_is_known_from_the_drive(run):
    said = "".join(run(cells(NOTEBOOKS[3])))
    assert "Mounted at" in said and "max_train_steps above that" in said


def test_the_hubs_client_finds_the_secret_of_the_notebook(run, account):
    mount, install, *_ = cells(NOTEBOOKS[0])
    asked = "from dbkit.hub import _stored_token\nprint(_stored_token())"
    assert run([mount, install, asked])[-1] == "hf_writes\n"


def test_access_to_a_secret_may_be_given_later_in_the_session(run, account):
    mount, install, *_ = cells(NOTEBOOKS[0])
    asked = "from dbkit import DbkitError\nfrom dbkit.hub import _stored_token\n"
    asked += "try:\n    print(_stored_token())\nexcept DbkitError as error:\n    print(error)"
    write = 'from pathlib import Path\nPath(COLAB).write_text(\'{"HF_TOKEN": {"payload": "hf_writes", "access": %s}}\')'
    write = write.replace("COLAB", repr(str(account / "secrets.json")))
    said = run([mount, install, write % "false", asked, write % "true", asked])
    assert (
        said[3].startswith("this notebook may not read the secret HF_TOKEN; click the key") and said[5] == "hf_writes\n"
    )


def test_a_refused_drive_and_a_missing_wheel_end_run_all_with_a_sentence(run, account):
    (account / "refuse").touch()
    mount, install, *_ = cells(NOTEBOOKS[0])
    with pytest.raises(CellExecutionError, match="credential propagation was unsuccessful"):
        run([mount])
    with pytest.raises(CellExecutionError, match="whl is not in /content/drive/MyDrive/dbkit; make it by `make wheel`"):
        run([install])
    (account / "refuse").unlink()


def test_a_file_goes_to_the_browser(run, account):
    mount, install, *_ = cells(NOTEBOOKS[0])
    give = "from dbkit.workspace import download\ndownload('/content/drive/MyDrive/dbkit/settings/train.yaml')"
    run([mount, install, give])
    assert (account / "browser" / "train.yaml").is_file()


def test_on_kaggle_the_first_notebook_runs_from_a_dataset(run, account):
    (account / "kaggle" / "dbkit").mkdir(parents=True)
    shutil.copy(WHEEL, account / "kaggle" / "dbkit")
    said = run(cells(NOTEBOOKS[0]), KAGGLE_KERNEL_RUN_TYPE="Interactive")
    assert said[0] == "" and "on Kaggle choose Settings, Accelerator, GPU T4 x2" in "".join(said)
    assert "workspace: /kaggle/working/dbkit (" in "".join(said)
