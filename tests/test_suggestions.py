"""What forms show before anyone has chosen follows from what is in the workspace."""

import json
import shutil

import pytest
import torch

from dbkit import (
    ConvertConfig,
    DbkitError,
    PrepareConfig,
    PreviewConfig,
    TrainConfig,
    embedded,
    open_workspace,
    prepare_dataset,
)
from dbkit.checkpoint import commit
from dbkit.suggestions import BASE_MODEL, choices, export_of, suggest


@pytest.fixture
def workspace(monkeypatch):
    """An empty workspace on a machine without a GPU, whatever this one has."""
    monkeypatch.setattr("dbkit.suggestions.choose_device", lambda name: torch.device("cpu"))
    return open_workspace()


def test_an_empty_workspace_is_offered_the_sample_subject_and_the_embedded_model(workspace):
    values = suggest(TrainConfig, workspace, "train")
    assert values["instance_data_dir"].name == embedded.SAMPLE
    assert values["pretrained_model_name_or_path"] == embedded.NAME
    assert values["resolution"] == embedded.RESOLUTION
    TrainConfig(**values)


def test_the_newest_photographs_and_data_set_are_offered(workspace, photos):
    things = photos.rename(workspace.path / "photos" / "things")
    assert suggest(PrepareConfig, workspace, "prepare")["source"] == things
    prepare_dataset(things, workspace.path / "datasets" / "things", resolution=64)
    values = suggest(TrainConfig, workspace, "train")
    assert values["instance_data_dir"] == workspace.path / "datasets" / "things"
    assert values["use_txt_as_label"] is True and "instance_prompt" not in values


def test_photographs_without_captions_get_no_prompt_that_nobody_gave(workspace, photos):
    for caption in photos.glob("*.txt"):
        caption.unlink()
    prepare_dataset(photos, workspace.path / "datasets" / "things", resolution=64)
    values = suggest(TrainConfig, workspace, "train")
    assert values["use_txt_as_label"] is False and "instance_prompt" not in values


def test_a_checkpoint_file_in_models_is_what_is_converted(workspace):
    path = workspace.path / "models" / "mine.ckpt"
    path.write_bytes(b"")
    values = suggest(ConvertConfig, workspace, "convert")
    assert values["source"] == path and values["destination"].name == "mine-diffusers"


def test_a_converted_model_is_what_is_trained_at_its_own_size(workspace, model):
    (workspace.path / "models" / "mine").symlink_to(model)
    values = suggest(TrainConfig, workspace, "train")
    assert values["pretrained_model_name_or_path"] == str(workspace.path / "models" / "mine")
    assert values["resolution"] == 64


def save_run(folder, step=4, settings="instance_prompt: photo of zwx dog\n"):
    """What a finished training leaves, as far as is looked at here."""
    commit(folder / "model", step, lambda model: (model / "model_index.json").write_text("{}") and None, {})
    (folder / "settings.yaml").write_text(settings, encoding="utf-8")
    (folder / "log.jsonl").write_text(f'{{"step": {step}, "loss": 0.5}}\n')
    return folder


def test_a_finished_run_is_what_is_previewed_and_exported(workspace):
    run = save_run(
        workspace.path / "runs" / "dog", settings="instance_prompt: photo of zwx dog\nclass_prompt: photo of a dog\n"
    )
    preview = suggest(PreviewConfig, workspace, "preview")
    assert preview["model"] == run / "model" and preview["output"] == run / "preview.png"
    assert preview["prompt"] == ["photo of zwx dog", "photo of zwx dog in the snow", "photo of a dog"]
    export = suggest(ConvertConfig, workspace, "export")
    assert export["source"] == run / "model" and export["destination"].name == "dog-4.safetensors"


def test_the_run_that_is_named_goes_before_the_newest_and_may_lie_anywhere(workspace, tmp_path):
    mine = save_run(tmp_path / "mine", 7)
    newest = save_run(workspace.path / "runs" / "dog")
    assert suggest(PreviewConfig, workspace, "preview")["model"] == newest / "model"
    assert suggest(PreviewConfig, workspace, "preview", mine)["model"] == mine / "model"
    wanted = export_of(workspace, mine)
    assert wanted.source == str(mine / "model")
    assert wanted.destination == workspace.path / "exports" / "mine-7.safetensors"


def test_a_run_with_nothing_whole_is_not_exported(workspace):
    run = save_run(workspace.path / "runs" / "dog")
    (run / "model" / "model_index.json").write_text("more than there was")
    with pytest.raises(DbkitError, match=r"dog has no whole checkpoint and no finished model to export; run the train"):
        export_of(workspace, run)
    assert suggest(PreviewConfig, workspace, "preview")["model"] == embedded.MODEL


def test_prompts_are_those_of_the_previews_or_of_the_captions_where_the_settings_name_none(workspace, photos):
    run = save_run(workspace.path / "runs" / "dog", settings=f"instance_data_dir: {photos}\nuse_txt_as_label: true\n")
    first = next(iter(sorted(photos.glob("*.txt")))).read_text(encoding="utf-8").strip()
    assert suggest(PreviewConfig, workspace, "preview")["prompt"] == [first]
    # As a list of concepts leaves it.
    (run / "settings.yaml").write_text("instance_data_dir: null\nuse_txt_as_label: true\n", encoding="utf-8")
    assert suggest(PreviewConfig, workspace, "preview")["prompt"] == []
    line = {"step": 4, "previews": {"prompts": ["photo of zwx dog", "photo of\na cat"]}}
    (run / "figures.jsonl").write_text(json.dumps(line) + "\n")
    assert suggest(PreviewConfig, workspace, "preview")["prompt"] == ["photo of zwx dog", "photo of a cat"]


def test_with_a_gpu_a_real_model_is_trained_and_what_lies_here_is_looked_at(workspace, monkeypatch):
    monkeypatch.setattr("dbkit.suggestions.choose_device", lambda name: torch.device("cuda"))
    assert suggest(TrainConfig, workspace, "train")["pretrained_model_name_or_path"] == BASE_MODEL
    assert suggest(PreviewConfig, workspace, "preview")["model"] == embedded.MODEL
    assert suggest(ConvertConfig, workspace, "export")["source"] == embedded.MODEL


def test_the_guidance_of_a_run_is_that_of_its_previews(workspace):
    of_tiny = "instance_prompt: photo of zwx dog\npretrained_model_name_or_path: tiny-sd\n"
    run = save_run(workspace.path / "runs" / "dog", settings=of_tiny)
    assert suggest(PreviewConfig, workspace, "preview")["guidance_scale"] == [embedded.GUIDANCE_SCALE]
    (run / "settings.yaml").write_text(f"{of_tiny}guidance_scale: 2.5\n", encoding="utf-8")
    assert suggest(PreviewConfig, workspace, "preview")["guidance_scale"] == [2.5]


def test_folders_with_dots_in_their_names_and_photographs_without_a_folder_keep_their_names(workspace, photos):
    shutil.copytree(photos, workspace.path / "photos" / "shoot 1.2")
    prepared = suggest(PrepareConfig, workspace, "prepare")
    assert prepared["destination"].as_posix() == "datasets/shoot 1.2"
    shutil.copytree(photos, workspace.path / "photos", dirs_exist_ok=True)
    assert suggest(PrepareConfig, workspace, "prepare")["source"] == workspace.path / "photos"
    assert suggest(TrainConfig, workspace, "train")["instance_data_dir"] == workspace.path / "photos"


def test_what_lies_in_the_workspace_is_offered(workspace, photos, model):
    shutil.copytree(photos, workspace.path / "photos" / "things")
    (workspace.path / "photos" / "more.zip").write_bytes(b"")
    (workspace.path / "models" / "mine").symlink_to(model)
    prepare_dataset(photos, workspace.path / "datasets" / "done", resolution=64)
    assert choices(PrepareConfig, workspace, "prepare") == {"source": ["photos/things", "photos/more.zip"]}
    offered = choices(TrainConfig, workspace, "train")
    assert offered["instance_data_dir"] == ["datasets/done", "photos/things"]
    assert offered["pretrained_model_name_or_path"] == ["models/mine", BASE_MODEL, embedded.NAME]


def test_an_empty_folder_of_photographs_has_no_captions(workspace):
    (workspace.path / "photos" / "none").mkdir()
    assert suggest(TrainConfig, workspace, "train")["use_txt_as_label"] is False
