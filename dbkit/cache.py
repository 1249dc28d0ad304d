"""What training reads instead of images and prompts: latents and text states, computed once, held on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dbkit import draws
from dbkit.augment import holes_of
from dbkit.buckets import Size
from dbkit.encoding import Picture, encode
from dbkit.examples import Example
from dbkit.images import View, read_mask, render_mask
from dbkit.models import Models
from dbkit.order import Order
from dbkit.train_config import TrainConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image


@dataclass(frozen=True)
class Latents:
    """The VAE's posterior of each image: mean and std of shape (N, C, H, W), fp32, scaled as the U-Net wants them.

    Both are kept, so that every step draws its latents afresh, as if the VAE ran in the loop. weights, (N, 1, H, W), is
    how much each place counts in a masked loss. hidden, (N, 1 + C, H, W), is what an inpainting model reads beside the
    noisy latents: where the picture is hidden, 1, and the latents of what is left of it.
    """

    mean: torch.Tensor
    std: torch.Tensor
    weights: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    def draw(self, indices: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents of shape (B, C, H, W) for indices of shape (B,) and standard normal noise of the result's shape."""
        return self.mean[indices] + self.std[indices] * noise


def encode_images(
    models: Models,
    sets: list[list[Example]],
    config: TrainConfig,
    device: torch.device,
    files: Sequence[Path] = (),
) -> list[tuple[list[Latents], list[list[tuple[int, int]]]]]:
    """The latents of all views of each set of examples, one Latents for each size, and where those of each view lie.

    The places are (number of the Latents, row) for each example and each of its views; a view has several rows where an
    inpainting model sees it with several holes. files are those that may hold latents already, the run's own first.
    The VAE runs in fp32: in fp16 some images overflow.
    """
    import torch

    pictures = [picture for examples in sets for example in examples for picture in _seen(models, example, config)]
    encoded = iter(encode(models.vae, pictures, device, files))
    results = []
    for examples in sets:
        sizes = list(dict.fromkeys(example.size for example in examples))
        rows: list[list[dict[str, torch.Tensor]]] = [[] for _ in sizes]
        places = []
        for example in examples:
            number = sizes.index(example.size)
            own = list(_rows(models, example, config, encoded))
            places.append([(number, len(rows[number]) + n) for n in range(len(own))])
            rows[number] += own
        stacked = [{name: torch.stack([row[name] for row in part]).to(device) for name in part[0]} for part in rows]
        results.append(([Latents(**fields) for fields in stacked], places))
    return results


def _seen(models: Models, example: Example, config: TrainConfig) -> Iterator[Picture]:
    """What the VAE sees of an example, in the order in which _rows() takes what it made of it."""
    for view in example.views:
        yield Picture(example, view)
        for hole in _holes(models, example, config):
            yield Picture(example, view, hole)


def _holes(models: Models, example: Example, config: TrainConfig) -> list[np.ndarray]:
    """What an inpainting model does not see of each view, (H, W) latents; no others have holes."""
    width, height = (side // models.vae_scale_factor for side in example.size)
    return holes_of(config, example.path.name, (width, height)) if models.inpaints else []


def _rows(
    models: Models, example: Example, config: TrainConfig, encoded: Iterator[torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """The fields of Latents for each view of an example, or for each hole in each view."""
    import torch

    mask = read_mask(example.mask) if example.mask else None
    for view in example.views:
        mean, std = next(encoded)
        row = {"mean": mean, "std": std}
        if config.masked_loss:
            row["weights"] = _weights(mask, example.size, view, config, mean.shape[1:])
        if not models.inpaints:
            yield row
        for hole in _holes(models, example, config):
            # As diffusers' pipeline gives them: the mask, and the most likely latents of the rest.
            yield {**row, "hidden": torch.cat([torch.from_numpy(hole)[None], next(encoded)[0]])}


def _weights(
    mask: Image.Image | None, size: Size, view: View, config: TrainConfig, shape: tuple[int, int]
) -> torch.Tensor:
    """How much each latent counts, (1, H, W): 1 in the mask's white, unmasked_weight in its black."""
    import numpy as np
    import torch

    if mask is None:
        return torch.ones(1, *shape)
    white = torch.from_numpy(np.asarray(render_mask(mask, size, view), dtype=np.float32) / 255)
    # The mean over the pixels of each latent.
    white = torch.nn.functional.adaptive_avg_pool2d(white[None], tuple(shape))
    return config.unmasked_weight + (1 - config.unmasked_weight) * white


@dataclass(frozen=True)
class Pool:
    """The instance images or the class images, ready for training.

    latents has one entry for each size, places says where those of each image's views lie in it. prompts holds one row
    for each distinct prompt: text states (P, 77, D), or token ids (P, 77) while the text encoder is trained;
    prompt_rows are the rows of each image's prompts, empty_prompt is that of no prompt at all. own_tokens, (P, 77), is
    1 where a prompt is not padding, if that makes a difference.
    """

    role: Literal["instance", "class"]
    latents: list[Latents]
    places: list[list[tuple[int, int]]]
    prompts: torch.Tensor
    prompt_rows: list[list[int]]
    empty_prompt: int = 0
    own_tokens: torch.Tensor | None = None

    @property
    def text_is_trained(self) -> bool:
        """Whether prompts holds token ids."""
        return not self.prompts.is_floating_point()


@dataclass(frozen=True)
class Batch:
    """One forward pass: the first `instances` of its B samples are instance images, the rest class images.

    noise is what the model is to find in the input, input_noise what is put there: the same, or with a perturbation.
    pairs is the number of instance images, and of class images if there are any, in all batches of the same samples:
    what the losses of each are divided by. weights, hidden and own_tokens are rows of the fields of those names in
    Latents and Pool, if these have them.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    input_noise: torch.Tensor
    timesteps: torch.Tensor
    prompts: torch.Tensor
    instances: int
    pairs: int
    weights: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    own_tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class Noising:
    """How samples are noised: the settings noise_offset, input_perturbation and caption_dropout, and T timesteps."""

    timesteps: int
    offset: float = 0.0
    perturbation: float = 0.0
    caption_dropout: float = 0.0


@dataclass(frozen=True)
class _Draw:
    """One sample: which latents, which row of them, which prompt, and its random numbers."""

    latents: Latents
    row: int
    prompt: int
    timestep: int
    normal: np.ndarray


def draw_batches(pools: list[Pool], order: Order, step: int, samples: range, noising: Noising) -> list[Batch]:
    """The batches of the given sample numbers of a step (counted from 1), one for each size among their images.

    A pure function of its arguments: sample j of step k draws its view, prompt, noise, timestep and latents from
    generators keyed by (seed, k, j). Each pool gives one image for each sample number.
    """
    by_shape: dict[tuple[int, ...], list[list[_Draw]]] = {}
    for number, pool in enumerate(pools):
        for sample in samples:
            drawn = _draw(pool, order, step, sample, noising)
            parts = by_shape.setdefault(drawn.latents.mean.shape[1:], [[] for _ in pools])
            parts[number].append(drawn)
    return [_batch(pools, parts, len(samples), noising) for parts in by_shape.values()]


def _draw(pool: Pool, order: Order, step: int, sample: int, noising: Noising) -> _Draw:
    import numpy as np

    number = (step - 1) * order.per_step + sample
    image = order.instance(number) if pool.role == "instance" else order.class_image(number)
    places, prompts = pool.places[image], pool.prompt_rows[image]
    view = prompt = 0
    if len(places) > 1 or len(prompts) > 1:
        view, prompt = draws.generator(order.seed, "variant", step, sample).integers([len(places), len(prompts)])
    which, row = places[view]
    random = draws.generator(order.seed, pool.role, step, sample)
    timestep = int(random.integers(noising.timesteps))
    # The noise that is added, the one that draws the latents from their posterior, and maybe that of the perturbation.
    shape = pool.latents[which].mean.shape[1:]
    normal = random.standard_normal((3 if noising.perturbation else 2, *shape), dtype=np.float32)
    if noising.offset:
        normal[0] += noising.offset * random.standard_normal((shape[0], 1, 1), dtype=np.float32)
    row_of_prompt = prompts[prompt]
    if noising.caption_dropout and random.random() < noising.caption_dropout:
        row_of_prompt = pool.empty_prompt
    return _Draw(pool.latents[which], row, row_of_prompt, timestep, normal)


def _batch(pools: list[Pool], parts: list[list[_Draw]], pairs: int, noising: Noising) -> Batch:
    import numpy as np
    import torch

    drawn = [draw for part in parts for draw in part]
    device = pools[0].prompts.device
    normal = torch.from_numpy(np.stack([draw.normal for draw in drawn], axis=1))
    numbers = torch.tensor([[draw.row for draw in drawn], [draw.prompt for draw in drawn], [d.timestep for d in drawn]])
    if device.type == "cuda":
        normal, numbers = normal.pin_memory(), numbers.pin_memory()  # only then is the copy not waited for
    noise, latent_noise, *more = normal.to(device, non_blocking=True)
    input_noise = noise + noising.perturbation * more[0] if more else noise
    rows, prompt_rows, steps = numbers.to(device, non_blocking=True)
    found: dict[str, list[torch.Tensor]] = {}
    start = 0
    for pool, part in zip(pools, parts):
        if part:
            own, latents = slice(start, start + len(part)), part[0].latents
            read = {"latents": latents.draw(rows[own], latent_noise[own]), "prompts": pool.prompts[prompt_rows[own]]}
            for name, table, where in (
                ("weights", latents.weights, rows),
                ("hidden", latents.hidden, rows),
                ("own_tokens", pool.own_tokens, prompt_rows),
            ):
                read |= {name: table[where[own]]} if table is not None else {}
            for name, value in read.items():
                found.setdefault(name, []).append(value)
            start += len(part)
    joined = {name: torch.cat(values) for name, values in found.items()}
    return Batch(noise=noise, input_noise=input_noise, timesteps=steps, instances=len(parts[0]), pairs=pairs, **joined)
