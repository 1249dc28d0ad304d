"""What training reads instead of images and prompts equals the VAE, the text encoder and the draws it stands for."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from dbkit import draws
from dbkit.cache import Latents, Noising, Pool, draw_batches, encode_images
from dbkit.concepts import concepts_of
from dbkit.examples import instance_examples
from dbkit.images import read_image, render
from dbkit.models import load_models
from dbkit.order import Order
from dbkit.settings import replace
from dbkit.text import encode_prompts, tokenize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(model):
    return load_models(model)


SQUARE, WIDE = (64, 64), (96, 64)


def make_pool(role="instance", count=5, prompts=2, sizes=(SQUARE,), views=1) -> Pool:
    """A pool of random latents; image i has the size sizes[i % len(sizes)] and the prompt i % prompts."""
    random = torch.Generator().manual_seed(3 if role == "instance" else 4)
    latents, places = [], [[] for _ in range(count)]
    for number, (width, height) in enumerate(sizes):
        own = range(number, count, len(sizes))
        shape = (len(own) * views, 4, height // 8, width // 8)
        mean, std = (torch.randn(shape, generator=random) for _ in range(2))
        latents.append(Latents(mean, std.abs()))
        for row, image in enumerate(own):
            places[image] = [(number, row * views + view) for view in range(views)]
    rows = torch.randn(prompts, 77, 16, generator=random)
    return Pool(role, latents, places, rows, [[image % prompts] for image in range(count)])


def make_order(seed=0, per_step=1, instances=5, classes=0, sizes=(SQUARE,)) -> Order:
    kinds = [tuple((0, sizes[i % len(sizes)]) for i in range(count)) for count in (instances, classes)]
    return Order(seed, per_step, *kinds)


def pixels_of(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1


def posterior_of(models, image):
    with torch.no_grad():
        return models.vae.encode(pixels_of(image)).latent_dist


def test_latents_equal_those_of_the_vae_for_each_image_alone(models, config):
    examples = instance_examples(config, concepts_of(config))
    [((latents,), places)] = encode_images(models, [examples], config, CPU)
    assert latents.mean.shape == latents.std.shape == (3, 4, 8, 8)
    assert places == [[(0, 0)], [(0, 1)], [(0, 2)]]
    for number, example in enumerate(examples):
        # The photographs are 96 x 80: their middle square is 80 x 80.
        image = Image.open(example.path).resize((64, 64), Image.Resampling.LANCZOS, box=(8, 0, 88, 80))
        posterior, factor = posterior_of(models, image), models.vae.config.scaling_factor
        torch.testing.assert_close(latents.mean[number], posterior.mean[0] * factor)
        torch.testing.assert_close(latents.std[number], posterior.std[0] * factor)


def test_every_view_of_every_size_lies_where_its_place_says(models, config, photos):
    Image.new("RGB", (40, 96), "navy").save(photos / "tall.png")
    config = replace(config, use_aspect_ratio_bucket=True, hflip=True)
    examples = instance_examples(config, concepts_of(config))
    [(latents, places)] = encode_images(models, [examples], config, CPU)
    assert len(latents) == len({example.size for example in examples}) == 2
    for example, own in zip(examples, places):
        assert len(own) == len(example.views) == 2
        for view, (number, row) in zip(example.views, own):
            posterior = posterior_of(models, render(read_image(example.path), example.size, view))
            expected = posterior.mean[0] * models.vae.config.scaling_factor
            torch.testing.assert_close(latents[number].mean[row], expected)
            assert expected.shape[1:] == (example.size[1] // 8, example.size[0] // 8)


def test_drawn_latents_are_mean_plus_std_times_noise():
    (latents,), noise = make_pool().latents, torch.randn(2, 4, 8, 8)
    drawn = latents.draw(torch.tensor([4, 1]), noise)
    for row, index in enumerate((4, 1)):
        assert torch.equal(drawn[row], latents.mean[index] + latents.std[index] * noise[row])


def test_token_ids_are_padded_and_cut_to_77(models):
    ids = tokenize(models.tokenizer, ["a", "a very long prompt " * 40])
    assert ids.shape == (2, 77)
    assert ids[0, 0] == ids[1, 0] == models.tokenizer.bos_token_id
    assert ids[0, 2] == ids[1, -1] == models.tokenizer.eos_token_id
    assert models.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "a"


def test_text_states_are_those_the_pipeline_uses(models):
    from dbkit.sampling import pipeline

    ids = tokenize(models.tokenizer, ["photo of zwx dog"])
    with torch.no_grad():
        states = encode_prompts(models.text_encoder, ids)
        expected, _ = pipeline(models).encode_prompt("photo of zwx dog", CPU, 1, do_classifier_free_guidance=False)
    assert states.shape == (1, 77, 64)
    assert torch.equal(states, expected)


def draw(pools, order, step, samples, **noising):
    (batch,) = draw_batches(pools, order, step, samples, Noising(1000, **noising))
    return batch


def test_a_batch_is_what_its_generators_draw():
    pools = [make_pool("instance", 5), make_pool("class", 7)]
    batch = draw(pools, make_order(seed=11, per_step=6, classes=7), 4, range(2, 4))
    assert (batch.instances, batch.pairs) == (2, 2)
    row = 0
    for pool in pools:
        for sample in (2, 3):
            random = draws.generator(11, pool.role, step=4, sample=sample)
            timestep = int(random.integers(1000))
            noise, latent_noise = torch.from_numpy(random.standard_normal((2, 4, 8, 8), dtype=np.float32))
            index = draws.index(11, f"{pool.role} order", len(pool.places), (4 - 1) * 6 + sample)
            latents = pool.latents[0]
            assert batch.timesteps[row] == timestep
            assert torch.equal(batch.noise[row], noise)
            assert torch.equal(batch.latents[row], latents.mean[index] + latents.std[index] * latent_noise)
            assert torch.equal(batch.prompts[row], pool.prompts[index % 2])
            row += 1
    assert row == len(batch.timesteps)


def test_small_batches_of_a_step_are_parts_of_its_large_batch():
    pools, order = [make_pool()], make_order(per_step=4)
    large = draw(pools, order, 3, range(4))
    small = [draw(pools, order, 3, range(n, n + 1)) for n in range(4)]
    for name in ("latents", "noise", "timesteps", "prompts"):
        assert torch.equal(getattr(large, name), torch.cat([getattr(batch, name) for batch in small]))


def test_images_of_several_sizes_make_one_batch_for_each_size():
    sizes = (SQUARE, WIDE)
    pools = [make_pool("instance", 5, 5, sizes), make_pool("class", 4, 4, sizes)]
    order = make_order(per_step=5, classes=4, sizes=sizes)
    batches = draw_batches(pools, order, 1, range(5), Noising(1000))
    shapes = [tuple(batch.latents.shape[2:]) for batch in batches]
    assert sorted(shapes) == [(8, 8), (8, 12)]
    assert sum(batch.instances for batch in batches) == 5
    assert all(batch.pairs == 5 for batch in batches)
    for batch, shape in zip(batches, shapes):
        # Sizes alternate in the pools: even images are square, odd ones wide.
        parity = 0 if shape == (8, 8) else 1
        images = set(range(parity, 5, 2))
        for row in batch.prompts[: batch.instances]:
            assert any(torch.equal(row, pools[0].prompts[image]) for image in images)
        # Each class image has the size of its instance image, so they share the pass.
        assert len(batch.latents) == 2 * batch.instances


def test_views_and_prompts_change_from_step_to_step_and_are_those_of_the_sample():
    pool = make_pool(count=1, prompts=3, views=4)
    pool.prompt_rows[0] = [0, 1, 2]
    order = make_order(instances=1)
    seen = set()
    for step in range(1, 60):
        batch = draw([pool], order, step, range(1))
        view, prompt = draws.generator(0, "variant", step, 0).integers([4, 3])
        assert torch.equal(batch.prompts[0], pool.prompts[prompt])
        random = draws.generator(0, "instance", step, 0)
        random.integers(1000)
        latent_noise = torch.from_numpy(random.standard_normal((2, 4, 8, 8), dtype=np.float32))[1]
        latents = pool.latents[0]
        assert torch.equal(batch.latents[0], latents.mean[view] + latents.std[view] * latent_noise)
        seen.add((int(view), int(prompt)))
    assert len(seen) == 12


def test_offset_noise_is_the_same_over_a_channel_and_is_to_be_found(models):
    pools, order = [make_pool(count=1)], make_order(instances=1)
    plain, offset = draw(pools, order, 1, range(1)), draw(pools, order, 1, range(1), offset=0.1)
    difference = offset.noise - plain.noise
    assert torch.allclose(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6)
    assert 0 < difference.abs().max() < 0.5
    assert len(difference[0, :, 0, 0].unique()) == 4
    assert torch.equal(offset.input_noise, offset.noise) and torch.equal(offset.latents, plain.latents)


def test_a_perturbation_is_in_the_input_and_not_to_be_found():
    pools, order = [make_pool(count=1)], make_order(instances=1)
    plain, perturbed = (draw(pools, order, 1, range(1), perturbation=size) for size in (0.0, 0.1))
    assert torch.equal(perturbed.noise, plain.noise) and torch.equal(perturbed.latents, plain.latents)
    assert (perturbed.input_noise - perturbed.noise).std() == pytest.approx(0.1, rel=0.2)
    assert plain.input_noise is plain.noise


def test_prompts_are_left_out_with_their_probability():
    pool = make_pool(count=1, prompts=2)
    pool = dataclasses.replace(pool, empty_prompt=1)
    order = make_order(instances=1, per_step=400)
    batch = draw([pool], order, 1, range(400), caption_dropout=0.3)
    empty = (batch.prompts == pool.prompts[1]).flatten(1).all(1)
    assert empty.float().mean() == pytest.approx(0.3, abs=0.07)
    assert torch.equal(batch.noise, draw([pool], order, 1, range(400)).noise)


def test_other_steps_samples_seeds_and_roles_draw_other_noise():
    batches = [
        draw([make_pool(role)], make_order(seed, per_step=2, classes=5), step, range(sample, sample + 1))
        for role in ("instance", "class")
        for seed in (0, 1)
        for step in (1, 2)
        for sample in (0, 1)
    ]
    assert len({batch.noise.numpy().tobytes() for batch in batches}) == len(batches)


def test_drawing_a_batch_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    draw_batches([make_pool()], make_order(per_step=2), 1, range(2), Noising(1000))
    assert torch.equal(torch.get_rng_state(), before)
