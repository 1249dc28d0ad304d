"""Folder to file and back is the identity; what is not a whole Stable Diffusion model is refused by name."""

import json
import os
import pickletools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from faults import failing
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dbkit import DbkitError, convert, embedded, keys, train
from dbkit.cli import main
from dbkit.families import scheduler_config
from dbkit.files import size
from dbkit.models import WEIGHTS, Models, load_models, read_weights, save_models, state_dict
from dbkit.tokenizer import load_tokenizer

LISTS = Path(__file__).parents[2] / "shared" / "data" / "checkpoints"
CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
TEXTS = ("photo of zwx dog", "Ein Bär, ganz groß!", "犬の写真 🐕", "")
UNET, VAE, TEXT = (keys.PREFIXES[part] for part in ("unet", "vae", "text_encoder"))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory) -> Path:
    """The small model as an original file. Do not change it."""
    return convert(model, tmp_path_factory.mktemp("files") / "small.safetensors")


@pytest.fixture(scope="module")
def sd2_file(sd2_model, tmp_path_factory) -> Path:
    """The narrow Stable Diffusion 2 as an original file. Do not change it."""
    return convert(sd2_model, tmp_path_factory.mktemp("files") / "sd2.safetensors")


@pytest.fixture(scope="module")
def twelve_heads(model, tmp_path_factory) -> Path:
    """A small model whose text encoder has 12 heads, as Stable Diffusion 1 has, so that no metadata is needed."""
    base = load_models(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = {**base.text_encoder.config.to_dict(), "hidden_size": 48, "num_attention_heads": 12}
        models = Models(
            base.tokenizer,
            CLIPTextModel(CLIPTextConfig.from_dict(config)),
            base.vae,
            UNet2DConditionModel.from_config({**base.unet.config, "cross_attention_dim": 48}),
            base.noise_scheduler,
            base.scheduler_config,
        )
    folder = tmp_path_factory.mktemp("models") / "twelve"
    save_models(models, folder)
    return folder


@pytest.fixture(scope="module")
def twelve_heads_tensors(twelve_heads, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The tensors of its original file, and nothing else."""
    return load_file(convert(twelve_heads, tmp_path_factory.mktemp("files") / "twelve.safetensors"))


@pytest.fixture(scope="module")
def ckpt(model, tmp_path_factory) -> Path:
    """The small model as a pickled original file. Do not change it."""
    return convert(model, tmp_path_factory.mktemp("files") / "small.ckpt")


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def changed(file: Path, path: Path, change) -> Path:
    """The original file with its tensors changed by change(tensors), and the same metadata."""
    tensors = load_file(file)
    change(tensors)
    return write(path, tensors, metadata_of(file))


def settings_of(folder: Path) -> dict[str, dict]:
    """The settings of the parts, without what libraries note about themselves and where a model came from."""
    own = ("_diffusers_version", "_name_or_path", "transformers_version")
    return {
        name: {key: value for key, value in json.loads((folder / name).read_text()).items() if key not in own}
        for name in CONFIGS
    }


def assert_same_model(first: Path, second: Path):
    for part in WEIGHTS:
        one, two = read_weights(first, part), read_weights(second, part)
        assert one.keys() == two.keys()
        assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)
    assert settings_of(first) == settings_of(second)
    one, two = (load_tokenizer(str(folder / "tokenizer")) for folder in (first, second))
    assert [one(text).input_ids for text in TEXTS] == [two(text).input_ids for text in TEXTS]
    assert one.model_max_length == two.model_max_length == 77


def assert_same_file(first: Path, second: Path):
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)
    one, two = (json.loads(metadata_of(path)["dbkit"]) for path in (first, second))
    for configs in (one["configs"], two["configs"]):
        for config in configs.values():
            for key in ("_diffusers_version", "_name_or_path", "transformers_version", "dtype", "torch_dtype"):
                config.pop(key, None)
    assert one == two


# There and back.


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("model", ".safetensors"),
        ("model", ".ckpt"),
        ("v_model", ".safetensors"),
        ("v_model", ".CKPT"),
        ("inpainting_model", ".safetensors"),
        ("sd2_model", ".safetensors"),
        ("sd2_v_model", ".ckpt"),
    ],
)
def test_a_folder_comes_back_from_a_file_as_the_same_model(request, tmp_path, kind, suffix):
    folder = request.getfixturevalue(kind)
    made = convert(folder, tmp_path / f"made{suffix}")
    back = convert(made, tmp_path / "back")
    assert (made, back) == (tmp_path / f"made{suffix}", tmp_path / "back")
    assert_same_model(folder, back)
    # User interfaces do not find out by themselves what a model predicts that is no plain Stable Diffusion 1.
    beside = [] if kind in ("model", "inpainting_model") else ["made.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", made.name, *beside]


def test_a_file_comes_back_from_a_folder_as_the_same_file(file, tmp_path):
    assert_same_file(file, convert(convert(file, tmp_path / "folder"), tmp_path / "again.safetensors"))


@pytest.mark.parametrize("kind", ["model", "sd2_v_model"])
def test_a_converted_folder_samples_the_same_picture_in_diffusers(request, tmp_path, kind):
    model = request.getfixturevalue(kind)

    def picture(folder):
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        random = torch.Generator().manual_seed(0)
        return pipeline("a dog", num_inference_steps=2, height=64, width=64, generator=random).images[0].tobytes()

    assert picture(convert(convert(model, tmp_path / "made.safetensors"), tmp_path / "back")) == picture(model)


@pytest.mark.parametrize("kind", ["model", "v_model", "inpainting_model", "sd2_model", "sd2_v_model"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_diffusers_own_reader_of_single_files_computes_the_same(request, tmp_path, kind, suffix):
    folder = request.getfixturevalue(kind)
    made = convert(folder, tmp_path / f"made{suffix}")
    pipeline = StableDiffusionInpaintPipeline if kind == "inpainting_model" else StableDiffusionPipeline
    theirs = pipeline.from_single_file(made, config=str(folder), local_files_only=True, safety_checker=None)
    ours = load_models(folder)
    ids = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, ours.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = ours.text_encoder(ids).last_hidden_state
        pairs = [
            (theirs.text_encoder(ids).last_hidden_state, states),
            (theirs.unet(latents, 500, states).sample, ours.unet(latents, 500, states).sample),
            (theirs.vae.decode(latents[:, :4]).sample, ours.vae.decode(latents[:, :4]).sample),
        ]
    for part in WEIGHTS:
        loaded, expected = (state_dict(getattr(models, part), part) for models in (theirs, ours))
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    # Where weights lie in memory changes the order of sums.
    assert all((found - expected).abs().max() <= 1e-5 * expected.abs().max() for found, expected in pairs)


def test_a_ckpt_holds_its_tensors_under_state_dict_and_nothing_that_automatic1111_refuses(file, ckpt):
    # Its check of a zip's members; what today's torch.save writes does not pass.
    allowed = r"[^/]+/(data/\d+|data\.pkl|version|byteorder|\.data/serialization_id)"
    with zipfile.ZipFile(ckpt) as archive:
        assert all(re.fullmatch(allowed, name) for name in archive.namelist())
        imports = {words[0] for words in _globals(archive.read("archive/data.pkl"))}
    assert imports <= {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
    loaded = torch.load(ckpt, weights_only=True)
    expected = load_file(file)
    assert loaded["state_dict"].keys() == expected.keys()
    assert all(torch.equal(loaded["state_dict"][name], expected[name]) for name in expected)


def _globals(pickled: bytes):
    return [(argument,) for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"]


@pytest.mark.parametrize("level", ["state_dict", "top"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_is_read_whatever_its_level_and_format(twelve_heads, twelve_heads_tensors, tmp_path, level, zipped):
    tensors = twelve_heads_tensors
    content = {"state_dict": tensors, "global_step": 7, "epoch": 1} if level == "state_dict" else tensors
    torch.save(content, tmp_path / "found.ckpt", _use_new_zipfile_serialization=zipped)
    back = convert(tmp_path / "found.ckpt", tmp_path / "back", tokenizer_name=str(twelve_heads / "tokenizer"))
    for part in WEIGHTS:
        one, two = read_weights(twelve_heads, part), read_weights(back, part)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Names and shapes.


@pytest.mark.skipif(not LISTS.is_dir(), reason="the lists of key names are not beside the checkout")
def test_the_small_model_is_written_under_the_names_of_stable_diffusion_1(file):
    listed = json.loads((LISTS / "sd1_keys.json").read_text())["keys"]
    required = {entry["key"]: entry["shape"] for entry in listed if entry["role"] == "required"}
    with safe_open(file, "pt") as opened:
        found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    # It has the same levels, and 2 of the 12 layers of the text encoder.
    deeper = [f"{TEXT}text_model.encoder.layers.{layer}." for layer in range(2, 12)]
    assert sorted(found) == sorted(name for name in required if not name.startswith(tuple(deeper)))
    assert {name: len(shape) for name, shape in found.items()} == {name: len(required[name]) for name in found}


@pytest.mark.skipif(not LISTS.is_dir(), reason="the lists of key names are not beside the checkout")
def test_stable_diffusion_2_is_written_under_all_of_its_names(sd2_file):
    listed = json.loads((LISTS / "sd2_keys.json").read_text())["keys"]
    # The buffers of the noise schedule alone are left out.
    listed = {entry["key"]: entry["shape"] for entry in listed if entry["key"].startswith((UNET, VAE, "cond_stage"))}
    with safe_open(sd2_file, "pt") as opened:
        found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    assert len(found) == 1228 and found.keys() == listed.keys()
    assert {name: len(shape) for name, shape in found.items()} == {name: len(listed[name]) for name in found}


def test_the_text_encoder_of_stable_diffusion_2_joins_its_matrices_and_repeats_its_last_layer(sd2_model, sd2_file):
    tensors, weights = load_file(sd2_file), read_weights(sd2_model, "text_encoder")
    block = keys.OPEN_CLIP + "transformer.resblocks."
    for layer in (0, 22):
        thirds = tensors[f"{block}{layer}.attn.in_proj_weight"].chunk(3)
        for name, third in zip(("q", "k", "v"), thirds):
            assert torch.equal(third, weights[f"text_model.encoder.layers.{layer}.self_attn.{name}_proj.weight"])
    last = [name for name in tensors if name.startswith(block + "23.")]
    assert len(last) == 12
    assert all(torch.equal(tensors[name], tensors[name.replace(".23.", ".22.")]) for name in last)
    assert torch.equal(tensors[keys.OPEN_CLIP + "text_projection"], torch.ones(64, 64))
    assert torch.equal(tensors[keys.OPEN_CLIP + "logit_scale"], torch.ones(()))


def test_vae_attention_is_a_convolution_in_files_and_linear_in_folders(model, file):
    in_file, in_folder = load_file(file), read_weights(model, "vae")
    for side in ("encoder", "decoder"):
        for original, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            four = in_file[f"{VAE}{side}.mid.attn_1.{original}.weight"]
            two = in_folder[f"{side}.mid_block.attentions.0.{name}.weight"]
            assert (four.ndim, two.ndim) == (4, 2)
            assert torch.equal(four[:, :, 0, 0], two)


def test_text_encoder_names_without_their_prefix_are_read_from_a_file(model, file, tmp_path):
    def strip(tensors):
        for name in [name for name in tensors if name.startswith(TEXT)]:
            tensors[name.replace(TEXT + "text_model.", TEXT)] = tensors.pop(name)

    assert_same_model(model, convert(changed(file, tmp_path / "f.safetensors", strip), tmp_path / "back"))


def test_text_encoder_names_without_their_prefix_are_read_from_a_folder(copied, file, tmp_path):
    path = copied / "text_encoder" / WEIGHTS["text_encoder"]
    write(path, {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()})
    assert_same_file(file, convert(copied, tmp_path / "made.safetensors"))


@pytest.mark.parametrize("pickled", [True, False])
def test_old_names_of_the_vae_attention_are_read_from_a_folder(copied, file, tmp_path, pickled):
    path = copied / "vae" / WEIGHTS["vae"]
    weights = load_file(path)
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        for name in [name for name in weights if f".attentions.0.{new}." in name]:
            weights[name.replace(f".{new}.", f".{old}.")] = weights.pop(name)
    assert any(".query." in name for name in weights)
    path.unlink()
    if pickled:
        torch.save(weights, path.with_suffix(".bin"))
    else:
        write(path, weights)
    assert_same_file(file, convert(copied, tmp_path / "made.safetensors"))


def test_what_no_model_needs_is_left_out(model, file, tmp_path):
    def add(tensors):
        tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(2)
        tensors["model_ema.decay"] = torch.zeros(())
        tensors[TEXT + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(2)
        for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "logvar"):
            tensors[name] = torch.zeros(1000)
        for name in ("posterior_variance", "log_one_minus_alphas_cumprod", "lvlb_weights"):
            tensors[name] = torch.zeros(1000)

    assert_same_model(model, convert(changed(file, tmp_path / "f.safetensors", add), tmp_path / "back"))


# Files that dbkit did not write.


def test_a_file_without_metadata_becomes_the_same_model(twelve_heads, twelve_heads_tensors, tmp_path):
    plain = write(tmp_path / "plain.safetensors", twelve_heads_tensors)
    back = convert(plain, tmp_path / "back", tokenizer_name=str(twelve_heads / "tokenizer"))
    for part in WEIGHTS:
        one, two = read_weights(twelve_heads, part), read_weights(back, part)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    models = load_models(back)
    expected = load_models(twelve_heads)
    for name in ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "cross_attention_dim"):
        assert models.unet.config[name] == expected.unet.config[name]
    assert models.scheduler_config == scheduler_config("epsilon")
    assert models.text_encoder.config.num_attention_heads == 12


def test_a_file_of_unknown_widths_is_refused(file, tmp_path):
    plain = write(tmp_path / "plain.safetensors", load_file(file))
    with pytest.raises(DbkitError, match=r"has the widths of no Stable Diffusion 1 model \(.+\), and nothing in the"):
        convert(plain, tmp_path / "back", tokenizer_name="unused")
    assert not (tmp_path / "back").exists()


def test_the_usual_tokenizer_is_not_carried_and_another_one_is(copied, file, tmp_path, monkeypatch):
    assert json.loads(metadata_of(file)["dbkit"])["tokenizer"]["vocab"]
    usual = {f"word{number}": number for number in range(49408)}
    words = {"photo</w>": 1125, "dog</w>": 1929, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    for word, number in words.items():
        usual[word] = usual.pop(f"word{number}")
    (copied / "tokenizer" / "vocab.json").write_text(json.dumps(usual))
    made = convert(copied, tmp_path / "made.safetensors")
    assert json.loads(metadata_of(made)["dbkit"])["tokenizer"] is None
    # The hub's library reads its environment once, when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DbkitError, match=r"openai/clip-vit-large-patch14 is not on this machine"):
        convert(made, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    convert(made, tmp_path / "back", tokenizer_name=str(copied / "tokenizer"))
    assert (tmp_path / "back" / "model_index.json").is_file()


# fp16.


def test_half_stores_fp16_and_round_trips(model, file, tmp_path):
    made = convert(model, tmp_path / "half.safetensors", save_precision="fp16")
    full, half = load_file(file), load_file(made)
    assert full.keys() == half.keys()
    assert all(half[name].dtype == torch.float16 and torch.equal(half[name], full[name].half()) for name in full)
    back = convert(made, tmp_path / "back")
    assert {tensor.dtype for part in WEIGHTS for tensor in read_weights(back, part).values()} == {torch.float16}
    assert_same_file(made, convert(back, tmp_path / "again.safetensors"))


def test_half_works_from_a_file_too(file, tmp_path):
    back = convert(file, tmp_path / "back", save_precision="fp16")
    assert {tensor.dtype for part in WEIGHTS for tensor in read_weights(back, part).values()} == {torch.float16}


@pytest.mark.parametrize("direction", ["to a file", "to a folder"])
def test_values_that_do_not_fit_in_fp16_are_refused_by_name(copied, file, tmp_path, direction):
    if direction == "to a file":
        path = copied / "unet" / WEIGHTS["unet"]
        weights = load_file(path)
        weights["conv_in.bias"][:2] = 1e6
        source, destination = (write(path, weights), copied)[1], tmp_path / "made.safetensors"
        name = UNET + "input_blocks.0.0.bias"
    else:
        name = "unet conv_in.bias"

        def enlarge(tensors):
            tensors[UNET + "input_blocks.0.0.bias"][:2] = 1e6

        source, destination = changed(file, tmp_path / "large.safetensors", enlarge), tmp_path / "back"
    with pytest.raises(
        DbkitError,
        match=rf"has 2 values in {name} that are no numbers or do not fit in fp16; set save_precision to bf16 or",
    ):
        convert(source, destination, save_precision="fp16")
    assert not destination.exists() and not list(tmp_path.glob("*.partial"))
    convert(source, destination)
    assert destination.exists()


def test_many_values_that_become_zero_in_fp16_are_counted_and_said(copied, tmp_path, capsys):
    path = copied / "unet" / WEIGHTS["unet"]
    weights = load_file(path)
    weights["conv_in.bias"][:5] = 1e-12
    write(path, weights)
    convert(copied, tmp_path / "half.safetensors", save_precision="fp16")
    said = capsys.readouterr().out
    assert f"5 values in {UNET}input_blocks.0.0.bias became zero, being too small for fp16; set save_precision" in said
    convert(copied, tmp_path / "whole.safetensors")
    assert "became zero" not in capsys.readouterr().out


def test_values_that_are_no_numbers_are_refused_in_any_precision(file, tmp_path):
    path = changed(file, tmp_path / "nan.safetensors", lambda tensors: tensors[UNET + "out.2.bias"].fill_(torch.nan))
    with pytest.raises(DbkitError, match=r"has 4 values in unet conv_out\.bias that are no numbers .*; take another"):
        convert(path, tmp_path / "back")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_is_written_in_the_precision_asked_for(model, tmp_path, precision, dtype, suffix):
    half = convert(model, tmp_path / "half.safetensors", save_precision="fp16")
    folder = convert(half, tmp_path / "folder")
    made = convert(folder, tmp_path / f"made{suffix}", save_precision=precision)
    tensors = load_file(made) if suffix == ".safetensors" else torch.load(made, weights_only=True)["state_dict"]
    expected = load_file(half)
    assert tensors.keys() == expected.keys()
    assert all(t.dtype == dtype and torch.equal(t, expected[name].to(dtype)) for name, t in tensors.items())


# What is not a whole Stable Diffusion 1 model.

ZERO = torch.zeros(1)
UNET_ONLY = {
    UNET + "input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
    UNET + "input_blocks.1.1.proj_in.weight": torch.zeros(8, 8, 1, 1),
    UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 768),
}
WHOLE = {
    **UNET_ONLY,
    VAE + "encoder.conv_in.weight": ZERO,
    TEXT + "text_model.embeddings.token_embedding.weight": ZERO,
}


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        ({**UNET_ONLY, "cond_stage_model.model.ln_final.weight": ZERO}, "lacks its vae"),
        (
            {**UNET_ONLY, "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": ZERO},
            "is a Stable Diffusion XL model",
        ),
        ({**WHOLE, UNET + "input_blocks.0.0.weight": torch.zeros(8, 5, 3, 3)}, "has 5 input channels, neither"),
        ({"down_blocks.0.resnets.0.conv1.weight": ZERO, "conv_in.weight": ZERO}, "holds one part of a model"),
        (UNET_ONLY, "lacks its vae and its text_encoder"),
        ({**UNET_ONLY, VAE + "encoder.conv_in.weight": ZERO}, "lacks its text_encoder"),
        ({"blocks.0.weight": ZERO}, "is not a Stable Diffusion model"),
        ({}, "is not a Stable Diffusion model"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_other_kinds_of_files_are_refused_by_their_kind(tmp_path, tensors, family, suffix):
    path = tmp_path / f"other{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        write(path, {name: tensor.clone() for name, tensor in tensors.items()})
    expected = rf"other{suffix} {family}.*; dbkit converts whole Stable Diffusion 1 and 2 models, so take one"
    with pytest.raises(DbkitError, match=expected):
        convert(path, tmp_path / "back")
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["lora_unet_down_blocks_0.lora_down.weight", "unet.down_blocks.0.to_q_lora.up.weight"])
def test_a_lora_in_a_pickle_is_refused_as_what_it_is(tmp_path, name):
    torch.save({name: ZERO}, tmp_path / "lora.ckpt")
    with pytest.raises(DbkitError, match=r"lora.ckpt is a LoRA, which is read from a .safetensors file only; dbkit"):
        convert(tmp_path / "lora.ckpt", tmp_path / "back")


def test_a_text_encoder_that_user_interfaces_compute_differently_is_refused(copied, tmp_path):
    path = copied / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu"}))
    expected = r"copied has hidden_act gelu, and user interfaces compute Stable Diffusion 1 with quick_gelu; if"
    with pytest.raises(DbkitError, match=expected):
        convert(copied, tmp_path / "made.safetensors")


def change_settings(folder: Path, name: str, **changes) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "setting", "value", "usual"),
    [
        ("scheduler/scheduler_config.json", "beta_schedule", "linear", "scaled_linear"),
        ("scheduler/scheduler_config.json", "beta_end", 0.02, 0.012),
        ("vae/config.json", "scaling_factor", 0.13025, 0.18215),
        ("vae/config.json", "shift_factor", 0.1, None),
        ("unet/config.json", "norm_eps", 1e-6, 1e-05),
        ("unet/config.json", "act_fn", "gelu", "silu"),
        ("unet/config.json", "flip_sin_to_cos", False, True),
        ("unet/config.json", "freq_shift", 1, 0),
    ],
)
def test_settings_that_no_file_carries_are_refused(copied, tmp_path, name, setting, value, usual):
    change_settings(copied, name, **{setting: value})
    expected = rf"the {name.split('/')[0]} of .*copied has {setting} {value}, and user .* 1 with {usual}, so its file"
    with pytest.raises(DbkitError, match=expected):
        convert(copied, tmp_path / "made.safetensors")
    assert not (tmp_path / "made.safetensors").exists()


def test_a_schedule_without_its_settings_is_that_of_diffusers(copied, tmp_path):
    (copied / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    with pytest.raises(DbkitError, match=r"has beta_start 0\.0001, and user interfaces compute .* with 0\.00085"):
        convert(copied, tmp_path / "made.safetensors")


def test_another_vae_with_another_scale_is_refused_by_its_name(model, copied, tmp_path):
    change_settings(copied, "vae/config.json", scaling_factor=0.13025)
    with pytest.raises(DbkitError, match=r"the VAE .*copied has scaling_factor 0\.13025, and user interfaces"):
        convert(model, tmp_path / "made.safetensors", pretrained_vae_name_or_path=str(copied))


def test_heads_that_user_interfaces_do_not_find_out_are_said(copied, twelve_heads, tmp_path, capsys):
    change_settings(copied, "unet/config.json", attention_head_dim=4, norm_num_groups=16)
    convert(copied, tmp_path / "made.safetensors")
    said = capsys.readouterr().out
    assert "user interfaces will make other pictures from" in said
    assert "attention_head_dim of the U-Net [4, 4, 4, 4] (they take [8, 8, 8, 8])" in said
    assert "norm_num_groups of the U-Net 16 (they take 32)" in said
    assert "num_attention_heads of the text encoder 4 (they take 12)" in said
    convert(twelve_heads, tmp_path / "usual.safetensors")
    assert "other pictures" not in capsys.readouterr().out


def test_a_file_of_the_embedded_model_is_said_to_be_for_practice(tmp_path, capsys):
    # What was trained from it lies elsewhere and has its tokenizer.
    trained = shutil.copytree(embedded.MODEL, tmp_path / "trained")
    for source in (embedded.NAME, trained):
        made = convert(source, tmp_path / "made.safetensors", overwrite=True)
        said = capsys.readouterr().out
        assert f"{made} is for practice: it is of dbkit's own small model, which other programs cannot use\n" in said
        assert "other pictures" not in said


def test_the_last_words_are_what_was_made_of_what(model, tmp_path, capsys):
    def last_line():
        return capsys.readouterr().out.splitlines()[-1]

    made = convert(model, tmp_path / "made.safetensors")
    assert last_line() == f"{made} ({size(made.stat().st_size)}) is made from {model}"
    back = convert(made, tmp_path / "back")
    whole = sum(path.stat().st_size for path in back.rglob("*") if path.is_file())
    assert last_line() == f"{back} ({size(whole)}) is made from {made}"
    made = convert(embedded.NAME, tmp_path / "small.safetensors")
    assert last_line() == f"{made} ({size(made.stat().st_size)}) is made from tiny-sd"


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_of_a_run_the_last_words_are_its_step_and_its_name(settings, tmp_path, capsys, monkeypatch, adapter):
    run = tmp_path / "mydog"
    more = {"adapter": adapter, "output_dir": run, "save_model_every_n_steps": 1}
    model = train(**{**settings, **more})
    monkeypatch.chdir(run)
    for step, source in ((2, model), (2, Path("model")), (1, run / "checkpoints" / "step_000001")):
        (file,) = source.glob("*.safetensors") if adapter == "lora" else [source]
        made = convert(file, tmp_path / "made.safetensors", overwrite=True)
        said = capsys.readouterr().out
        assert said.endswith(f"\n{made} ({size(made.stat().st_size)}) is step {step} of the run mydog\n")
    copy = shutil.copytree(model, tmp_path / "models" / "copy")
    (file,) = copy.glob("*.safetensors") if adapter == "lora" else [copy]
    convert(file, made, overwrite=True)
    assert capsys.readouterr().out.endswith(f") is made from {file}\n")


def test_the_command_line_ends_with_these_words_and_no_second_path(model, tmp_path, capsys):
    made = tmp_path / "made.safetensors"
    assert main(["convert", str(model), str(made)]) == 0
    *others, last = capsys.readouterr().out.splitlines()
    assert last == f"{made} ({size(made.stat().st_size)}) is made from {model}" and str(made) not in others


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_tokenizer_with_added_words_is_refused(copied, tmp_path, where):
    folder = copied / "tokenizer"
    if where == "added_tokens.json":
        (folder / where).write_text(json.dumps({"<zwx>": 514}))
    elif where == "tokenizer_config.json":
        change_settings(folder, where, added_tokens_decoder={"514": {"content": "<zwx>"}})
    else:
        change_settings(folder, where, added_tokens=[{"id": 514, "content": "<zwx>"}])
    with pytest.raises(DbkitError, match=r"the tokenizer of .*copied has added words \(<zwx>\), which no file carries"):
        convert(copied, tmp_path / "made.safetensors")


@pytest.mark.parametrize("direction", ["to a file", "to a folder"])
def test_a_text_encoder_under_both_of_its_spellings_is_refused(copied, file, tmp_path, direction):
    name = "final_layer_norm.bias"
    if direction == "to a file":
        path = copied / "text_encoder" / WEIGHTS["text_encoder"]
        weights = load_file(path)
        write(path, {**weights, name: torch.zeros_like(weights[f"text_model.{name}"])})
        source, destination = copied, tmp_path / "made.safetensors"
    else:

        def add(tensors):
            tensors[TEXT + name] = torch.zeros_like(tensors[f"{TEXT}text_model.{name}"])

        source, destination = changed(file, tmp_path / "both.safetensors", add), tmp_path / "made"
    with pytest.raises(DbkitError, match=rf"the text encoder is there twice, with text_model\.{name} and {name}; keep"):
        convert(source, destination)


def test_a_vae_under_both_of_its_spellings_is_refused(copied, tmp_path):
    path = copied / "vae" / WEIGHTS["vae"]
    weights, name = load_file(path), "decoder.mid_block.attentions.0.to_q.bias"
    write(path, {**weights, name.replace("to_q", "query"): torch.zeros_like(weights[name])})
    with pytest.raises(DbkitError, match=r"the VAE has decoder\.mid_block\.attentions\.0\.to_q\.bias under two names"):
        convert(copied, tmp_path / "made.safetensors")


@pytest.mark.parametrize(
    ("name", "setting", "value", "said"),
    [
        ("scheduler/scheduler_config.json", "_class_name", 5, "_class_name of its scheduler is 5"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "x", ".*"),
        ("unet/config.json", "sample_size", [64, 96], r"sample_size of its unet is \[64, 96\] and no whole number"),
        ("unet/config.json", "sample_size", 0, "sample_size of its unet is 0 and no whole number above 0"),
        ("unet/config.json", "sample_size", True, "sample_size of its unet is True and no whole number above 0"),
    ],
)
def test_settings_that_cannot_be_are_said(copied, tmp_path, name, setting, value, said):
    change_settings(copied, name, **{setting: value})
    with pytest.raises(DbkitError, match=rf"the settings of .*copied are not those of a model \({said}.*\); copy the"):
        convert(copied, tmp_path / "made.safetensors")


@pytest.mark.parametrize(
    ("part", "setting", "value", "said"),
    [
        ("scheduler", "prediction_type", [1], "what dbkit noted in it: its prediction_type is none"),
        ("scheduler", "prediction_type", "sample", "predicts sample by the settings in it and epsilon by"),
        ("scheduler", "_class_name", [1], r"_class_name of its scheduler is \[1\]"),
        ("scheduler", "beta_start", "x", "the settings of .* are not those of a model"),
        ("scheduler", "num_train_timesteps", {}, "the settings of .* are not those of a model"),
        ("unet", "sample_size", "64", "sample_size of its unet is '64' and no whole number"),
        ("vae", "block_out_channels", [], "has the widths of no Stable Diffusion 1 model"),
        ("text_encoder", "num_hidden_layers", "x", "has the widths of no Stable Diffusion 1 model"),
        ("tokenizer", "model_max_length", [1], r"the tokenizer that dbkit noted in .* \(model_max_length is \[1\]\)"),
    ],
)
def test_notes_of_another_type_are_said(file, tmp_path, part, setting, value, said):
    metadata = metadata_of(file)
    facts = json.loads(metadata["dbkit"])
    facts["configs"][part][setting] = value
    write(tmp_path / "odd.safetensors", load_file(file), {**metadata, "dbkit": json.dumps(facts)})
    with pytest.raises(DbkitError, match=said):
        convert(tmp_path / "odd.safetensors", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.safetensors"]


@pytest.mark.parametrize("tables", [{"vocab": {"a": "x"}}, {"vocab": {"a": True}}, {"merges": [1]}, {"vocab": [1]}])
def test_a_noted_tokenizer_of_another_type_is_said(file, tmp_path, tables):
    metadata = metadata_of(file)
    facts = json.loads(metadata["dbkit"])
    facts["tokenizer"] |= tables
    write(tmp_path / "odd.safetensors", load_file(file), {**metadata, "dbkit": json.dumps(facts)})
    with pytest.raises(DbkitError, match=r"odd\.safetensors is damaged .*what dbkit noted in it"):
        convert(tmp_path / "odd.safetensors", tmp_path / "made")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8, torch.uint16])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_weights_of_types_that_no_model_has_are_refused(file, tmp_path, dtype, suffix):
    tensors, path = load_file(file), tmp_path / f"odd{suffix}"
    tensors[UNET + "out.2.bias"] = tensors[UNET + "out.2.bias"].to(dtype)
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors, "dbkit": metadata_of(file)["dbkit"]}, path)
    else:
        write(path, tensors, metadata_of(file))
    with pytest.raises(
        DbkitError, match=r"odd\.\w+ has .*(out\.2|conv_out)\.bias in .*; take .* in fp16, bf16 or fp32"
    ):
        convert(path, tmp_path / "made")


def test_a_vae_whose_attention_is_no_convolution_of_one_pixel_is_refused(file, tmp_path):
    name = VAE + "decoder.mid.attn_1.q.weight"
    path = changed(
        file, tmp_path / "odd.safetensors", lambda tensors: tensors.update({name: torch.zeros(96, 96, 3, 3)})
    )
    with pytest.raises(DbkitError, match=r"odd\.safetensors is not a whole .*; its vae: size mismatch for decoder"):
        convert(path, tmp_path / "made")


def test_a_text_encoder_with_all_layers_of_open_clip_is_refused(sd2_model, tmp_path):
    folder = shutil.copytree(sd2_model, tmp_path / "whole")
    settings = json.loads((folder / "text_encoder" / "config.json").read_text())
    deeper = CLIPTextModel(CLIPTextConfig.from_dict({**settings, "num_hidden_layers": 24}))
    shutil.rmtree(folder / "text_encoder")
    deeper.save_pretrained(folder / "text_encoder")
    with pytest.raises(DbkitError, match=r"whole has 24 layers, and user interfaces read layer 23 of Stable Diffusion"):
        convert(folder, tmp_path / "made.safetensors")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("control_model.input_blocks.0.0.weight", "control_model.input_blocks.0.0.weight"),
        (UNET + "input_blocks.12.0.in_layers.0.bias", "input_blocks.12.0.in_layers.0.bias"),
        (VAE + "bottleneck.weight", "bottleneck.weight"),
    ],
)
def test_an_unknown_tensor_of_a_file_is_named(file, tmp_path, name, known):
    path = changed(file, tmp_path / "f.safetensors", lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(
        DbkitError, match=rf"f\.safetensors has tensors that Stable Diffusion 1 does not know: {known}$"
    ):
        convert(path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_of_many_unknown_tensors_the_first_are_named(file, tmp_path):
    def add(tensors):
        tensors.update({f"more.{number:02d}": torch.zeros(1) for number in range(12)})

    path = changed(file, tmp_path / "f.safetensors", add)
    with pytest.raises(DbkitError, match=r"does not know: more\.00, .*more\.09 and 2 more$"):
        convert(path, tmp_path / "back")


def test_an_unknown_tensor_inside_a_known_module_is_named(file, tmp_path):
    name = UNET + "middle_block.1.extra.weight"
    path = changed(file, tmp_path / "f.safetensors", lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(DbkitError, match=r"Unexpected key\(s\) in state_dict: \"mid_block\.attentions\.0\.extra"):
        convert(path, tmp_path / "back")


def test_an_unknown_tensor_of_a_folder_is_named(copied, tmp_path):
    path = copied / "unet" / WEIGHTS["unet"]
    write(path, {**load_file(path), "adapter.weight": torch.zeros(1)})
    with pytest.raises(
        DbkitError, match=r"copied is not a whole Stable Diffusion 1 model; its unet: .*adapter\.weight"
    ):
        convert(copied, tmp_path / "made.safetensors")


def test_a_part_of_an_unet_that_stable_diffusion_1_does_not_have_is_named(copied, tmp_path):
    with torch.random.fork_rng(devices=[]):
        config = {**load_models(copied).unet.config, "class_embed_type": "timestep"}
        UNet2DConditionModel.from_config(config).save_pretrained(copied / "unet")
    with pytest.raises(DbkitError, match=r"that Stable Diffusion 1 does not know: unet class_embedding\.linear_1\.\w+"):
        convert(copied, tmp_path / "made.safetensors")


MISSING = [
    (UNET + "input_blocks.0.0.weight", "conv_in.weight"),
    (UNET + "output_blocks.11.0.out_layers.3.bias", "up_blocks.3.resnets.2.conv2.bias"),
    (VAE + "decoder.mid.attn_1.q.weight", "decoder.mid_block.attentions.0.to_q.weight"),
    (TEXT + "text_model.final_layer_norm.bias", "final_layer_norm.bias"),
]


@pytest.mark.parametrize(("original", "name"), MISSING)
def test_a_missing_tensor_of_a_file_is_named(file, tmp_path, original, name):
    path = changed(file, tmp_path / "f.safetensors", lambda tensors: tensors.pop(original))
    with pytest.raises(DbkitError, match=rf"is not a whole Stable Diffusion 1 model; its .*Missing key.*{name}"):
        convert(path, tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize(
    ("original", "name"),
    [
        *MISSING,
        (VAE + "encoder.down.1.block.0.conv2.weight", "encoder.down_blocks.1.resnets.0.conv2.weight"),
        (TEXT + "text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
    ],
)
def test_a_missing_tensor_of_a_file_without_metadata_is_named(twelve_heads_tensors, tmp_path, original, name):
    tensors = {key: tensor for key, tensor in twelve_heads_tensors.items() if key != original}
    with pytest.raises(DbkitError, match=rf"is not a whole Stable Diffusion 1 model; it.*{name}"):
        convert(write(tmp_path / "f.safetensors", tensors), tmp_path / "back", tokenizer_name="unused")
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "conv_in.weight"),
        ("unet", "up_blocks.3.resnets.2.conv2.bias"),
        ("vae", "decoder.mid_block.attentions.0.to_q.weight"),
        ("text_encoder", "text_model.final_layer_norm.bias"),
    ],
)
def test_a_missing_tensor_of_a_folder_is_named(copied, tmp_path, part, name):
    path = copied / part / WEIGHTS[part]
    write(path, {key: tensor for key, tensor in load_file(path).items() if key != name})
    named = name.removeprefix("text_model.")
    with pytest.raises(DbkitError, match=rf"not a whole Stable Diffusion 1 model; its {part}: Missing key.*{named}"):
        convert(copied, tmp_path / "made.safetensors")
    assert not (tmp_path / "made.safetensors").exists()


# Files from strangers.


class Code:
    """A pickle that would make a folder when loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path, zipped):
    path = tmp_path / "evil.ckpt"
    content = {"state_dict": WHOLE, "more": Code(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        DbkitError, match=r"evil\.ckpt holds more than tensors, which could run code when loaded, so it"
    ):
        convert(path, tmp_path / "back")
    assert [left.name for left in tmp_path.iterdir()] == ["evil.ckpt"]
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("content", ["half", "empty", "text", "random"])
def test_a_damaged_file_is_said_in_one_sentence(file, ckpt, tmp_path, suffix, content):
    path = tmp_path / f"made{suffix}"
    whole = (file if suffix == ".safetensors" else ckpt).read_bytes()
    path.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"<html><body>404 not found</body></html>",
            "random": bytes(range(255, 0, -1)) * 10,
        }[content]
    )
    with pytest.raises(DbkitError, match=rf"made{suffix} is damaged or not a checkpoint \(.+\); download or copy it"):
        convert(path, tmp_path / "back")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": [1]}, {"state_dict": None}, {"state_dict": {"a": 1}}])
def test_a_ckpt_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "f.ckpt")
    with pytest.raises(DbkitError, match=r"is damaged or not a checkpoint|is not a Stable Diffusion model"):
        convert(tmp_path / "f.ckpt", tmp_path / "back")


@pytest.mark.parametrize(("suffix", "at"), [(".safetensors", 3), (".ckpt", 300)])
def test_what_a_failing_disk_changes_is_noticed(model, tmp_path, suffix, at):
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "dbkit", "convert", str(model), str(tmp_path / "out" / f"made{suffix}")]
    with failing(tmp_path / "out", "write", "corrupt", at=at, times=2) as faults:
        done = subprocess.run(command, env={**os.environ, **faults.env}, capture_output=True, text=True)
        assert faults.hits
    assert re.search(r"reads back differently from its source \(.+\); the disk may be failing", done.stderr)
    assert list((tmp_path / "out").iterdir()) == []


# Sources and destinations.


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DbkitError, match=r"there is no file or folder .*nothing\.safetensors; check the path"):
        convert(tmp_path / "nothing.safetensors", tmp_path / "back")


def test_a_source_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(DbkitError, match=r"gguf is neither a folder nor a \.safetensors or \.ckpt file"):
        convert(tmp_path / "model.gguf", tmp_path / "back")


def test_a_folder_needs_a_file_as_its_destination(model, tmp_path):
    with pytest.raises(DbkitError, match=r"is a folder, so the destination is a file: end .*made in \.safetensors or"):
        convert(model, tmp_path / "made")


@pytest.mark.parametrize("name", ["made.ckpt", "notes"])
def test_a_file_needs_a_folder_as_its_destination(file, tmp_path, name):
    (tmp_path / "notes").touch()
    with pytest.raises(DbkitError, match=f"the source is a file, so the destination is a folder: .*{name} is not one"):
        convert(file, tmp_path / name, overwrite=True)


def test_an_existing_file_is_only_replaced_when_asked(model, file, tmp_path):
    made = tmp_path / "made.safetensors"
    made.write_text("precious")
    with pytest.raises(DbkitError, match=r"made\.safetensors exists; choose another name, or set overwrite"):
        convert(model, made)
    assert made.read_text() == "precious"
    assert_same_file(file, convert(model, made, overwrite=True))


def test_an_existing_model_folder_is_only_replaced_when_asked(model, file, copied):
    (copied / "unet" / "old").touch()
    with pytest.raises(DbkitError, match="copied exists; choose another name, or set overwrite"):
        convert(file, copied)
    assert (copied / "unet" / "old").exists()
    convert(file, copied, overwrite=True)
    assert not (copied / "unet" / "old").exists()
    assert_same_model(model, copied)


def test_a_model_folder_with_other_things_in_it_is_never_replaced(file, copied):
    inside = copied / "original.safetensors"
    shutil.copy(file, inside)
    with pytest.raises(DbkitError, match=r"original\.safetensors lies in .*, which would be replaced"):
        convert(inside, copied, overwrite=True)
    with pytest.raises(DbkitError, match=r"holds more than a model \(original.safetensors\), so it is not replaced"):
        convert(file, copied, overwrite=True)
    assert inside.exists()


def test_a_folder_that_is_no_model_is_never_replaced(file, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dog.jpg").touch()
    with pytest.raises(DbkitError, match=r"photos holds more than a model \(dog.jpg\), so it is not replaced"):
        convert(file, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "dog.jpg").exists()


def test_an_empty_folder_is_filled(model, file, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_same_model(model, convert(file, tmp_path / "empty"))


def test_a_failed_conversion_keeps_the_old_destination(model, file, copied, tmp_path):
    path = changed(file, tmp_path / "f.safetensors", lambda tensors: tensors.pop(UNET + "out.2.bias"))
    with pytest.raises(DbkitError, match="is not a whole Stable Diffusion 1 model"):
        convert(path, copied, overwrite=True)
    assert_same_model(model, copied)
    assert not list(tmp_path.glob("*.partial"))


def test_what_cannot_be_handed_out_is_said_before_anything_is_made(model, file, tmp_path):
    with pytest.raises(DbkitError, match="download is for Colab"):
        convert(model, tmp_path / "made.safetensors", download=True)
    with pytest.raises(DbkitError, match="push_to_hub and download are for a file"):
        convert(file, tmp_path / "made", download=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_beside_the_destination_is_left_alone(file, tmp_path):
    for end in ("old", "partial"):
        (tmp_path / f"made.{end}").mkdir()
        (tmp_path / f"made.{end}" / "thesis.txt").write_text("years of work")
    convert(file, tmp_path / "made")
    convert(file, tmp_path / "made", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "made.old", "made.partial"]
    assert all((tmp_path / f"made.{end}" / "thesis.txt").exists() for end in ("old", "partial"))


def test_what_comes_to_the_destination_meanwhile_is_not_replaced(file, tmp_path, monkeypatch):
    def appear(*_):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "thesis.txt").write_text("years of work")
        return []

    # dbkit.convert is the function of that name.
    monkeypatch.setattr(sys.modules["dbkit.convert"], "prove", appear)
    with pytest.raises(DbkitError, match="made exists; choose another name"):
        convert(file, tmp_path / "made")
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "thesis.txt"]


def test_a_model_is_not_written_into_itself(copied):
    before = sorted(copied.rglob("*"))
    for name in ("unet/diffusion_pytorch_model.safetensors", "unet/dog.safetensors"):
        with pytest.raises(DbkitError, match="would lie in the model"):
            convert(copied, copied / name, overwrite=True)
    assert sorted(copied.rglob("*")) == before


def test_a_name_in_two_files_is_refused(copied, tmp_path):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model_old.safetensors"))
    with pytest.raises(DbkitError, match="in two files; keep one set of weights"):
        convert(copied, tmp_path / "made.safetensors")


def test_the_yaml_of_a_model_that_is_replaced_goes_with_it(model, sd2_v_model, tmp_path):
    made = convert(sd2_v_model, tmp_path / "made.safetensors")
    with pytest.raises(DbkitError, match="exists"):
        convert(model, made)
    made.rename(tmp_path / "other.safetensors")
    with pytest.raises(DbkitError, match=r"made\.yaml is of another model"):
        convert(model, made)
    convert(model, made, overwrite=True)
    assert not made.with_suffix(".yaml").exists()


def test_the_folder_that_one_is_in_is_no_destination(model, file, tmp_path, monkeypatch):
    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    for destination in (".", "..", tmp_path / "here"):
        with pytest.raises(DbkitError, match="is the folder that you are in, or holds it; give the name of another"):
            convert(file, destination, overwrite=True)
    with pytest.raises(DbkitError, match="is the folder that you are in"):
        convert(model, ".")


def test_links_that_lead_nowhere_are_no_destinations(model, file, tmp_path):
    for name, target in (("round", "round"), ("gone", "nowhere"), ("round.ckpt", "round.ckpt")):
        (tmp_path / name).symlink_to(tmp_path / target)
    for source, name in ((file, "round"), (file, "round/made"), (file, "gone"), (model, "round.ckpt")):
        with pytest.raises(
            DbkitError, match=r"(round|gone|round.ckpt|made) is a link that leads nowhere; remove it or"
        ):
            convert(source, tmp_path / name)


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(model, file, copied, tmp_path):
    (copied / "unet" / "old").touch()
    (tmp_path / "link").symlink_to(copied)
    with pytest.raises(DbkitError, match="copied exists; choose another name, or set overwrite"):
        convert(file, tmp_path / "link")
    convert(file, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").readlink() == copied and not (copied / "unet" / "old").exists()
    assert_same_model(model, copied)


def test_names_that_no_file_system_takes_are_said(file, tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(DbkitError, match=r"notes is a file, and .*made would lie in it; choose another name"):
        convert(file, tmp_path / "notes" / "made")
    with pytest.raises(DbkitError, match="x is too long; choose a shorter one"):
        convert(file, tmp_path / ("x" * 255))


def test_a_folder_is_not_replaced_by_a_file(model, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DbkitError, match=r"folder\.safetensors is a folder, and the destination is a file; choose"):
        convert(model, tmp_path / "folder.safetensors", overwrite=True)


def test_a_model_is_converted_from_a_folder_that_is_gone(model, tmp_path):
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert_same_model(model, convert(convert(model, tmp_path / "a.safetensors"), tmp_path / "made"))


# Two at once, and kills.

CHILD = """
import sys
from dbkit import convert
module = sys.modules["dbkit.convert"]
def prove(*_):
    print("at work", flush=True)
    sys.stdin.read()
    return []
module.prove = prove
convert(sys.argv[1], sys.argv[2], overwrite=True)
"""


@pytest.mark.parametrize("direction", ["to a file", "to a folder"])
def test_a_second_conversion_to_the_same_place_is_refused_while_the_first_is_at_work(model, file, tmp_path, direction):
    source, made = (model, tmp_path / "made.safetensors") if direction == "to a file" else (file, tmp_path / "made")
    command = [sys.executable, "-c", CHILD, str(source), str(made)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert any("at work" in line for line in iter(first.stdout.readline, ""))
        with pytest.raises(DbkitError, match=rf"another process is at work on .*{made.name}; wait for it, or choose"):
            convert(source, made)
    finally:
        first.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [made.name]
    with pytest.raises(DbkitError, match="exists; choose another name"):
        convert(source, made)
    if direction == "to a file":
        assert_same_file(made, file)


@pytest.mark.skipif(os.name == "nt", reason="there is no kill of this kind on Windows")
@pytest.mark.parametrize("direction", ["to a file", "to a folder"])
def test_what_a_killed_conversion_leaves_goes_with_the_next(model, file, tmp_path, direction):
    source, made = (model, tmp_path / "made.safetensors") if direction == "to a file" else (file, tmp_path / "made")
    command = [sys.executable, "-c", CHILD, str(source), str(made)]
    killed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert any("at work" in line for line in iter(killed.stdout.readline, ""))
    killed.kill()
    killed.communicate()
    assert any("partial" in path.name for path in tmp_path.iterdir()) and not made.exists()
    convert(source, made)
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


def test_a_model_that_a_kill_left_between_two_names_comes_back(model, file, copied, capsys):
    program = """
import os, sys
from pathlib import Path
from dbkit import convert
rename = Path.rename
def killed(self, target):
    if self.name == "new":
        os._exit(9)
    return rename(self, target)
Path.rename = killed
convert(sys.argv[1], sys.argv[2], overwrite=True)
"""
    (copied / "unet" / "mine").touch()
    done = subprocess.run([sys.executable, "-c", program, str(file), str(copied)])
    assert done.returncode == 9 and not copied.exists()
    with pytest.raises(DbkitError, match="copied exists; choose another name, or set overwrite"):
        convert(file, copied)
    assert (copied / "unet" / "mine").exists()
    assert f"{copied} is back: a conversion that was killed had moved it away" in capsys.readouterr().out
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]
    convert(file, copied, overwrite=True)
    assert_same_model(model, copied)


def test_a_model_that_a_kill_left_is_named_where_another_took_its_place(file, tmp_path, capsys):
    convert(file, tmp_path / "made")
    left = tmp_path / f"{sys.modules['dbkit.convert']._hidden(tmp_path / 'made')}x.partial"
    for name in ("old", "new"):
        (left / name).mkdir(parents=True)
    convert(file, tmp_path / "made", overwrite=True)
    assert f"{left / 'old'} is the model that a killed conversion moved away" in capsys.readouterr().out
    assert (left / "old").is_dir()
