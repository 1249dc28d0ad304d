"""What forms show before anyone has chosen follows from what is in the workspace."""

import pytest
import torch

from dbkit import (
    ConvertConfig,
    PrepareConfig,
    PreviewConfig,
    TrainConfig,
    embedded,
    open_workspace,
    prepare_dataset,
)
from dbkit.suggestions import BASE_MODEL, suggest


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
    assert {"use_txt_as_label", "instance_prompt"}.isdisjoint(suggest(TrainConfig, workspace, "train"))


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


def test_a_finished_run_is_what_is_previewed_and_exported(workspace, model):
    run = workspace.path / "runs" / "dog"
    run.mkdir(parents=True)
    (run / "model").symlink_to(model)
    (run / "settings.yaml").write_text(
        "instance_prompt: photo of zwx dog\nclass_prompt: photo of a dog\n", encoding="utf-8"
    )
    preview = suggest(PreviewConfig, workspace, "preview")
    assert preview["model"] == run / "model"
    assert preview["prompt"] == ["photo of zwx dog", "photo of zwx dog in the snow", "photo of a dog"]
    export = suggest(ConvertConfig, workspace, "export")
    assert export["source"] == run / "model" and export["destination"].name == "dog.safetensors"


def test_a_finished_lora_is_previewed_and_no_whole_model_to_export(workspace):
    made = workspace.path / "runs" / "dog" / "model"
    made.mkdir(parents=True)
    (made / "lora.json").write_text("{}")
    (made.parent / "settings.yaml").write_text("instance_prompt: photo of zwx dog\n")
    assert suggest(PreviewConfig, workspace, "preview")["model"] == made
    assert suggest(ConvertConfig, workspace, "export")["source"] != made


def test_with_a_gpu_a_real_model_is_trained_and_what_lies_here_is_looked_at(workspace, monkeypatch):
    monkeypatch.setattr("dbkit.suggestions.choose_device", lambda name: torch.device("cuda"))
    assert suggest(TrainConfig, workspace, "train")["pretrained_model_name_or_path"] == BASE_MODEL
    assert suggest(PreviewConfig, workspace, "preview")["model"] == embedded.MODEL
    assert suggest(ConvertConfig, workspace, "export")["source"] == embedded.MODEL


def test_the_guidance_of_a_run_is_that_of_its_previews(workspace, model):
    run = workspace.path / "runs" / "dog"
    run.mkdir(parents=True)
    (run / "model").symlink_to(embedded.MODEL)
    (run / "settings.yaml").write_text("instance_prompt: photo of zwx dog\n", encoding="utf-8")
    assert suggest(PreviewConfig, workspace, "preview")["guidance_scale"] == [embedded.GUIDANCE_SCALE]
    (run / "settings.yaml").write_text("instance_prompt: photo of zwx dog\nguidance_scale: 2.5\n", encoding="utf-8")
    assert suggest(PreviewConfig, workspace, "preview")["guidance_scale"] == [2.5]
