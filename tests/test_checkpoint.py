"""A checkpoint is whole or not there: torn, damaged and half-written ones are skipped and named, good ones are kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import failing

from dbkit import DbkitError
from dbkit.checkpoint import (
    DRAFT,
    MANIFEST,
    commit,
    find_fault,
    load_state,
    manifest_text,
    newest_valid,
    remove_committed,
    rotate,
    save_state,
    step_folder,
)
from dbkit.errors import DiskError
from dbkit.models import load_models, state_dict


def write_two(folder):
    (folder / "unet").mkdir()
    (folder / "unet" / "weights").write_bytes(b"w" * 5000)
    (folder / "state").write_bytes(b"s" * 300)


def commit_step(parent, step, write=write_two):
    return commit(step_folder(parent, step), step, write, {"seed": 0})


def names(parent):
    return sorted(path.name for path in parent.iterdir())


def flip(path, position=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_committed_checkpoint_is_found_with_its_facts(tmp_path):
    made = commit_step(tmp_path, 40)
    assert made.folder == tmp_path / "step_000040"
    found, skipped = newest_valid(tmp_path)
    assert found == made
    assert (found.step, found.facts, skipped) == (40, {"seed": 0}, [])


def test_the_manifest_lists_every_file_with_its_size_and_hash(tmp_path):
    folder = commit_step(tmp_path, 1).folder
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert {name: entry["size"] for name, entry in listed.items()} == {"unet/weights": 5000, "state": 300}
    digest = subprocess.run(["sha256sum", folder / "state"], capture_output=True, text=True, check=False)
    if digest.returncode:
        pytest.skip("sha256sum is not on this machine")
    assert listed["state"]["sha256"] == digest.stdout.split()[0]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: flip(folder / "unet" / "weights", 4999), "unet/weights has changed or is damaged"),
        (lambda folder: (folder / "state").write_bytes(b"s" * 299), "state has changed or is damaged"),
        (lambda folder: (folder / "state").unlink(), "state is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "it has no readable manifest, so it was never finished"),
        (lambda folder: (folder / MANIFEST).write_text('{"step": 8, "fa'), "it has no readable manifest"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "it has no readable manifest"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "it has no readable manifest"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_named_with_the_reason(tmp_path, damage, fault):
    commit_step(tmp_path, 4)
    damage(commit_step(tmp_path, 8).folder)
    found, skipped = newest_valid(tmp_path)
    assert found.step == 4
    assert len(skipped) == 1
    assert skipped[0].startswith(f"skipping {tmp_path / 'step_000008'}: {fault}")


def write_real(folder):
    """A file of each kind that a training commits."""
    linear = torch.nn.Linear(3, 2)
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}
    digests = save_state(folder, {"unet": linear}, {"optimizer": {"state": {0: moments}}, "scaler": {}})
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"latent_channels": 4}')
    (folder / "merges.txt").write_text("e d</w>\n")
    return digests


def test_any_byte_that_changes_in_any_file_is_noticed_and_the_one_before_is_used(tmp_path):
    commit_step(tmp_path, 4)
    folder = commit_step(tmp_path, 8, write_real).folder
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == 8
    for path in files:
        content = path.read_bytes()
        # Every byte of the manifest, of the others some; of each byte one bit, in turn.
        stride = 1 if path.name == MANIFEST else 1 + len(content) // 40
        for position in range(0, len(content), stride):
            change(path, position, content[position] ^ 1 << position % 8)
            found, (skipped,) = newest_valid(tmp_path)
            assert found.step == 4, (path, position)
            assert skipped.startswith(f"skipping {folder}: ")
            change(path, position, content[position])
    assert newest_valid(tmp_path)[0].step == 8


def change(path, position, byte):
    with path.open("r+b") as file:
        file.seek(position)
        file.write(bytes([byte]))


def test_a_manifest_of_before_it_had_a_hash_of_its_own_is_read(tmp_path):
    folder = commit_step(tmp_path, 4).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    assert newest_valid(tmp_path)[0].step == 4
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha257": "0"}, indent=1))
    assert newest_valid(tmp_path)[0] is None


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    folder = commit_step(tmp_path, 4).folder
    entry = json.loads((folder / MANIFEST).read_text())["files"]["state"]
    (tmp_path / "mine").write_bytes((folder / "state").read_bytes())
    for name in ("../mine", str(tmp_path / "mine")):
        (folder / MANIFEST).write_text(manifest_text(4, {}, {name: entry}))
        assert find_fault(folder) is not None
    remove_committed(folder)
    assert (tmp_path / "mine").exists()


def test_what_is_spared_goes_at_the_next_rotation(tmp_path):
    for step in (2, 4, 6):
        commit_step(tmp_path, step)
    rotate(tmp_path, 6, keep=1, spare=lambda folder: folder.name == "step_000002")
    assert names(tmp_path) == ["step_000002", "step_000006"]
    rotate(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step_000006"]


def test_what_is_deleted_for_good_is_emptied_first_and_only_what_the_manifest_lists(tmp_path):
    folder = commit_step(tmp_path, 4).folder
    (folder / "notes.txt").write_text("precious")
    for name in ("unet/weights", "state"):
        os.link(folder / name, tmp_path / name.replace("/", "-"))
    os.link(folder / "notes.txt", tmp_path / "notes")
    commit_step(tmp_path, 6)
    rotate(tmp_path, 6, keep=1, for_good=True)
    assert [(tmp_path / name).stat().st_size for name in ("unet-weights", "state", "notes")] == [0, 0, 8]
    assert (tmp_path / "step_000004-1" / "notes.txt").read_text() == "precious"


def test_what_a_link_leads_to_is_not_emptied(tmp_path):
    folder = commit_step(tmp_path, 4).folder
    (folder / "state").rename(tmp_path / "mine")
    (folder / "state").symlink_to(tmp_path / "mine")
    remove_committed(folder, for_good=True)
    assert ((tmp_path / "mine").stat().st_size, folder.exists()) == (300, False)


@pytest.mark.parametrize("for_good", [False, True])
def test_a_removal_that_was_cut_short_is_finished_later(tmp_path, for_good):
    folder = commit_step(tmp_path, 4).folder
    (folder / "notes.txt").write_text("precious")
    # A kill after the manifest lost its name and one file went.
    (folder / MANIFEST).rename(folder / DRAFT)
    (folder / "state").unlink()
    assert newest_valid(tmp_path)[0] is None
    commit_step(tmp_path, 6)
    rotate(tmp_path, 6, keep=1, for_good=for_good)
    assert names(tmp_path) == ["step_000004-1", "step_000006"]
    assert [path.name for path in (tmp_path / "step_000004-1").rglob("*") if path.is_file()] == ["notes.txt"]


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert newest_valid(tmp_path / "resume") == (None, [])


def test_the_newest_is_that_of_the_highest_step_beyond_a_million_too(tmp_path):
    for step in (1_000_000, 999_999, 5):
        commit_step(tmp_path, step)
    assert newest_valid(tmp_path)[0].step == 1_000_000


def test_a_checkpoint_of_another_step_is_told(tmp_path):
    folder = commit_step(tmp_path, 4).folder
    assert find_fault(folder, step=4) is None
    assert find_fault(folder, step=5) == "it is of step 4"


def test_half_written_folders_are_neither_found_nor_named_and_go_at_the_next_commit(tmp_path):
    shutil.copytree(commit_step(tmp_path, 4).folder, tmp_path / "step_000009.partial")
    found, skipped = newest_valid(tmp_path)
    assert (found.step, skipped) == (4, [])
    commit_step(tmp_path, 8)
    rotate(tmp_path, 8, keep=2)
    assert names(tmp_path) == ["step_000004", "step_000008"]


def test_a_half_written_folder_is_no_part_of_the_next_commit(tmp_path):
    (tmp_path / "step_000004.partial").mkdir(parents=True)
    (tmp_path / "step_000004.partial" / "junk").touch()
    assert not (commit_step(tmp_path, 4).folder / "junk").exists()


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path):
    before = commit_step(tmp_path, 4)

    def fail(folder):
        write_two(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        commit_step(tmp_path, 4, fail)
    assert names(tmp_path) == ["step_000004"]
    assert newest_valid(tmp_path)[0] == before


def test_a_checkpoint_takes_the_place_of_an_earlier_one_of_its_name(tmp_path):
    commit_step(tmp_path, 4)

    def write_other(folder):
        (folder / "other").write_text("x")

    commit_step(tmp_path, 4, write_other)
    assert names(tmp_path / "step_000004") == [MANIFEST, "other"]


@pytest.mark.parametrize("way", ["replaced", "rotated"])
def test_a_file_that_someone_put_into_a_checkpoint_is_never_deleted(tmp_path, capsys, way):
    folder = commit_step(tmp_path, 4).folder
    (folder / "unet" / "notes.txt").write_text("precious")
    if way == "replaced":
        commit_step(tmp_path, 4)
    else:
        commit_step(tmp_path, 6)
        rotate(tmp_path, 6, keep=1)
    (kept,) = tmp_path.rglob("notes.txt")
    assert kept.read_text() == "precious"
    assert f"files that dbkit did not make are kept in {kept.parents[1]}" in capsys.readouterr().out
    assert newest_valid(tmp_path)[1] == []
    assert not (kept.parent / "weights").exists()


def test_files_that_read_back_differently_are_refused(tmp_path):
    def write_link(folder):
        write_two(folder)
        # Once the folder has its final name, the link leads nowhere.
        (folder / "link").symlink_to(folder / "state")

    with pytest.raises(DbkitError, match=r"step_000004 reads back wrong \(link is missing\); the disk may be failing"):
        commit_step(tmp_path, 4, write_link)


def test_a_state_whose_tensors_lie_in_the_pickle_is_read_too(tmp_path):
    moments = {"state": {0: {"exp_avg": torch.arange(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}

    def write_as_before(folder):
        torch.save(moments, folder / "optimizer.pt")

    old = commit_step(tmp_path, 4, write_as_before)
    new = commit_step(tmp_path, 6, lambda folder: save_state(folder, {}, {"optimizer": moments}))
    for found in (load_state(old, {})["optimizer"], load_state(new, {})["optimizer"]):
        assert torch.equal(found["state"][0].pop("exp_avg"), torch.arange(3.0))
        assert found == {"state": {0: {}}, "param_groups": moments["param_groups"]}


CORRUPTED = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from faults import Faults
from dbkit import checkpoint
from dbkit.checkpoint import find_fault
from dbkit.errors import DiskError
from test_checkpoint import commit_step, write_real

# One file after the other, so that the next write is another one each time.
checkpoint.side_by_side = lambda work, items: [work(item) for item in items]
faults, place = Faults.of_this_process(), Path(sys.argv[1])
outcomes = []
while not outcomes or faults.hits:
    faults.set("write", "corrupt", at=len(outcomes) + 1)
    try:
        folder = commit_step(place, 4, write_real).folder
        # Files that the test writes itself are compared by nobody.
        outcomes.append("" if faults.hits and find_fault(folder) is None else "untouched")
    except DiskError as error:
        outcomes.append(str(error))
print(json.dumps(outcomes))
"""


def test_a_disk_that_writes_a_wrong_bit_is_noticed_wherever_dbkit_writes(tmp_path):
    with failing(tmp_path) as faults:
        command = [sys.executable, "-c", CORRUPTED, tmp_path, Path(__file__).parent]
        done = subprocess.run(command, env={**os.environ, **faults.env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *outcomes, last = json.loads(done.stdout.splitlines()[-1])
    # Unseen are the two files that the test writes, and what only fills the space between torch's records.
    assert last == "untouched" and outcomes.count("") <= 3
    for name in ("unet.safetensors", "optimizer.step.safetensors", "optimizer.exp_avg.safetensors"):
        assert any(f"{name} reads back differently from what was written" in outcome for outcome in outcomes), name
    assert any(".pt reads back differently" in outcome for outcome in outcomes)
    assert any("step_000004 reads back wrong (it has no readable manifest" in outcome for outcome in outcomes)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        commit_step(tmp_path, step)
        rotate(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_000006", "step_000008"]


def test_a_damaged_later_checkpoint_does_not_push_out_a_good_one(tmp_path):
    commit_step(tmp_path, 4)
    flip(commit_step(tmp_path, 10).folder / "state")
    commit_step(tmp_path, 6)
    rotate(tmp_path, 6, keep=1)
    assert newest_valid(tmp_path)[0].step == 6
    assert not (tmp_path / "step_000004").exists()


def test_torn_folders_do_not_count_and_go_once_they_are_old(tmp_path):
    commit_step(tmp_path, 2)
    (commit_step(tmp_path, 3).folder / MANIFEST).unlink()
    commit_step(tmp_path, 4)
    rotate(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000004"]
    rotate(tmp_path, 4, keep=1)
    # Whose files those without a manifest are nobody knows, so they are kept under another name.
    assert names(tmp_path) == ["step_000003-1", "step_000004"]


def test_folders_without_a_manifest_alone_end_no_rotation(tmp_path):
    (commit_step(tmp_path, 3).folder / MANIFEST).unlink()
    rotate(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step_000003"]


def test_what_reads_back_wrong_does_not_cost_the_one_before(tmp_path):
    def write_link(folder):
        (folder / "link").symlink_to(folder / "link too")
        (folder / "link too").write_text("x")

    before = commit_step(tmp_path, 4).folder
    with pytest.raises(DiskError, match=r"step_000004 reads back wrong"):
        commit_step(tmp_path, 4, write_link)
    assert find_fault(before, step=4) is None and names(tmp_path) == ["step_000004"]


def test_a_copy_that_someone_made_is_neither_used_nor_removed(tmp_path):
    for copy in ("step_000002 (copy)", "step_000009-mine"):
        shutil.copytree(commit_step(tmp_path, 2).folder, tmp_path / copy)
    commit_step(tmp_path, 4)
    assert newest_valid(tmp_path)[0].folder == tmp_path / "step_000004"
    rotate(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step_000002 (copy)", "step_000004", "step_000009-mine"]


def test_a_saved_state_comes_back_bit_for_bit(model, tmp_path):
    models, other = load_models(model), load_models(model)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*models.unet.parameters(), *models.text_encoder.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    moments = {"state": {0: {"exp_avg": torch.randn(5, generator=random), "step": torch.tensor(3.0)}}}
    modules = {"unet": models.unet, "text_encoder": models.text_encoder}
    made = commit_step(tmp_path, 3, lambda folder: save_state(folder, modules, {"optimizer": moments, "scaler": {}}))
    states = load_state(made, {"unet": other.unet, "text_encoder": other.text_encoder})
    for part in modules:
        saved, loaded = (state_dict(getattr(m, part), part) for m in (models, other))
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert torch.equal(states["optimizer"]["state"][0]["exp_avg"], moments["state"][0]["exp_avg"])
    assert states["scaler"] == {}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("large", ["weights", "optimizer"])
def test_a_full_disk_is_said_and_the_old_checkpoint_stays(small_disk, large):
    before = commit_step(small_disk, 4)
    weights = torch.nn.Linear(1000, 1000 if large == "weights" else 1)
    moments = {"exp_avg": torch.zeros(1_000_000 if large == "optimizer" else 1)}
    with pytest.raises(DbkitError, match=r"the disk of .* is full \(.+ free\); free some space there, then run"):
        commit_step(small_disk, 8, lambda folder: save_state(folder, {"unet": weights}, {"optimizer": moments}))
    assert names(small_disk) == ["step_000004"]
    assert newest_valid(small_disk) == (before, [])


def test_other_errors_of_torch_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises((AttributeError, TypeError, RuntimeError), match=r"pickle|lambda"):
        commit_step(tmp_path, 4, lambda folder: save_state(folder, {}, {"optimizer": {"code": lambda: 0}}))
    assert names(tmp_path) == []


def test_a_file_that_someone_put_into_a_checkpoint_outlives_it(tmp_path, capsys):
    def write(folder):
        (folder / "weights").write_text("1", encoding="utf-8")

    commit(tmp_path / "model", 1, write, {})
    (tmp_path / "model" / "notes.txt").write_text("mine", encoding="utf-8")
    commit(tmp_path / "model", 2, write, {})
    assert find_fault(tmp_path / "model", step=2) is None
    kept = list(tmp_path.glob("*/notes.txt"))
    assert len(kept) == 1 and str(kept[0].parent) in capsys.readouterr().out
