"""The extracted LoRA is the nearest one: it gives a merged LoRA back, and says what it cannot hold."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbkit import DbkitError, embedded, extract_lora, merge, train
from dbkit.cli import main
from dbkit.extract import nearest
from dbkit.lora_files import has_adapter, kohya_name, kohya_tensors, read_lora
from dbkit.models import WEIGHTS, load_models, read_weights, save_models

FP32 = {"save_precision": "fp32"}


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(adapter) -> torch.Tensor:
    return adapter.alpha / len(adapter.down) * adapter.up.flatten(1) @ adapter.down.flatten(1)


def far(one, two) -> float:
    return float((one - two).norm() / two.norm())


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory):
    """A LoRA of rank 4 with random numbers in every layer of the small model. Do not change it."""
    models, tensors = load_models(model), {}
    for number, (part, name, weight) in enumerate(layers_of(models)):
        inner = weight[0].numel()
        down = random(4, inner, seed=number).reshape(4, *weight.shape[1:]) * inner**-0.5
        up = random(len(weight), 4, seed=1000 + number).reshape(len(weight), 4, *[1] * (weight.ndim - 2)) * 0.02
        key = kohya_name(part, name)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    path = tmp_path_factory.mktemp("loras") / "random.safetensors"
    save_file(tensors, path)
    return path


def layers_of(models):
    for part in ("unet", "text_encoder"):
        for name, layer in getattr(models, part).named_modules():
            if has_adapter(part, name, "all") and not (part == "unet" and name.startswith("conv_")):
                yield part, name, layer.weight


@pytest.fixture(scope="module")
def merged(model, lora, tmp_path_factory):
    """The small model with that LoRA in it. Do not change it."""
    folder = tmp_path_factory.mktemp("models") / "merged"
    return merge(lora, folder, pretrained_model_name_or_path=str(model), **FP32)


# The nearest.


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (24, 5, 3, 3), (24, 16, 1, 1), (3, 40)])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_no_matrix_of_the_rank_is_nearer(shape, rank):
    change = random(*shape)
    before = torch.get_rng_state()
    adapter, kept = nearest(change, rank)
    assert torch.equal(torch.get_rng_state(), before)
    own = min(rank, shape[0], change[0].numel())
    assert adapter.down.shape == (own, *shape[1:]) and adapter.alpha == own
    assert adapter.up.shape == (shape[0], own, *(1,) * (len(shape) - 2))
    # What Eckart and Young's theorem allows of noise, whose singular values hardly fall: the hardest case.
    values = torch.linalg.svdvals(change.flatten(1)).double()
    best = float(values[:own].square().sum())
    assert 0.999 * best < kept < 1.00001 * best
    missed = float((change.flatten(1) - product(adapter)).double().square().sum())
    assert missed == pytest.approx(float(values.square().sum()) - kept, rel=1e-3, abs=1e-3)


def test_the_same_difference_gives_the_same_adapter():
    one, two = (nearest(random(40, 30), 4)[0] for _ in range(2))
    assert torch.equal(one.down, two.down) and torch.equal(one.up, two.up)


@pytest.mark.parametrize(("choice", "count"), [("attention", 136), ("transformer", 204), ("all", 290)])
def test_a_merged_lora_comes_back(model, merged, lora, tmp_path, capsys, choice, count):
    path = extract_lora(
        merged,
        tmp_path / "out.safetensors",
        pretrained_model_name_or_path=str(model),
        rank=4,
        lora_modules=choice,
        **FP32,
    )
    wanted, found = read_lora(lora), read_lora(path)
    assert len(found) == count
    for name, adapter in found.items():
        assert len(adapter.down) == adapter.alpha == min(4, *adapter.up.shape[:1])
        assert far(product(adapter), product(wanted[name])) < 1e-4
        assert adapter.down.shape == wanted[name].down.shape and adapter.up.shape == wanted[name].up.shape
    said = capsys.readouterr().out
    if choice == "all":
        assert (
            "changed in these 290 layers, rank 4 keeps 100.0%, which is 100.0% of all that it changed (shares" in said
        )
        assert "has no adapter" not in said
    else:
        assert f"in these {count} layers, rank 4 keeps 100.0%, which is " in said and "is 100.0% of all" not in said
        assert "; with lora_modules set to all convolutions get adapters too\n" in said
        assert "convolutions, " in said and "most in unet " in said


def test_less_rank_keeps_less(model, merged, tmp_path, capsys):
    for rank, least, most in ((1, 20, 60), (2, 50, 85), (3, 75, 99)):
        settings = {"pretrained_model_name_or_path": str(model), "rank": rank, "lora_modules": "all"}
        extract_lora(merged, tmp_path / f"{rank}.safetensors", **settings)
        share = float(capsys.readouterr().out.split(" keeps ")[1].split("%")[0])
        assert least < share < most


# A training.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training of the whole embedded model."""
    return train(
        pretrained_model_name_or_path=embedded.NAME,
        instance_data_dir=embedded.data_templates() / "poodle",
        instance_prompt="photo of zwx dog",
        output_dir=tmp_path_factory.mktemp("runs") / "poodle",
        resolution=embedded.RESOLUTION,
        train_text_encoder=True,
        learning_rate=2e-4,
        max_train_steps=6,
        auto_test_model=False,
        device="cpu",
    )


def test_the_base_and_the_prompt_are_those_of_the_run(run, tmp_path, capsys):
    path = tmp_path / "dog.safetensors"
    assert main(["extract-lora", str(run), str(path), "--rank", "8", "--save_precision", "bf16"]) == 0
    said = capsys.readouterr().out
    assert (
        said.endswith(f"{path}\n")
        and "where this LoRA has no adapter: in " in said
        and " norms" in said
        and " bias vectors" in said
    )
    near, base = (float(share) for share in re.findall(r"by ([\d.]+)% with", said))
    assert near < 0.8 * base
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    with safe_open(path, "pt") as file:
        found = file.metadata()
    expected = {
        "ss_output_name": "dog",
        "ss_network_dim": "8",
        "ss_v2": "False",
        "ss_sd_model_name": "tiny-sd",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": "photo of zwx dog",
        "modelspec.resolution": "32x32",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert json.loads(found["dbkit.run"])["steps"] == 6


def test_a_text_encoder_that_was_not_trained_is_left_out_though_it_was_rounded(run, tmp_path):
    """The run's model is fp16 and its base may be fp32: both are the same where nothing was trained."""
    models = load_models(embedded.MODEL)
    with torch.no_grad():
        for weight in [*models.unet.parameters(), *models.text_encoder.parameters()]:
            weight *= 1.0001
        save_models(models, tmp_path / "base", "fp32")
        layer = models.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        layer.weight += random(*layer.weight.shape)
    save_models(models, tmp_path / "changed", "fp16")
    path = extract_lora(
        tmp_path / "changed", tmp_path / "a.safetensors", pretrained_model_name_or_path=str(tmp_path / "base")
    )
    assert list(read_lora(path)) == ["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"]


def test_diffusers_draws_the_same_from_base_and_file_as_from_the_merged_model(tmp_path):
    models, tensors = load_models(embedded.MODEL), {}
    for number, (part, name, weight) in enumerate(layers_of(models)):
        if has_adapter(part, name, "transformer"):
            adapter, _ = nearest(random(*weight.shape, seed=number) * float(weight.detach().std()) * 0.5, 4)
            tensors |= kohya_tensors({kohya_name(part, name): adapter})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    merged = merge(
        tmp_path / "lora.safetensors", tmp_path / "merged", pretrained_model_name_or_path=embedded.NAME, **FP32
    )
    settings = {"pretrained_model_name_or_path": embedded.NAME, "rank": 4, **FP32}
    path = extract_lora(merged, tmp_path / "out.safetensors", **settings)
    base = StableDiffusionPipeline.from_pretrained(embedded.MODEL)
    plain = picture(base)
    base.load_lora_weights(tmp_path, weight_name=path.name)
    wanted = picture(StableDiffusionPipeline.from_pretrained(merged))
    assert np.abs(wanted - plain).mean() > 3
    assert np.abs(picture(base) - wanted).max() <= 1


def picture(pipeline) -> np.ndarray:
    side = pipeline.unet.config.sample_size
    options = {"latents": random(1, 4, side, side), "guidance_scale": 3, "num_inference_steps": 6}
    return np.asarray(
        pipeline("a dog", height=embedded.RESOLUTION, width=embedded.RESOLUTION, **options).images[0], int
    )


# What is refused.


def test_models_of_other_kinds_and_the_same_model_are_refused(model, sd2_model, inpainting_model, copied, tmp_path):
    def extract(one, two, **changes):
        extract_lora(one, tmp_path / "a.safetensors", pretrained_model_name_or_path=str(two), **changes)

    with pytest.raises(DbkitError, match=r"sd2 and its base .*small are of different kinds: their unet differs in "):
        extract(sd2_model, model)
    with pytest.raises(DbkitError, match=r"different kinds: their unet differs in conv_in.weight; give the model that"):
        extract(inpainting_model, model)
    with pytest.raises(
        DbkitError, match=r"no layer of .* that lora_modules transformer takes differs from .*small, so"
    ):
        extract(copied, model)
    path = copied / "unet" / WEIGHTS["unet"]
    weights = read_weights(copied, "unet")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    save_file({**weights, name: weights[name] + float("nan")}, path)
    with pytest.raises(DbkitError, match=rf"unet {name} holds values that are no numbers; copy both models again"):
        extract(copied, model)
    assert not list(tmp_path.glob("a.*"))


def test_a_lora_that_is_no_nearer_than_the_base_is_not_written(model, merged, tmp_path, monkeypatch):
    def opposite(change, rank):
        adapter, kept = nearest(change, rank)
        return adapter._replace(alpha=-adapter.alpha), kept

    monkeypatch.setattr("dbkit.extract.nearest", opposite)
    with pytest.raises(
        DbkitError, match=r"the base with this LoRA is no nearer to .*merged than without it \(.*set lora_"
    ):
        extract_lora(merged, tmp_path / "a.safetensors", pretrained_model_name_or_path=str(model))
    assert not list(tmp_path.glob("a.*"))


def test_what_is_missing_is_said_first(model, merged, tmp_path):
    destination = tmp_path / "a.safetensors"
    with pytest.raises(DbkitError, match=r"cannot be read from a run's settings.yaml beside .*merged; give the model"):
        extract_lora(merged, destination)
    with pytest.raises(DbkitError, match="there is no model folder someone/model; give a run's model/"):
        extract_lora("someone/model", destination, pretrained_model_name_or_path=str(model))
    with pytest.raises(DbkitError, match="there is no model folder gone; check the path, or give a Hugging Face id"):
        extract_lora(merged, destination, pretrained_model_name_or_path="gone")
    with pytest.raises(DbkitError, match=r"a LoRA is a file of its own, and .* is none; end it in .safetensors"):
        extract_lora(merged, tmp_path / "a.ckpt", pretrained_model_name_or_path=str(model))
    destination.touch()
    with pytest.raises(DbkitError, match=r"a.safetensors exists; choose another name, or set overwrite"):
        extract_lora(merged, destination, pretrained_model_name_or_path=str(model))


def test_a_base_of_the_hub_is_taken_from_its_cache(model, merged, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--ada--small"
    shutil.copytree(model, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "diffusers.utils.constants.HF_MODULES_CACHE"):
        monkeypatch.setattr(name, str(tmp_path / "hub"))
    from dbkit.extract import _folder

    assert _folder("ada/small", None) == cached / "snapshots" / ("0" * 40)
    with pytest.raises(DbkitError, match=r"the model ada/other is not on this machine and"):
        extract_lora(merged, tmp_path / "a.safetensors", pretrained_model_name_or_path="ada/other")
