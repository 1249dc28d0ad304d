"""A picture depends on its shot alone: not on its batch, its neighbours or the global random state."""

import contextlib

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from dbkit import draws
from dbkit.models import load_models
from dbkit.sampling import Shot, autocast, borrowed, pipeline, place, sample

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(model):
    return load_models(model)


def make_shots(*guidance_scales: float, **changes) -> list[Shot]:
    return [
        Shot(f"photo {number}", draws.generator(number, "preview"), scale, **changes)
        for number, scale in enumerate(guidance_scales)
    ]


def pixels(models, shots, batch_size=4, dtype=torch.float32, side=64, steps=2) -> np.ndarray:
    return np.stack(
        [np.asarray(picture, int) for picture in sample(models, shots, (side, side), steps, batch_size, dtype)]
    )


def test_pictures_equal_those_of_diffusers_made_one_by_one(models, model):
    reference = StableDiffusionPipeline.from_pretrained(model)
    reference.scheduler = DPMSolverMultistepScheduler.from_config(reference.scheduler.config)
    found = pixels(models, make_shots(7.5, 7.5, 3.0), batch_size=1)
    for number, scale in enumerate((7.5, 7.5, 3.0)):
        noise = draws.generator(number, "preview").standard_normal((1, 4, 8, 8))
        expected = reference(
            f"photo {number}",
            latents=torch.from_numpy(noise).float(),
            guidance_scale=scale,
            num_inference_steps=2,
            height=64,
            width=64,
        ).images[0]
        assert np.abs(found[number] - np.asarray(expected, int)).max() <= 1


def test_batch_size_changes_no_picture(models):
    scales = (7.5, 7.5, 3.0, 3.0, 3.0)
    one, two, all_at_once = (pixels(models, make_shots(*scales), batch_size) for batch_size in (1, 2, 8))
    assert len({picture.tobytes() for picture in one}) == len(scales)
    assert np.abs(one - two).max() <= 2
    assert np.abs(one - all_at_once).max() <= 2


def test_pictures_come_in_the_order_of_their_shots(models):
    shots = make_shots(7.5, 1.0, 7.5)
    apart = np.concatenate([pixels(models, [shot]) for shot in make_shots(7.5, 1.0, 7.5)])
    assert np.abs(pixels(models, shots) - apart).max() <= 2


def test_pictures_have_the_asked_size(models):
    assert pixels(models, make_shots(7.5), side=32).shape == (1, 32, 32, 3)


def test_negative_prompt_matters_only_with_guidance(models):
    def difference(scale):
        plain, negative = (make_shots(scale, negative_prompt=text) for text in ("", "a blurry photo"))
        return np.abs(pixels(models, plain) - pixels(models, negative)).max()

    assert difference(7.5) > 0
    assert difference(1.0) == 0


def test_sampling_neither_reads_nor_moves_the_global_random_state(models):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = pixels(models, make_shots(7.5))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert np.array_equal(first, pixels(models, make_shots(7.5)))


def test_bf16_pictures_are_close_to_those_of_fp32(models):
    full, half = (pixels(models, make_shots(3.0), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 0 < np.abs(full - half).mean() < 8


def test_fp32_runs_without_autocast():
    assert isinstance(autocast(CPU, torch.float32), contextlib.nullcontext)
    with autocast(CPU, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_the_pipeline_copies_no_module(models):
    made = pipeline(models)
    assert made.unet is models.unet
    assert made.vae is models.vae
    assert made.text_encoder is models.text_encoder


def test_a_placed_model_is_stored_in_the_asked_type(model):
    models = load_models(model)
    place(models, CPU, torch.bfloat16)
    assert {models.unet.dtype, models.vae.dtype, models.text_encoder.dtype} == {torch.bfloat16}


def test_borrowed_modules_come_back_as_they_were(model):
    models = load_models(model)
    models.unet.train()
    with pytest.raises(ZeroDivisionError), borrowed(models, CPU):
        assert not models.unet.training
        raise ZeroDivisionError
    assert models.unet.training
    assert not models.vae.training
    assert not models.text_encoder.training


def test_an_inpainting_model_draws_what_diffusers_pipeline_draws_with_everything_hidden(inpainting_model):
    models = load_models(inpainting_model)
    reference = StableDiffusionInpaintPipeline.from_pretrained(inpainting_model)
    reference.scheduler = DPMSolverMultistepScheduler.from_config(reference.scheduler.config)
    for vae in (models.vae, reference.vae):
        # The pipeline draws the latents of what is left at random: from a distribution of nearly no width.
        with torch.no_grad():
            vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -30
    (found,) = pixels(models, make_shots(7.5))

    def distance(mask: str) -> float:
        expected = reference(
            "photo 0",
            image=Image.new("RGB", (64, 64), "teal"),
            mask_image=Image.new("L", (64, 64), mask),
            latents=torch.from_numpy(draws.generator(0, "preview").standard_normal((1, 4, 8, 8))).float(),
            guidance_scale=7.5,
            num_inference_steps=2,
            strength=1.0,
            height=64,
            width=64,
        ).images[0]
        return np.abs(found - np.asarray(expected, int)).mean()

    # Of a picture of one colour the VAE's normalization makes little but rounding, which the memory's order changes.
    assert distance("white") < 0.25 * distance("black")


def test_clip_skip_changes_the_pictures(models):
    usual = pixels(models, make_shots(7.5))
    models.text_encoder.config.clip_skip = 2
    try:
        assert np.abs(pixels(models, make_shots(7.5)) - usual).max() > 0
    finally:
        models.text_encoder.config.clip_skip = 1
