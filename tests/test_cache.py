"""What training reads instead of images and prompts equals the VAE, the text encoder and the draws it stands for."""

import numpy as np
import pytest
import torch
from PIL import Image

from dbkit import draws
from dbkit.cache import Latents, Pool, draw_batch, encode_images, encode_prompts, tokenize
from dbkit.examples import instance_examples
from dbkit.models import load_models

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(model):
    return load_models(model)


def make_pool(role="instance", count=5, prompts=2) -> Pool:
    random = torch.Generator().manual_seed(3 if role == "instance" else 4)
    mean, std = (torch.randn(count, 4, 8, 8, generator=random) for _ in range(2))
    rows = torch.randn(prompts, 77, 16, generator=random)
    return Pool(role, Latents(mean, std.abs()), rows, torch.arange(count) % prompts)


def test_latents_equal_those_of_the_vae_for_each_image_alone(models, config):
    examples = instance_examples(config)
    latents = encode_images(models.vae, examples, 64, CPU)
    assert latents.mean.shape == latents.std.shape == (3, 4, 8, 8)
    for number, example in enumerate(examples):
        # The photographs are 96 x 80: their middle square is 80 x 80.
        image = Image.open(example.path).resize((64, 64), Image.Resampling.LANCZOS, box=(8, 0, 88, 80))
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = models.vae.encode(pixels).latent_dist
        factor = models.vae.config.scaling_factor
        torch.testing.assert_close(latents.mean[number], posterior.mean[0] * factor)
        torch.testing.assert_close(latents.std[number], posterior.std[0] * factor)


def test_drawn_latents_are_mean_plus_std_times_noise():
    pool, noise = make_pool(), torch.randn(2, 4, 8, 8)
    drawn = pool.latents.draw(torch.tensor([4, 1]), noise)
    for row, index in enumerate((4, 1)):
        assert torch.equal(drawn[row], pool.latents.mean[index] + pool.latents.std[index] * noise[row])


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


def test_a_batch_is_what_its_generators_draw():
    pools = [make_pool("instance", 5), make_pool("class", 7)]
    batch = draw_batch(pools, seed=11, step=4, samples=range(2, 4), per_step=6, timesteps=1000)
    assert batch.instances == 2
    row = 0
    for pool in pools:
        for sample in (2, 3):
            random = draws.generator(11, pool.role, step=4, sample=sample)
            timestep = int(random.integers(1000))
            noise, latent_noise = torch.from_numpy(random.standard_normal((2, 4, 8, 8), dtype=np.float32))
            index = draws.index(11, f"{pool.role} order", len(pool.prompt_of), (4 - 1) * 6 + sample)
            assert batch.timesteps[row] == timestep
            assert torch.equal(batch.noise[row], noise)
            assert torch.equal(batch.latents[row], pool.latents.mean[index] + pool.latents.std[index] * latent_noise)
            assert torch.equal(batch.prompts[row], pool.prompts[index % 2])
            row += 1
    assert row == len(batch.timesteps)


def test_small_batches_of_a_step_are_parts_of_its_large_batch():
    pool = make_pool()
    large = draw_batch([pool], 0, 3, range(4), 4, 1000)
    small = [draw_batch([pool], 0, 3, range(n, n + 1), 4, 1000) for n in range(4)]
    for name in ("latents", "noise", "timesteps", "prompts"):
        assert torch.equal(getattr(large, name), torch.cat([getattr(batch, name) for batch in small]))


def test_each_epoch_shows_every_image_once():
    count = 5
    pool = Pool("instance", make_pool(count=count).latents, torch.zeros(count, 1), torch.arange(count))
    pool.prompts[:, 0] = torch.arange(count)
    shown = [int(draw_batch([pool], 0, step, range(1), 1, 1000).prompts) for step in range(1, 4 * count + 1)]
    epochs = [shown[start : start + count] for start in range(0, len(shown), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_other_steps_samples_seeds_and_roles_draw_other_noise():
    batches = [
        draw_batch([make_pool(role)], seed, step, range(sample, sample + 1), 2, 1000)
        for role in ("instance", "class")
        for seed in (0, 1)
        for step in (1, 2)
        for sample in (0, 1)
    ]
    assert len({batch.noise.numpy().tobytes() for batch in batches}) == len(batches)


def test_drawing_a_batch_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    draw_batch([make_pool()], 0, 1, range(2), 2, 1000)
    assert torch.equal(torch.get_rng_state(), before)
