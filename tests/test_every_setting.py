"""No setting of training is dead: each is run with two values, which leave or say different things."""

import dataclasses
import json
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import draw_photo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from dbkit import DbkitError, TrainConfig, train
from dbkit.models import WEIGHTS

PRIOR = {"with_prior_preservation": True, "class_prompt": "photo of a thing"}
PREVIEWS = {"auto_test_model": True, "resolution": 32}
TEXTS = {"instance_prompt": None, "use_txt_as_label": True}
TAGS = {**TEXTS, "shuffle_tags": True, "tag_dropout": 0.5, "max_train_steps": 3}
BUCKETS = {"use_aspect_ratio_bucket": True, "max_train_steps": 3}
LORA = {"adapter": "lora", "lora_rank": 2}
TEXT_ENCODER = {"train_text_encoder": True}
INPAINTING = {"pretrained_model_name_or_path": "INPAINTING"}
V = {"pretrained_model_name_or_path": "V"}
LINEAR = {"lr_scheduler": "linear"}
SAVES = {"max_train_steps": 3, "save_model_every_n_steps": 1}

UNSET = "unset"

# Each setting with what both runs share and what it is in the second one; in the first it has its default, or what a
# short training needs. Capital letters stand for what the fixtures make.
CASES = {
    "pretrained_model_name_or_path": ({}, "OTHER"),
    "instance_data_dir": ({}, "PHOTOS TOO"),
    "output_dir": ({}, "elsewhere"),
    "auto": ({"train_text_encoder": True, "learning_rate": UNSET}, True),
    "instance_prompt": ({}, "photo of qqq thing"),
    "with_prior_preservation": ({"class_prompt": None}, True),
    "class_prompt": (PRIOR, "photo of a dog"),
    "class_data_dir": (PRIOR, "class"),
    "num_class_images": ({**PRIOR, "num_class_images": 1}, 2),
    "concepts_list": ({}, "CONCEPTS"),
    "prior_loss_weight": (PRIOR, 0.1),
    "use_txt_as_label": ({"instance_prompt": None, "use_filename_as_label": True}, True),
    "use_filename_as_label": (TEXTS, True),
    "combine_prompt_from_txt": ({}, True),
    "prompt_combine_template": ({"combine_prompt_from_txt": True}, "{TXT_PROMPT}: {PROMPT}"),
    "shuffle_tags": ({**TEXTS, "max_train_steps": 3}, True),
    "tag_dropout": ({**TEXTS, "max_train_steps": 3}, 0.5),
    "keep_tags": (TAGS, 3),
    "caption_variants": (TAGS, 3),
    "resolution": ({}, 32),
    "center_crop": ({}, False),
    "use_aspect_ratio_bucket": ({}, True),
    "bucket_max_area": (BUCKETS, 40 * 64),
    "bucket_step": (BUCKETS, 32),
    "bucket_min_side": (BUCKETS, 64),
    "bucket_max_side": (BUCKETS, 64),
    "caption_dropout": ({"max_train_steps": 3}, 0.9),
    "hflip": ({"max_train_steps": 3}, True),
    "augment_rotation": ({"max_train_steps": 3}, 20),
    "augment_brightness": ({"max_train_steps": 3}, 0.5),
    "augment_contrast": ({"max_train_steps": 3}, 0.5),
    "augment_crop": ({"max_train_steps": 3}, 0.3),
    "augment_variants": ({"augment_crop": 0.3, "max_train_steps": 3}, 2),
    "train_text_encoder": ({}, True),
    "text_encoder_learning_rate": (TEXT_ENCODER, 1e-5),
    "stop_text_encoder_training": (TEXT_ENCODER, 1),
    "adapter": ({}, "lora"),
    "lora_rank": (LORA, 4),
    "lora_alpha": (LORA, 16),
    "lora_modules": (LORA, "all"),
    "num_train_epochs": ({"max_train_steps": None, "num_train_epochs": 1}, 2),
    "max_train_steps": ({}, 3),
    "train_batch_size": ({}, 2),
    "gradient_accumulation_steps": ({}, 2),
    "min_snr_gamma": ({}, 0.01),
    "noise_offset": ({}, 0.1),
    "input_perturbation": ({}, 0.1),
    "rescale_zero_terminal_snr": (V, True),
    "loss_type": ({}, "l1"),
    "huber_delta": ({"loss_type": "huber"}, 0.5),
    "masked_loss": ({"max_train_steps": 3}, True),
    "unmasked_weight": ({"masked_loss": True, "max_train_steps": 3}, 0.5),
    "inpainting_masks": (INPAINTING, 3),
    "learning_rate": ({}, 2e-4),
    "lr_scheduler": ({}, "cosine"),
    "lr_warmup_steps": (LINEAR, 1),
    "lr_num_cycles": ({"lr_scheduler": "cosine_with_restarts", "max_train_steps": 4}, 2),
    "lr_power": ({"lr_scheduler": "polynomial"}, 3.0),
    "scale_lr": ({"train_batch_size": 2}, True),
    "seed": ({}, 1),
    "mixed_precision": ({}, "bf16"),
    "memory": ({}, "tiny"),
    "gradient_checkpointing": ({}, True),
    "optimizer": ({}, "lion"),
    "use_8bit_adam": ({}, True),
    "adam_beta1": ({}, 0.5),
    "adam_beta2": ({}, 0.9),
    "adam_weight_decay": ({}, 0.5),
    "adam_epsilon": ({}, 1e-2),
    "max_grad_norm": ({"adam_epsilon": 1e-2}, 1e-3),
    "use_ema": ({}, True),
    "ema_decay": ({"use_ema": True}, 0.1),
    "save_model_every_n_steps": ({}, 1),
    "save_min_steps": (SAVES, 2),
    "resume_state": ({}, "small"),
    "local_dir": ({}, "fast"),
    "checkpoints_total_limit": (SAVES, 1),
    "save_precision": ({}, "bf16"),
    "start_over": ({"again": True}, True),
    "auto_test_model": ({"resolution": 32}, True),
    "judge_steps": ({}, False),
    "test_prompt": (PREVIEWS, "a red zwx"),
    "test_prompts_file": (PREVIEWS, "PROMPTS"),
    "test_negative_prompt": (PREVIEWS, "dark"),
    "test_seed": (PREVIEWS, 1),
    "test_num_per_prompt": (PREVIEWS, 2),
    "guidance_scale": (PREVIEWS, 2.0),
    "sample_batch_size": ({**PREVIEWS, "test_num_per_prompt": 2}, 1),
    "pretrained_vae_name_or_path": ({}, "VAE"),
    "log_interval": ({"max_train_steps": 4}, 1),
    "revision": ({}, "main"),
    "tokenizer_name": ({}, "TOKENIZER"),
    "clip_skip": ({}, 2),
    "pad_tokens": ({}, False),
    "device": ({}, "cuda"),
    "log_with": ({}, "tensorboard"),
    "logging_dir": ({"log_with": "tensorboard"}, "tracked"),
    "push_to_hub": ({}, True),
    "hub_token": ({"push_to_hub": True}, "hf_hush"),
    "local_rank": ({}, 0),
    "hub_model_id": ({"push_to_hub": True, "hub_token": "hf_hush"}, "not a name"),
}
# What cannot be told apart here, and the test that shows it elsewhere.
ELSEWHERE = {
    "hub_private": "test_hub.py::test_a_repository_can_be_public_and_an_organisations",
    "save_every_n_minutes": "test_keeper.py::test_a_state_is_saved_when_its_time_has_come",
    "session_minutes": "test_keeper.py::test_a_state_is_saved_when_its_time_has_come",
}


def test_every_setting_has_a_case():
    assert CASES.keys() | ELSEWHERE.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    for where in ELSEWHERE.values():
        file, _, name = where.partition("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def stand_ins(model, v_model, inpainting_model, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stand-ins")
    for name, size in (("photos", (96, 80)), ("photos too", (80, 96))):
        for number, colour in enumerate(("crimson", "gold", "teal")):
            # One of them is wide.
            path = draw_photo(folder / name / f"{colour}.png", (240, 80) if number == 0 else size, colour)
            path.with_suffix(".txt").write_text(f"zwx thing, {colour}, round, small, on white")
    draw_photo(folder / "photos" / "masks" / "gold.png", colour="black")
    (folder / "prompts.txt").write_text("a red zwx\n")
    concept = {"instance_prompt": "photo of ukj thing", "instance_data_dir": str(folder / "photos")}
    (folder / "concepts.json").write_text(json.dumps([concept]))
    other = shutil.copytree(model, folder / "other")
    for part in ("unet", "vae"):
        path = other / part / WEIGHTS[part]
        save_file({name: tensor * 1.1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    # Another tokenizer: the same words under other numbers.
    tokenizer = shutil.copytree(model / "tokenizer", folder / "tokenizer")
    (tokenizer / "tokenizer.json").unlink()
    words = list(json.loads((tokenizer / "vocab.json").read_text()))
    numbered = {word: number for number, word in enumerate([*reversed(words[:-2]), *words[-2:]])}
    (tokenizer / "vocab.json").write_text(json.dumps(numbered))
    return {
        "MODEL": str(model),
        "V": str(v_model),
        "INPAINTING": str(inpainting_model),
        "OTHER": str(other),
        "VAE": str(other / "vae"),
        "TOKENIZER": str(tokenizer),
        "PHOTOS": str(folder / "photos"),
        "PHOTOS TOO": str(folder / "photos too"),
        "CONCEPTS": str(folder / "concepts.json"),
        "PROMPTS": str(folder / "prompts.txt"),
    }


def settings_of(stand_ins: dict[str, str], changes: dict) -> dict:
    values = {
        "pretrained_model_name_or_path": "MODEL",
        "instance_data_dir": "PHOTOS",
        "instance_prompt": "photo of zwx thing",
        "output_dir": "run",
        "resolution": 64,
        "max_train_steps": 2,
        "learning_rate": 1e-4,
        "auto_test_model": False,
        "save_precision": "fp32",
        "log_interval": 10,
        "device": "cpu",
        **changes,
    }
    if values.get("concepts_list"):
        del values["instance_data_dir"], values["instance_prompt"]
    if values.get("with_prior_preservation"):
        values = {"num_class_images": 2, **values, "class_prompt": values.get("class_prompt") or "photo of a thing"}
    return {
        name: stand_ins.get(value, value) if isinstance(value, str) else value
        for name, value in values.items()
        if value != UNSET
    }


def outcome(changes: dict, stand_ins: dict[str, str], folder: Path, capsys, monkeypatch) -> dict:
    """What a run leaves and does: the content of its files, its log, how often its layers ran, or its error."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DBKIT_WORKSPACE", str(folder / "workspace"))
    settings = settings_of(stand_ins, {name: value for name, value in changes.items() if name != "again"})
    work: Counter = Counter()
    handle = register_module_forward_pre_hook(lambda module, inputs: work.update([type(module).__name__]))
    try:
        if changes.get("again"):
            train(**{**settings, "start_over": False})
        train(**settings)
        said = ""
    except DbkitError as error:
        said = str(error)
    finally:
        handle.remove()
    capsys.readouterr()
    return {"error": said, "work": work, **{path: content_of(folder / path) for path in files_of(folder)}}


def files_of(folder: Path) -> list[str]:
    """The files that a run left, but for those that repeat its settings."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in found if Path(name).name not in ("settings.yaml", "manifest.json")]
    # The names of a tracker's files hold the time and the machine.
    return [re.sub(r"tfevents.*", "tfevents", name) for name in kept]


def content_of(path: Path) -> object:
    if path.name == "log.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]
    if path.suffix == ".safetensors":
        # The order of its metadata changes from file to file.
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            bits = {name: (str(t.dtype), t.float().numpy().tobytes()) for name, t in tensors.items()}
            return bits, file.metadata()
    if path.suffix == ".pt":
        # An archive, whose own name is in it.
        with zipfile.ZipFile(path) as archive:
            return [archive.read(name) for name in archive.namelist()]
    return path.read_bytes() if path.is_file() else None


@pytest.fixture(scope="module")
def known() -> dict[str, dict]:
    """Outcomes of first runs, which several settings share."""
    return {}


@pytest.mark.parametrize("name", CASES)
def test_every_setting_changes_something(name, stand_ins, known, tmp_path, capsys, monkeypatch):
    common, value = CASES[name]
    key = json.dumps(common, sort_keys=True)
    if key not in known:
        known[key] = outcome(common, stand_ins, tmp_path / "first", capsys, monkeypatch)
    changes = {**common, name: value}
    if name in ("use_txt_as_label", "use_filename_as_label"):
        changes |= {"use_txt_as_label": False, "use_filename_as_label": False, name: True}
    second = outcome(changes, stand_ins, tmp_path / "second", capsys, monkeypatch)
    assert second != known[key]


def test_a_run_with_the_same_settings_leaves_the_same(stand_ins, tmp_path, capsys, monkeypatch):
    """Without this the test above would be passed by anything."""
    for number, common in enumerate(({}, PRIOR, PREVIEWS, LORA, {"log_with": "tensorboard"})):
        runs = [outcome(common, stand_ins, tmp_path / f"{number}-{n}", capsys, monkeypatch) for n in range(2)]
        assert runs[0] == runs[1] and not runs[0]["error"]
