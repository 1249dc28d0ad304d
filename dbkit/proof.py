"""A conversion proven by use: what a model computes from fixed inputs, each layer read when it is its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit import draws
from dbkit.errors import DbkitError
from dbkit.models import under_own_names
from dbkit.stored_models import StoredModel, empty_modules
from dbkit.text import encode_prompts

if TYPE_CHECKING:
    import torch

    from dbkit.tensor_files import Stored

# The same weights give the same figures, but for the order in which a library may add up.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Proof:
    """How many tensors of a part were compared, and how far its output moved, as a share of its largest value."""

    part: str
    tensors: int
    difference: float


def prove(
    source: StoredModel, written: StoredModel, path: Path, cast: Callable[[str, Stored], Stored] | None = None
) -> list[Proof]:
    """Compare a text encoding, a U-Net pass and the VAE's coding of both models, in fp32; a line for each part.

    `cast` makes of a source's tensor what was written where that is in another precision: the written model must
    compute what those values do, and the lines say how far that is from the source's own. path is of what was written.
    Raises DbkitError where the models differ, or compute what is no number.
    """
    wanted = _outputs(source, path)
    if odd := [part for part, output in wanted.items() if not output.isfinite().all()]:
        raise DbkitError(
            f"the {odd[0]} of the model computes values that are no numbers, so its pictures would be black; take "
            "another checkpoint of it"
        )
    found = _outputs(written, path)
    exact = _outputs(source, path, cast) if cast else wanted
    for part, output in found.items():
        if not _difference(output, exact[part]) <= _TOLERANCE:
            raise DbkitError(
                f"{path} computes something else than its source (its {part}), and was not kept; this is a fault of "
                "dbkit, please report it with the name of the model"
            )
    return [Proof(part, len(source.weights[part]), _difference(found[part], output)) for part, output in wanted.items()]


def table(proofs: list[Proof]) -> str:
    """The lines for a person."""
    rows = [("part", "tensors", "read back", "output differs by")]
    rows += [(p.part, str(p.tensors), "equal", f"{p.difference:.1e}" if p.difference else "nothing") for p in proofs]
    return "\n".join(f"{part:<14}{tensors:>7}  {read:<11}{difference}" for part, tensors, read, difference in rows)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def _outputs(
    model: StoredModel, path: Path, cast: Callable[[str, Stored], Stored] | None = None
) -> dict[str, torch.Tensor]:
    """Text states, predicted noise, and latents and pixels of the VAE in one, of the smallest sizes that go through."""
    import torch
    from accelerate import cpu_offload

    modules = empty_modules(model, path)
    for part, module in modules.items():
        module.float().eval()
        layers = {name: cast(name, tensor) if cast else tensor for name, tensor in model.weights[part].items()}
        cpu_offload(module, torch.device("cpu"), state_dict=_Layers(under_own_names(module, part, layers)))
    unet, vae, text_encoder = modules["unet"], modules["vae"], modules["text_encoder"]
    random = draws.generator(0, "proof")

    def noise(channels: int, side: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal((1, channels, side, side), dtype="float32"))

    # Two values a side at the lowest resolution.
    side = 2 ** len(unet.config.block_out_channels)
    tokens = torch.arange(text_encoder.config.max_position_embeddings)[None] % text_encoder.config.vocab_size
    with torch.no_grad():
        text = encode_prompts(text_encoder, tokens)
        predicted = unet(noise(unet.config.in_channels, side), 500, text).sample
        latents = noise(vae.config.latent_channels, 2)
        pixels = vae.decode(latents).sample
        coded = vae.encode(pixels.tanh()).latent_dist.parameters
    return {"text_encoder": text, "unet": predicted, "vae": torch.cat([pixels.flatten(), coded.flatten()])}


class _Layers(Mapping):
    """A state dict whose values are read when they are asked for."""

    def __init__(self, stored: dict[str, Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
