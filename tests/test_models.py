"""Loading and saving the five parts: what is refused, what a saved folder holds, what tells one model from another."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from dbkit import DbkitError
from dbkit.downloads import find
from dbkit.models import (
    PARTS,
    WEIGHTS,
    Facts,
    _check_family,
    check_resolution,
    fingerprint,
    load_models,
    load_state_dict,
    model_facts,
    read_config,
    read_weights,
    save_models,
    state_dict,
)

CPU = torch.device("cpu")
TEXTS = ("photo of zwx dog", "Ein Bär, ganz groß!", "犬の写真 🐕", "")


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_folder_tells_its_facts(model, v_model, inpainting_model):
    assert model_facts(model) == Facts(vae_scale_factor=8, resolution=64, prediction_type="epsilon", text_layers=2)
    assert not model_facts(model).inpaints and model_facts(inpainting_model).inpaints
    assert model_facts(v_model).prediction_type == "v_prediction"
    assert load_models(model).facts == model_facts(model)


def test_a_hugging_face_id_is_known_only_once_downloaded():
    assert model_facts("owner/name") is None


def test_loaded_parts_are_fp32_frozen_and_in_evaluation_mode(model):
    models = load_models(model)
    for module in (models.text_encoder, models.vae, models.unet):
        assert not module.training
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.float32, False)}


def test_loading_does_not_touch_the_global_random_state(model):
    before = torch.get_rng_state()
    load_models(model)
    assert torch.equal(torch.get_rng_state(), before)


# What is refused before anything is loaded.


def test_a_single_file_is_to_be_converted_first(tmp_path):
    file = tmp_path / "sd.safetensors"
    file.touch()
    with pytest.raises(DbkitError, match=r"is a single file; convert it first: dbkit convert .*sd\.safetensors .*sd$"):
        model_facts(file)


@pytest.mark.parametrize(
    "name", ["no-such-folder", "./a/b", "/a/b", "~/model", "a/b/c", "C:\\models\\sd", "models/sd15", "runs/dog"]
)
def test_a_path_that_is_not_there_is_refused(name):
    with pytest.raises(DbkitError, match=r"there is no model folder .*; check the path, or give a Hugging Face id"):
        model_facts(name)


def test_sdxl_folders_are_refused(copied):
    (copied / "text_encoder_2").mkdir()
    with pytest.raises(DbkitError, match="is a Stable Diffusion XL model"):
        model_facts(copied)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(DbkitError, match=rf"the model folder .* lacks {part}/\w+\.json.*; copy the model again"):
        model_facts(copied)


@pytest.mark.parametrize("part", WEIGHTS)
def test_missing_weights_are_named(copied, part):
    (copied / part / WEIGHTS[part]).unlink()
    with pytest.raises(DbkitError, match=f"lacks {part} weights; copy the model again"):
        model_facts(copied)


def test_settings_that_lack_what_a_model_has_are_refused(copied):
    path = copied / "vae" / "config.json"
    path.write_text("{}")
    expected = r"the settings of .*copied are not those of a model \('latent_channels'\); copy the model again"
    with pytest.raises(DbkitError, match=expected):
        model_facts(copied)


def test_an_unet_of_other_channels_is_refused(copied):
    change_json(copied / "unet" / "config.json", in_channels=5)
    expected = r"the U-Net has 5 input channels and the VAE 4; dbkit trains plain models \(4\) and inpainting"
    with pytest.raises(DbkitError, match=expected):
        model_facts(copied)


def test_a_damaged_configuration_file_is_named(copied):
    (copied / "vae" / "config.json").write_text('{"latent_chan')
    with pytest.raises(DbkitError, match=r"vae.config\.json is not readable \(.+\); copy the model again"):
        read_config(copied, "vae")


@pytest.mark.parametrize(("resolution", "nearest"), [(500, 496), (3, 8), (517, 520)])
def test_a_resolution_that_the_vae_cannot_encode_is_refused_with_the_nearest_one(model, resolution, nearest):
    with pytest.raises(DbkitError, match=rf"is {resolution}; .* need a multiple of 8, for instance {nearest}$"):
        check_resolution(resolution, model_facts(model))


def test_resolutions_that_the_vae_can_encode_pass(model):
    check_resolution(72, model_facts(model))
    check_resolution(500, None)


# What is refused once it is loaded.


def test_an_unet_of_another_text_width_is_refused(copied):
    with torch.random.fork_rng(devices=[]):
        UNet2DConditionModel.from_config({**read_config(copied, "unet"), "cross_attention_dim": 32}).save_pretrained(
            copied / "unet"
        )
    with pytest.raises(DbkitError, match="expects text states of width 32, its text encoder gives 64; take both from"):
        load_models(copied)


def test_an_unet_with_more_input_channels_than_latents_is_refused(model):
    models = load_models(model)
    with torch.random.fork_rng(devices=[]):
        models.unet = UNet2DConditionModel.from_config({**models.unet.config, "in_channels": 8})
    with pytest.raises(DbkitError, match="the U-Net has 8 input channels and the VAE 4"):
        _check_family(models, "owner/name")


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(model):
    models = load_models(model)
    models.tokenizer.add_tokens(["<zwx>"])
    with pytest.raises(DbkitError, match=r"knows 515 tokens and the text encoder 514; take both from one model"):
        _check_family(models, model)


@pytest.mark.parametrize("part", WEIGHTS)
def test_damaged_weights_are_said_in_one_sentence(copied, part):
    path = copied / part / WEIGHTS[part]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DbkitError, match=r"the model .*copied cannot be loaded \(.+\); copy or convert it again"):
        load_models(copied)


@pytest.mark.parametrize("given", ["checkpoints/300", "checkpoint-300"])
def test_a_model_that_a_run_does_not_have_is_told_with_those_it_has(tmp_path, monkeypatch, given):
    for folder in ("checkpoints/step_000200", "checkpoints/step_000300", "model"):
        (tmp_path / "dog" / folder).mkdir(parents=True)
    (tmp_path / "dog" / "settings.yaml").touch()
    has = "the run has model, checkpoints/step_000300, checkpoints/step_000200$"
    monkeypatch.chdir(tmp_path)
    # The second of these would do as an id of the Hub.
    for name in (tmp_path / "dog" / given, Path("dog", given)):
        with pytest.raises(DbkitError, match=rf"^there is no model folder .*{given}; {has}"):
            model_facts(name)
        with pytest.raises(DbkitError, match=rf"^there is no file or folder .*{given}; {has}"):
            find(name, (".safetensors",))
    monkeypatch.chdir(tmp_path / "dog")
    assert model_facts("owner/name") is None


@pytest.fixture
def offline(monkeypatch):
    """The hub's library reads its environment once, when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_model_that_cannot_be_downloaded_is_said_in_one_sentence(offline):
    with pytest.raises(
        DbkitError, match=r"the model owner/name is not on this machine and .* \(HF_HUB_OFFLINE is set\)"
    ):
        load_models("owner/name")


# What a saved folder holds.


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_saved_model_holds_the_live_weights(model, tmp_path, precision, dtype):
    models = load_models(model)
    save_models(models, tmp_path / "saved", precision)
    for part in WEIGHTS:
        live, saved = state_dict(getattr(models, part), part), read_weights(tmp_path / "saved", part)
        assert live.keys() == saved.keys()
        assert all(torch.equal(saved[name], live[name].to(dtype)) for name in live)


def test_weights_without_a_precision_are_saved_as_they_are(model, tmp_path):
    models = load_models(model)
    models.unet.half()
    save_models(models, tmp_path / "saved")
    assert {tensor.dtype for tensor in read_weights(tmp_path / "saved", "unet").values()} == {torch.float16}
    assert {tensor.dtype for tensor in read_weights(tmp_path / "saved", "vae").values()} == {torch.float32}


def test_a_saved_folder_loads_again_as_the_same_model(model, tmp_path):
    models = load_models(model)
    save_models(models, tmp_path / "saved")
    again = load_models(tmp_path / "saved")
    for part in WEIGHTS:
        first, second = (state_dict(getattr(m, part), part) for m in (models, again))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert [models.tokenizer(text).input_ids for text in TEXTS] == [again.tokenizer(text).input_ids for text in TEXTS]
    assert again.scheduler_config == models.scheduler_config


def test_a_saved_folder_does_not_say_where_it_was_loaded_from(model, tmp_path):
    models = load_models(model)
    assert str(models.unet.config["_name_or_path"]) == str(model)
    save_models(models, tmp_path / "saved")
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "saved").rglob("*.json")]
    assert len(texts) > 5 and not [text for text in texts if str(model.parent) in text]


def test_a_saved_folder_keeps_the_sampler_it_came_with(model, tmp_path):
    save_models(load_models(model), tmp_path / "saved")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(pipeline.scheduler).__name__ == "PNDMScheduler"
    assert pipeline.safety_checker is None


def test_text_encoder_keys_are_saved_with_their_prefix(model, tmp_path):
    save_models(load_models(model), tmp_path / "saved")
    names = list(load_file(tmp_path / "saved" / "text_encoder" / "model.safetensors"))
    assert names and all(name.startswith("text_model.") for name in names)
    assert not any(name.endswith("position_ids") for name in names)
    loaded, info = CLIPTextModel.from_pretrained(tmp_path / "saved" / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.architectures == ["CLIPTextModel"]


def test_weights_that_do_not_fit_in_fp16_are_refused_by_name(model, tmp_path):
    models = load_models(model)
    with torch.no_grad():
        models.unet.conv_in.bias[0] = 1e6
    with pytest.raises(
        DbkitError, match=r"conv_in\.bias of the unet is no number or does not fit in fp16; set save_precision to bf16"
    ):
        save_models(models, tmp_path / "saved", "fp16")


def test_state_dict_and_load_state_dict_are_inverse(model):
    models, other = load_models(model), load_models(model)
    for part in WEIGHTS:
        weights = {name: tensor + 1 for name, tensor in state_dict(getattr(models, part), part).items()}
        load_state_dict(getattr(other, part), part, weights)
        found = state_dict(getattr(other, part), part)
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("part", WEIGHTS)
def test_missing_and_unknown_names_raise(model, part):
    module = getattr(load_models(model), part)
    weights = state_dict(module, part)
    name = next(iter(weights))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_state_dict(module, part, {n: t for n, t in weights.items() if n != name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_state_dict(module, part, {**weights, "text_model.more": weights[name]})


# Weight files as they are found in the wild.


def test_fp16_variants_load(copied):
    for part, name in WEIGHTS.items():
        path = copied / part / name
        save_file(
            {n: t.half() for n, t in load_file(path).items()},
            path.with_name(name.replace(".safetensors", ".fp16.safetensors")),
            metadata={"format": "pt"},
        )
        path.unlink()
    models = load_models(copied)
    assert models.unet.dtype == torch.float32
    assert {t.dtype for t in read_weights(copied, "unet").values()} == {torch.float16}


def test_full_precision_is_read_before_variants_and_safetensors_before_pickles(copied, model):
    folder = copied / "unet"
    wrong = {"wrong": torch.zeros(1)}
    save_file(wrong, folder / "diffusion_pytorch_model.fp16.safetensors")
    save_file(wrong, folder / "diffusion_pytorch_model.non_ema.safetensors")
    torch.save(wrong, folder / "diffusion_pytorch_model.bin")
    assert read_weights(copied, "unet").keys() == read_weights(model, "unet").keys()


def test_pickled_weights_are_read_as_data(copied, model):
    path = copied / "unet" / WEIGHTS["unet"]
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    expected = read_weights(model, "unet")
    found = read_weights(copied, "unet")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Code:
    """A pickle that would make a folder when loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("content", ["code", "garbage"])
def test_weights_that_cannot_be_read_as_data_are_refused(copied, tmp_path, content):
    (copied / "unet" / WEIGHTS["unet"]).unlink()
    path = copied / "unet" / "diffusion_pytorch_model.bin"
    if content == "code":
        torch.save({"conv_in.weight": torch.zeros(1), "more": Code(tmp_path / "ran")}, path)
    else:
        path.write_bytes(b"not weights")
    with pytest.raises(DbkitError, match=r"diffusion_pytorch_model\.bin cannot be read \(.+\); copy the model again"):
        read_weights(copied, "unet")
    assert not (tmp_path / "ran").exists()


# The tokenizer.


def test_a_model_without_its_vocabulary_is_refused(copied):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (copied / "tokenizer" / name).unlink()
    with pytest.raises(
        DbkitError, match=r"cannot be loaded \(the tokenizer's vocabulary is missing\); copy or convert"
    ):
        load_models(copied)


def test_another_tokenizer_can_be_named(copied, model):
    change_json(copied / "tokenizer" / "tokenizer_config.json", model_max_length=33)
    assert load_models(model).tokenizer.model_max_length == 77
    assert load_models(model, tokenizer_name=str(copied / "tokenizer")).tokenizer.model_max_length == 33


# What tells one model from another.


def test_a_moved_model_keeps_its_fingerprint(model, copied):
    assert fingerprint(model) == fingerprint(copied)


@pytest.mark.parametrize("part", WEIGHTS)
def test_another_weight_gives_another_fingerprint(model, copied, part):
    path = copied / part / WEIGHTS[part]
    save_file({name: tensor * 1.001 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert fingerprint(model) != fingerprint(copied)


def test_a_hugging_face_id_and_its_revision_are_its_fingerprint():
    assert fingerprint("owner/name") == "owner/name@main"
    assert fingerprint("owner/name", "v2") == "owner/name@v2"


# Where to compute.


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_missing_weight_is_named_and_never_made_up(copied, part):
    path = copied / part / WEIGHTS[part]
    weights = load_file(path)
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(DbkitError, match=f"its {part} has missing weights: .*{name.removeprefix('text_model.')}"):
        load_models(copied)


def test_a_model_of_another_prediction_type_is_refused_before_it_is_loaded(copied):
    change_json(copied / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(DbkitError, match="predicts 'sample'; dbkit trains models of epsilon or v_prediction"):
        model_facts(copied)


def test_a_run_is_told_from_its_model(copied, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(copied, run / "model")
    with pytest.raises(DbkitError, match=r"run is a run; its model is .*run.model"):
        model_facts(run)
    # A LoRA's.
    (run / "model" / "model_index.json").rename(run / "model" / "lora.json")
    with pytest.raises(DbkitError, match=r"run is a run; its model is .*run.model"):
        model_facts(run)


def test_a_folder_that_is_no_model_is_said_to_be_none(tmp_path):
    with pytest.raises(DbkitError, match="is not a model folder, which has tokenizer"):
        model_facts(tmp_path)


def test_models_may_be_loaded_in_several_threads_at_once(model):
    with ThreadPoolExecutor(6) as pool:
        loaded = list(pool.map(lambda number: load_models(model), range(6)))
    expected = load_models(model).unet.state_dict()
    for models in loaded:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in models.unet.state_dict().items())
    # Nothing of what the libraries change in torch while they load is left.
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"
