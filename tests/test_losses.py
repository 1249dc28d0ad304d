"""The losses equal diffusers' own scheduler and a mean written out sample by sample."""

import pytest
import torch
from diffusers import DDPMScheduler

from dbkit import DbkitError
from dbkit.families import scheduler_config
from dbkit.losses import add_noise, noise_target, per_sample_loss, prior_preservation_loss, snr_weights

TIMESTEPS = torch.tensor([0, 1, 437, 998, 999])


def noise_scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    """diffusers' scheduler with the noise schedule of Stable Diffusion 1."""
    return DDPMScheduler.from_config({**scheduler_config("epsilon"), "prediction_type": prediction_type})


def draw(*names: str) -> list[torch.Tensor]:
    """A tensor of latents for each name, the same at every call."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(len(TIMESTEPS), 4, 8, 8, generator=random) for _ in names]


def test_noisy_latents_equal_those_of_diffusers():
    latents, noise = draw("latents", "noise")
    scheduler = noise_scheduler()
    expected = torch.cat(
        [scheduler.add_noise(latents[n : n + 1], noise[n : n + 1], TIMESTEPS[n : n + 1]) for n in range(len(TIMESTEPS))]
    )
    torch.testing.assert_close(add_noise(latents, noise, TIMESTEPS, scheduler.alphas_cumprod), expected)


def test_v_prediction_target_equals_that_of_diffusers():
    latents, noise = draw("latents", "noise")
    scheduler = noise_scheduler("v_prediction")
    expected = torch.cat(
        [
            scheduler.get_velocity(latents[n : n + 1], noise[n : n + 1], TIMESTEPS[n : n + 1])
            for n in range(len(TIMESTEPS))
        ]
    )
    target = noise_target("v_prediction", latents, noise, TIMESTEPS, scheduler.alphas_cumprod)
    torch.testing.assert_close(target, expected)


def test_epsilon_target_is_the_noise():
    latents, noise = draw("latents", "noise")
    target = noise_target("epsilon", latents, noise, TIMESTEPS, noise_scheduler().alphas_cumprod)
    assert torch.equal(target, noise)


def test_v_and_noisy_latents_give_back_the_latents():
    latents, noise = draw("latents", "noise")
    alphas_cumprod = noise_scheduler().alphas_cumprod
    noisy = add_noise(latents, noise, TIMESTEPS, alphas_cumprod)
    target = noise_target("v_prediction", latents, noise, TIMESTEPS, alphas_cumprod)
    alpha_bar = alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    torch.testing.assert_close(alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * target, latents)


def test_other_prediction_types_are_refused():
    latents, noise = draw("latents", "noise")
    with pytest.raises(DbkitError, match="predicts 'sample'; dbkit trains models that predict epsilon or v_prediction"):
        noise_target("sample", latents, noise, TIMESTEPS, noise_scheduler().alphas_cumprod)


def test_error_of_each_sample_is_its_own_mean_square():
    model_pred, target = draw("model_pred", "target")
    found = per_sample_loss(model_pred, target)
    for number in range(len(TIMESTEPS)):
        values = (model_pred[number] - target[number]).flatten().tolist()
        assert found[number].item() == pytest.approx(sum(value * value for value in values) / len(values), rel=1e-5)


def test_error_of_bf16_predictions_is_computed_in_fp32():
    model_pred, target = draw("model_pred", "target")
    found = per_sample_loss(model_pred.bfloat16(), target)
    assert found.dtype == torch.float32
    assert torch.equal(found, per_sample_loss(model_pred.bfloat16().float(), target))


@pytest.mark.parametrize("delta", [0.1, 1.0])
def test_huber_and_l1_are_what_their_names_say(delta):
    model_pred, target = draw("model_pred", "target")
    huber, l1 = per_sample_loss(model_pred, target, "huber", delta), per_sample_loss(model_pred, target, "l1")
    for number in range(len(TIMESTEPS)):
        errors = (model_pred[number] - target[number]).flatten().abs().tolist()
        expected = [e * e / 2 if e <= delta else delta * (e - delta / 2) for e in errors]
        assert huber[number].item() == pytest.approx(sum(expected) / len(errors), rel=1e-5)
        assert l1[number].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(prediction_type, gamma):
    alphas_cumprod = noise_scheduler().alphas_cumprod
    timesteps = torch.tensor([0, 10, 250, 500, 900, 999])
    found = snr_weights(timesteps, alphas_cumprod, gamma, prediction_type)
    for number, timestep in enumerate(timesteps.tolist()):
        alpha_bar = alphas_cumprod[timestep].item()
        snr = alpha_bar / (1 - alpha_bar)
        expected = min(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1)
        assert found[number].item() == pytest.approx(expected, rel=1e-4)


def test_min_snr_weighs_the_error_of_the_picture_alike_for_both_predictions():
    # An error of v or of noise stands for one of x_0; weighted, the two are the same.
    alphas_cumprod = noise_scheduler().alphas_cumprod
    latents, noise, off = draw("latents", "noise", "off")
    alpha_bar = alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    guess = latents + 0.1 * off
    noisy = add_noise(latents, noise, TIMESTEPS, alphas_cumprod)
    guessed_noise = (noisy - alpha_bar.sqrt() * guess) / (1 - alpha_bar).sqrt()
    weighted = []
    for kind in ("epsilon", "v_prediction"):
        target = noise_target(kind, latents, noise, TIMESTEPS, alphas_cumprod)
        predicted = noise_target(kind, guess, guessed_noise, TIMESTEPS, alphas_cumprod)
        weighted.append(per_sample_loss(predicted, target) * snr_weights(TIMESTEPS, alphas_cumprod, 5.0, kind))
    torch.testing.assert_close(weighted[0], weighted[1], rtol=1e-3, atol=1e-7)


def test_where_nothing_of_the_picture_is_left_the_weight_is_zero_and_finite():
    weights = snr_weights(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), 5.0, "v_prediction")
    assert weights.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("prior_loss_weight", [0.0, 0.3, 1.0])
def test_prior_preservation_adds_the_weighted_mean_of_the_class_samples(prior_loss_weight):
    losses = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 60.0])
    loss, instance_loss, class_loss = prior_preservation_loss(losses, 3, 3, prior_loss_weight)
    assert instance_loss.item() == pytest.approx((1 + 2 + 6) / 3)
    assert class_loss.item() == pytest.approx((10 + 20 + 60) / 3)
    assert loss.item() == pytest.approx((1 + 2 + 6) / 3 + prior_loss_weight * (10 + 20 + 60) / 3)


def test_batches_of_several_sizes_add_up_to_the_loss_of_all():
    losses = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 60.0])
    whole = prior_preservation_loss(losses, 3, 3, 0.3)
    parts = [prior_preservation_loss(losses[rows], n, 3, 0.3) for rows, n in (([0, 3, 4], 1), ([1, 2], 2), ([5], 0))]
    for number, expected in enumerate(whole):
        assert sum(part[number].item() for part in parts) == pytest.approx(expected.item())


def test_without_class_samples_the_loss_is_that_of_the_instances():
    loss, instance_loss, class_loss = prior_preservation_loss(torch.tensor([1.0, 3.0]), 2, 2, 0.3)
    assert (loss.item(), instance_loss.item(), class_loss.item()) == (2.0, 2.0, 0.0)


def test_a_weighted_loss_is_the_mean_of_what_counts():
    pred, target = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    weights = torch.rand(2, 1, 3, 5)
    weights[1] = 0.5
    found = per_sample_loss(pred, target, weights=weights)
    errors = (pred - target) ** 2
    expected = [
        sum(float(errors[n, c, y, x] * weights[n, 0, y, x]) for c in range(4) for y in range(3) for x in range(5))
        / (4 * float(weights[n].sum()))
        for n in range(2)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    # The same weight everywhere is no weight.
    assert float(found[1]) == pytest.approx(float(per_sample_loss(pred, target)[1]), rel=1e-5)
