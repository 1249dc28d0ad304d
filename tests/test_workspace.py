"""The folder that notebooks share: where it is, what is in it, and what is newest there."""

import importlib
import os
import shutil
import sys
import types
from pathlib import Path

import pytest

from dbkit import ConvertConfig, DbkitError, PrepareConfig, TrainConfig, open_workspace
from dbkit.workspace import (
    colab_secret,
    default_folder,
    download,
    gpu_hint,
    on_colab,
    on_kaggle,
    require_download,
    working_folder,
)


def colab(monkeypatch, tmp_path, mount):
    """Let this kernel look like Colab's, with a Drive that mounts by calling `mount`."""
    drive = types.ModuleType("google.colab.drive")
    drive.mount = mount
    package = types.ModuleType("google.colab")
    package.drive = drive
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setattr("dbkit.workspace._DRIVE", tmp_path / "drive")
    monkeypatch.delenv("DBKIT_WORKSPACE")


def test_opening_makes_every_folder_and_opening_again_changes_nothing(tmp_path):
    workspace = open_workspace(tmp_path / "a" / "b")
    folders = {"photos", "settings", "models", "datasets", "class_images", "runs", "exports"}
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == folders
    (workspace.path / "runs" / "kept.txt").write_text("kept")
    assert open_workspace(tmp_path / "a" / "b") == workspace
    assert (workspace.path / "runs" / "kept.txt").read_text() == "kept"


def test_a_workspace_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        DbkitError, match=r"the workspace .*file cannot be made \(.+\); set DBKIT_WORKSPACE to a folder"
    ):
        open_workspace(tmp_path / "file")


def test_a_workspace_that_is_gone_is_a_sentence(workspace_folder):
    workspace = open_workspace()
    shutil.rmtree(workspace_folder)
    with pytest.raises(DbkitError, match=r"workspace is not there \(.+\); check the path"):
        str(workspace)


def test_the_environment_names_the_workspace(monkeypatch, tmp_path, workspace_folder):
    assert open_workspace().path == workspace_folder
    monkeypatch.setenv("DBKIT_WORKSPACE", "~/dbkit-of-a-test")
    assert default_folder() == Path.home() / "dbkit-of-a-test"


def test_an_environment_that_names_no_folder_is_a_sentence(monkeypatch):
    monkeypatch.setenv("DBKIT_WORKSPACE", "~nobody-of-this-name/dbkit")
    with pytest.raises(
        DbkitError, match=r"DBKIT_WORKSPACE is '~nobody.*', and could not determine home directory; write the"
    ):
        open_workspace()


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("a\0b", r"the workspace is 'a.x00b', which has characters that no file's name has; type it again"),
        (
            "~nobody-of-this-name/a",
            "the workspace is '~nobody-of-this-name/a', and could not determine home directory; write the",
        ),
        (5, "the workspace is 5; write a path"),
        (b"a", "the workspace is b'a'; write text"),
    ],
)
def test_what_is_no_path_is_no_workspace(folder, sentence):
    with pytest.raises(DbkitError, match=sentence):
        open_workspace(folder)


def test_without_a_name_the_workspace_lies_in_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DBKIT_WORKSPACE")
    monkeypatch.chdir(tmp_path)
    assert not on_colab()
    assert open_workspace().path == tmp_path / "workspace"


def test_on_colab_the_workspace_is_on_the_drive(monkeypatch, tmp_path):
    colab(monkeypatch, tmp_path, lambda place: (Path(place) / "MyDrive").mkdir(parents=True))
    assert on_colab()
    assert open_workspace().path == tmp_path / "drive" / "MyDrive" / "dbkit"


def test_on_colab_a_drive_that_is_not_mounted_is_a_sentence(monkeypatch, tmp_path):
    colab(monkeypatch, tmp_path, lambda place: None)
    with pytest.raises(DbkitError, match=r"^Google Drive is not mounted; run the cell again and allow access$"):
        open_workspace()


def test_why_a_drive_is_not_mounted_is_in_the_sentence(monkeypatch, tmp_path):
    def refused(place):
        raise ValueError("mount failed")

    colab(monkeypatch, tmp_path, refused)
    with pytest.raises(
        DbkitError, match=r"^Google Drive is not mounted \(mount failed\); run the cell again and allow"
    ):
        open_workspace()


def test_a_drive_that_is_mounted_is_left_alone(monkeypatch, tmp_path):
    colab(monkeypatch, tmp_path, lambda place: pytest.fail("it was mounted again"))
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    assert open_workspace().path == open_workspace().path == tmp_path / "drive" / "MyDrive" / "dbkit"


def test_kaggle_is_told_apart_though_it_has_colabs_package(monkeypatch, tmp_path):
    colab(monkeypatch, tmp_path, lambda place: pytest.fail("the drive was mounted"))
    assert gpu_hint() == "; on Colab choose Runtime, Change runtime type, T4 GPU"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr("dbkit.workspace._KAGGLE", tmp_path / "working" / "dbkit")
    assert on_kaggle() and not on_colab()
    assert open_workspace().path == tmp_path / "working" / "dbkit"
    assert gpu_hint() == "; on Kaggle choose Settings, Accelerator, GPU T4 x2"


@pytest.fixture
def secrets(monkeypatch, tmp_path):
    """Colab's stand-in, with a file of secrets that is not there yet."""
    monkeypatch.syspath_prepend(Path(__file__).with_name("colab"))
    monkeypatch.setenv("COLAB_ACCOUNT", str(tmp_path))
    before = set(sys.modules)
    importlib.invalidate_caches()
    importlib.import_module("google.colab")
    yield tmp_path / "secrets.json"
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "google":
            del sys.modules[name]


def test_colabs_secrets_are_read_and_a_refusal_says_what_to_click(secrets):
    with pytest.raises(
        DbkitError, match="Colab does not answer when asked for the secret HF_TOKEN; open the notebook in"
    ):
        colab_secret("HF_TOKEN")
    secrets.write_text('{"HF_TOKEN": {"payload": "hf_writes", "access": false}}')
    with pytest.raises(DbkitError, match="may not read the secret HF_TOKEN; click the key at Colab's left, turn on"):
        colab_secret("HF_TOKEN")
    assert colab_secret("ANOTHER") is None
    secrets.write_text('{"HF_TOKEN": {"payload": "hf_writes", "access": true}}')
    assert colab_secret("HF_TOKEN") == "hf_writes"


def test_elsewhere_there_are_no_secrets():
    assert colab_secret("HF_TOKEN") is None


def test_a_run_whose_home_is_on_the_drive_works_on_colabs_own_disk(monkeypatch, tmp_path):
    home = tmp_path / "drive" / "MyDrive" / "dbkit" / "runs" / "dog"
    assert working_folder(home, None) == home
    assert working_folder(home, tmp_path / "fast") == tmp_path / "fast" / "dog"
    colab(monkeypatch, tmp_path, lambda place: None)
    with pytest.raises(DbkitError, match="dog is on Google Drive, which is not mounted; run the first cell"):
        working_folder(home, None)
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    assert working_folder(home, None) == Path("/content/dbkit_runs/MyDrive/dbkit/runs/dog")
    assert working_folder(tmp_path / "here", None) == tmp_path / "here"


def test_a_local_folder_that_cannot_be_one_is_refused(tmp_path):
    home = tmp_path / "runs" / "dog"
    assert working_folder(home, tmp_path / "runs") == home
    (tmp_path / "file").touch()
    for local, sentence in (
        (home / "fast", "output_dir .*dog and local_dir's .*fast/dog lie in one another; choose another local_dir"),
        (tmp_path / "file", "local_dir .*file cannot be made, since .*file is a file; choose another one"),
        (tmp_path / "file" / "below", "cannot be made, since .*file is a file"),
    ):
        with pytest.raises(DbkitError, match=sentence):
            working_folder(home, local)


def test_on_colab_a_named_folder_mounts_nothing(monkeypatch, tmp_path):
    colab(monkeypatch, tmp_path, lambda place: pytest.fail("the drive was mounted"))
    assert open_workspace(tmp_path / "here").path == tmp_path / "here"


def test_the_workspace_shows_what_is_in_each_folder():
    workspace = open_workspace()
    for name in ("dog", "cat", ".DS_Store"):
        (workspace.path / "photos" / name).mkdir()
    lines = str(workspace).splitlines()
    assert lines[0].startswith(f"workspace: {workspace.path} (")
    assert "  photos: cat, dog" in lines
    assert "  runs: empty" in lines


def test_each_form_has_a_settings_file_of_its_own():
    workspace = open_workspace()
    assert workspace.settings_file("train") == workspace.path / "settings" / "train.yaml"


def touched(path, when):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    os.utime(path, (when, when))
    return path


def test_the_newest_path_is_the_one_that_changed_last():
    workspace = open_workspace()
    assert workspace.newest("runs/*/model/model_index.json") is None
    old = touched(workspace.path / "runs" / "b" / "model" / "model_index.json", 1000)
    new = touched(workspace.path / "runs" / "a" / "model" / "model_index.json", 2000)
    assert workspace.newest("runs/*/model/model_index.json") == new
    os.utime(old, (3000, 3000))
    assert workspace.newest("runs/*/model/model_index.json") == old


def test_a_link_that_leads_nowhere_is_never_the_newest():
    workspace = open_workspace()
    (workspace.path / "models" / "gone.safetensors").symlink_to(workspace.path / "nowhere")
    (workspace.path / "models" / "round.safetensors").symlink_to(workspace.path / "models" / "round.safetensors")
    assert workspace.newest("models/*.safetensors") is None
    there = touched(workspace.path / "models" / "a.safetensors", 1000)
    assert workspace.newest("models/*.safetensors") == there


def test_a_folder_that_gets_a_file_is_the_newest():
    workspace = open_workspace()
    for name in ("b", "a"):
        (workspace.path / "photos" / name).mkdir()
        os.utime(workspace.path / "photos" / name, (1000, 1000))
    (workspace.path / "photos" / "b" / "x.png").write_bytes(b"")
    assert workspace.newest("photos/*") == workspace.path / "photos" / "b"


@pytest.mark.parametrize("clutter", [".DS_Store", ".ipynb_checkpoints"])
def test_clutter_is_never_the_newest(clutter):
    workspace = open_workspace()
    photos = touched(workspace.path / "photos" / "dog.zip", 1000)
    touched(workspace.path / "photos" / clutter, 2000)
    assert workspace.newest("photos/*") == photos


def test_relative_paths_of_settings_are_taken_from_the_workspace(tmp_path):
    workspace = open_workspace()
    anchored = workspace.anchor(PrepareConfig("photos/dog", tmp_path / "elsewhere", resolution=64))
    assert anchored == PrepareConfig(workspace.path / "photos" / "dog", tmp_path / "elsewhere", resolution=64)


def test_empty_paths_of_settings_stay_empty():
    config = TrainConfig("owner/name", "datasets/dog", instance_prompt="zwx")
    anchored = open_workspace().anchor(config)
    assert anchored.output_dir is None
    assert anchored.instance_data_dir.is_absolute()


def test_a_model_is_taken_from_the_workspace_if_it_is_there():
    workspace = open_workspace()
    (workspace.path / "models" / "mine").mkdir()
    for given, found in [("models/mine", str(workspace.path / "models" / "mine")), ("owner/name", "owner/name")]:
        config = TrainConfig(given, "photos", instance_prompt="zwx")
        assert workspace.anchor(config).pretrained_model_name_or_path == found


def test_settings_without_a_model_name_are_anchored_too():
    workspace = open_workspace()
    assert workspace.anchor(ConvertConfig("a.ckpt", "models/a")).destination == workspace.path / "models" / "a"


def test_a_file_is_handed_to_the_browser_on_colab_alone(monkeypatch, tmp_path):
    with pytest.raises(DbkitError, match="download is for Colab"):
        require_download(True)
    require_download(False)
    package, handed = types.ModuleType("google.colab"), []
    package.files = types.SimpleNamespace(download=handed.append)
    monkeypatch.setitem(sys.modules, "google.colab", package)
    require_download(True)
    download(tmp_path / "dog.safetensors")
    assert handed == [str(tmp_path / "dog.safetensors")]
