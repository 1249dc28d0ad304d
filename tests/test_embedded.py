"""The embedded model is what its card says, loads where Stable Diffusion loads, and draws what it is asked for."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel, PretrainedConfig

from dbkit import PreviewConfig, convert, draws, embedded, open_workspace
from dbkit.evaluate import Clip
from dbkit.files import sha256
from dbkit.models import WEIGHTS, fingerprint, load_models, read_weights, state_dict
from dbkit.sampling import Shot, sample

CARD = embedded.MODEL / "README.md"


def test_the_files_are_those_of_the_model_card():
    listed = re.findall(
        r"^\| (\S+) \| ([\d,]+) \| `([0-9a-f]{64})` \|$", CARD.read_text(encoding="utf-8"), re.MULTILINE
    )
    there = {path for path in embedded.ASSETS.rglob("*") if path.is_file() and path != CARD}
    assert {embedded.ASSETS / name for name, _, _ in listed} == there
    for name, size, digest in listed:
        path = embedded.ASSETS / name
        assert path.stat().st_size == int(size.replace(",", ""))
        assert sha256(path) == digest
    assert sum(path.stat().st_size for path in there) < 20e6


def test_no_file_says_where_it_was_made():
    for path in embedded.ASSETS.rglob("*config.json"):
        assert not re.search(r'"(/|[A-Z]:)[^"]+/[^"]+"', path.read_text(encoding="utf-8")), path


def test_diffusers_own_pipeline_loads_it_and_draws():
    pipeline = StableDiffusionPipeline.from_pretrained(embedded.MODEL, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a photo of a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert made.images[0].size == (embedded.RESOLUTION, embedded.RESOLUTION)


def test_the_calls_by_which_diffusers_training_scripts_load_a_model_load_it():
    folder = str(embedded.MODEL)
    # The scripts pick the text encoder's class by this entry.
    assert PretrainedConfig.from_pretrained(folder, subfolder="text_encoder").architectures == ["CLIPTextModel"]
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", use_fast=False)
    ids = tokenizer(
        "a photo of a dog",
        truncation=True,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean * vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, torch.randn_like(latents), torch.tensor([500]))
    states = text_encoder(ids, return_dict=False)[0]
    assert states.shape == (1, 77, unet.config.cross_attention_dim)
    assert unet(noisy, torch.tensor([500]), states).sample.isfinite().all()
    # transformers fills gaps with random numbers: the weights must be the file's.
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    stored = read_weights(embedded.MODEL, "text_encoder")[name]
    assert torch.equal(state_dict(text_encoder, "text_encoder")[name].half(), stored)


def test_it_becomes_one_file_and_comes_back_unchanged(tmp_path):
    back = convert(convert(embedded.MODEL, tmp_path / "tiny.safetensors"), tmp_path / "back")
    for part in WEIGHTS:
        before, after = read_weights(embedded.MODEL, part), read_weights(back, part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) and before[name].dtype == torch.float16 for name in before)
    assert embedded.is_embedded(back)


def test_models_of_other_origin_are_not_taken_for_it(model, tmp_path):
    assert embedded.is_embedded(embedded.MODEL)
    assert not embedded.is_embedded(model)
    assert not embedded.is_embedded(tmp_path / "nowhere")
    # transformers 4 sorts the words of a tokenizer.
    copy = tmp_path / "tokenizer" / "vocab.json"
    copy.parent.mkdir()
    words = json.loads((embedded.MODEL / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    copy.write_text(json.dumps(words, sort_keys=True), encoding="utf-8")
    assert embedded.is_embedded(tmp_path)
    copy.write_text("{", encoding="utf-8")
    assert not embedded.is_embedded(tmp_path)


def test_its_name_stands_for_its_folder_unless_a_folder_has_that_name(tmp_path):
    assert embedded.local_folder("tiny-sd") == embedded.MODEL
    assert embedded.local_folder("owner/name") == Path("owner/name")
    assert fingerprint("tiny-sd") == fingerprint(embedded.MODEL)
    assert convert("tiny-sd", tmp_path / "tiny.safetensors").stat().st_size > 1e6
    config = PreviewConfig("tiny-sd", ("photo of a dog",), output="grid.png")
    assert open_workspace().anchor(config).model == Path("tiny-sd")
    (tmp_path / "tiny-sd").mkdir()  # the current folder of a test is its own
    assert embedded.local_folder("tiny-sd") == embedded.MODEL
    assert embedded.local_folder(tmp_path / "tiny-sd") == tmp_path / "tiny-sd"


def test_an_identifier_is_one_token_that_means_nothing_yet():
    tokenizer = load_models(embedded.MODEL).tokenizer
    for word in ("sks", "zwx", "ukj", "ohwx", "dog", "beach", "umbrella"):
        assert len(tokenizer(word).input_ids) == 3
    assert len(tokenizer("quixotic").input_ids) > 3


NOUNS = ("dog", "boat", "penguin", "crab", "car", "house", "rocket", "mushroom")
PLACES = ("on the beach", "in the snow", "in the city", "in space", "under water", "in the forest")


@pytest.fixture(scope="module")
def pictures():
    """One picture of each thing in each place."""
    prompts = [f"a photo of a {noun} {place}" for noun in NOUNS for place in PLACES]
    shots = [Shot(prompt, draws.generator(0, "preview", sample=n), 5.0) for n, prompt in enumerate(prompts)]
    return list(sample(load_models(embedded.MODEL), shots, (embedded.RESOLUTION,) * 2, 20, 16, torch.float32))


def test_it_draws_the_thing_and_the_setting_that_a_prompt_names(pictures):
    clip = Clip(embedded.CLIP, torch.device("cpu"))
    texts = clip.texts([f"a photo of a {noun} {place}" for noun in NOUNS for place in PLACES])
    texts = texts.view(len(NOUNS), len(PLACES), -1)
    features = clip(pictures)
    found = [(features @ texts.mean(axis).T).argmax(1) for axis in (1, 0)]
    wanted = torch.cartesian_prod(torch.arange(len(NOUNS)), torch.arange(len(PLACES)))
    assert (found[0] == wanted[:, 0]).float().mean() >= 0.8
    assert (found[1] == wanted[:, 1]).float().mean() >= 0.9
