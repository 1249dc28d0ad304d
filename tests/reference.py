"""The loss of training, slowly: one sample at a time, by diffusers' and transformers' own classes."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image, ImageOps
from transformers import CLIPTextModel, CLIPTokenizer

from dbkit import TrainConfig, draws
from dbkit.augment import holes_of

# Of the photographs and the class images that the fixtures draw.
PROMPTS = dict.fromkeys(("crimson.png", "gold.png", "teal.png"), "photo of zwx thing")
PROMPTS |= dict.fromkeys(("navy.png", "olive.png"), "photo of a thing")


class Reference:
    """A base model, and what one sample of a training on it loses."""

    def __init__(self, config: TrainConfig, prompts: dict[str, str] = PROMPTS):
        self.config, self.prompts = config, prompts
        folder = config.pretrained_model_name_or_path
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        rescaled = {"rescale_betas_zero_snr": config.rescale_zero_terminal_snr}
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **rescaled)
        self.is_v = self.scheduler.config.prediction_type == "v_prediction"

    def loss(self, role: str, sample: int, step: int = 1) -> tuple[torch.Tensor, float]:
        """The loss of one sample, counted over the run, without min-SNR weight, and that weight."""
        config = self.config
        images = config.instance_data_dir if role == "instance" else config.class_data_dir
        paths = sorted(images.glob("*.png"))
        number = (step - 1) * config.train_batch_size + sample
        path = paths[draws.index(config.seed, f"{role} order", len(paths), number)]
        random = draws.generator(config.seed, role, step, sample)
        timestep = torch.tensor([int(random.integers(1000))])
        count = 3 if config.input_perturbation else 2
        noise, latent_noise, *more = torch.from_numpy(random.standard_normal((count, 1, 4, 8, 8), dtype=np.float32))
        if config.noise_offset:
            noise = noise + config.noise_offset * torch.from_numpy(random.standard_normal((4, 1, 1), dtype=np.float32))
        input_noise = noise + config.input_perturbation * more[0] if more else noise
        pixels = self.pixels(path)
        with torch.no_grad():
            posterior = self.vae.encode(pixels).latent_dist
        latents = (posterior.mean + posterior.std * latent_noise) * self.vae.config.scaling_factor
        target = self.scheduler.get_velocity(latents, noise, timestep) if self.is_v else noise
        seen = self.scheduler.add_noise(latents, input_noise, timestep)
        if self.unet.config.in_channels == 9:
            seen = torch.cat([seen, *self.hidden(path, pixels, sample, step)], dim=1)
        model_pred = self.unet(seen, timestep, **self.text(self.prompts[path.name])).sample
        error = (model_pred - target).abs()
        if config.loss_type == "huber":
            error = torch.where(error <= config.huber_delta, error**2 / 2, config.huber_delta * error - 0.005)
        elif config.loss_type == "mse":
            error = error**2
        weights = self.weights(path) if config.masked_loss and role == "instance" else torch.ones(8, 8)
        loss = (error * weights).sum() / (4 * weights.sum())
        snr = float(compute_snr(self.scheduler, timestep))
        gamma = config.min_snr_gamma
        return loss, min(snr, gamma) / (snr + 1 if self.is_v else snr) if gamma else 1.0

    @staticmethod
    def pixels(path: Path) -> torch.Tensor:
        image = Image.open(path)
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
        return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1

    def weights(self, path: Path) -> torch.Tensor:
        """What the mask beside the image, or its transparency, lets count of each latent's 8 x 8 pixels."""
        beside = path.parent / "masks" / path.name
        image = Image.open(beside if beside.exists() else path)
        if image.mode == "RGB":
            return torch.ones(8, 8)
        mask = image.getchannel("A") if image.mode == "RGBA" else image.convert("L")
        mask = ImageOps.fit(mask, (64, 64), Image.Resampling.LANCZOS)
        white = torch.tensor(np.asarray(mask)).reshape(8, 8, 8, 8).float().mean((1, 3)) / 255
        return self.config.unmasked_weight + (1 - self.config.unmasked_weight) * white

    @torch.no_grad()
    def hidden(self, path: Path, pixels: torch.Tensor, sample: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask and the latents of the picture without what it hides."""
        holes = holes_of(self.config, path.name, (8, 8))
        number, _ = draws.generator(self.config.seed, "variant", step, sample).integers([len(holes), 1])
        mask = torch.tensor(holes[number])
        left = pixels * (1 - mask.repeat_interleave(8, 0).repeat_interleave(8, 1))
        return mask[None, None], self.vae.encode(left).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def text(self, prompt: str) -> dict[str, torch.Tensor]:
        tokens = self.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
        found = self.text_encoder(tokens.input_ids, output_hidden_states=True)
        states = found.last_hidden_state
        if self.config.clip_skip == 2:
            inner = getattr(self.text_encoder, "text_model", self.text_encoder)
            states = inner.final_layer_norm(found.hidden_states[-2])
        if not self.config.pad_tokens:
            states = states[:, : int(tokens.attention_mask.sum())]
        return {"encoder_hidden_states": states}


def reference_losses(config: TrainConfig, prompts: dict[str, str] = PROMPTS, step: int = 1) -> list[float]:
    """Loss, instance loss and class loss of one step, without accumulation."""
    reference = Reference(config, prompts)

    @torch.no_grad()
    def mean_loss(role: str) -> float:
        losses = [reference.loss(role, sample, step) for sample in range(config.train_batch_size)]
        return sum(float(loss) * weight for loss, weight in losses) / len(losses)

    instance_loss = mean_loss("instance")
    class_loss = mean_loss("class") if config.with_prior_preservation else 0.0
    return [instance_loss + config.prior_loss_weight * class_loss, instance_loss, class_loss]
