"""The losses as pure functions of tensors. B is the batch; latents have shape (B, C, H, W), timesteps (B,)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbkit.errors import DbkitError

if TYPE_CHECKING:
    import torch


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """Noisy latents sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    alphas_cumprod has shape (T,) and lies on the same device, so that nothing is copied in the step.
    """
    alpha, sigma = _alpha_sigma(timesteps, alphas_cumprod)
    return alpha * latents + sigma * noise


def noise_target(
    prediction_type: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """What the U-Net should predict: the noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0.

    v-prediction: Salimans & Ho 2022, arXiv:2202.00512. Raises DbkitError for other prediction types.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        alpha, sigma = _alpha_sigma(timesteps, alphas_cumprod)
        return alpha * noise - sigma * latents
    raise DbkitError(
        f"the model predicts {prediction_type!r}; dbkit trains models that predict epsilon or v_prediction"
    )


def _alpha_sigma(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def per_sample_loss(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    loss_type: str = "mse",
    huber_delta: float = 0.1,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean error of each sample, shape (B,), computed in fp32 whatever the inputs are.

    With weights of shape (B, 1, H, W) it is the weighted mean, so that a small mask counts as much as a large one.
    loss_type is mse, l1, or huber: half the square up to huber_delta, linear beyond it (torch's huber_loss).
    """
    from torch.nn import functional

    pred, target = model_pred.float(), target.float()
    if loss_type == "huber":
        errors = functional.huber_loss(pred, target, reduction="none", delta=huber_delta)
    else:
        errors = (pred - target).abs() if loss_type == "l1" else (pred - target).square()
    if weights is None:
        return errors.flatten(1).mean(1)
    return (errors.mean(1, keepdim=True) * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)


def snr_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """The weight of each sample, shape (B,), by min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    With SNR = alpha_bar / (1 - alpha_bar) it is min(SNR, gamma) / SNR where the model predicts noise, and
    min(SNR, gamma) / (SNR + 1) where it predicts v: both are min(SNR, gamma) for the error of x_0.
    """
    alpha_bar = alphas_cumprod[timesteps]
    # Multiplied by 1 - alpha_bar, so that nothing is divided by an SNR of zero or taken from an endless one.
    capped = alpha_bar.minimum(gamma * (1 - alpha_bar))
    return capped / alpha_bar if prediction_type == "epsilon" else capped


def prior_preservation_loss(
    sample_losses: torch.Tensor, instances: int, pairs: int, prior_loss_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L = L_instance + prior_loss_weight * L_class (Ruiz et al. 2023, arXiv:2208.12242, eq. 2), and its two parts.

    sample_losses has shape (B,): the first `instances` are instance images, the rest (maybe none) class images. Each
    part is the mean over its own `pairs` samples; where images of several sizes share them, over several batches
    whose losses add up to it.
    """
    instance_loss = sample_losses[:instances].sum() / pairs
    class_loss = sample_losses[instances:].sum() / pairs
    return instance_loss + prior_loss_weight * class_loss, instance_loss, class_loss
