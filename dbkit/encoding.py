"""Pictures as latents: by the VAE, or from the file in which a run keeps what its VAE made of them.

Each entry of that file lies under a digest of all that it depends on, so what is found is what would be encoded, bit
for bit. The mirror brings the file home like every other of the run. It can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit import processes
from dbkit.buckets import Size
from dbkit.errors import DbkitError
from dbkit.examples import Example
from dbkit.files import sha256, whole_file
from dbkit.images import View, read_image, render
from dbkit.tensor_files import bytes_of, held, is_finite, open_tensors, write_safetensors

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

FILE = "latents.safetensors"
# To be raised with every change of what images.py or encode() make of the same picture.
_FORMAT = 1
# How many of the runs beside a run are looked into: on Google Drive each takes a moment.
_MOST_BESIDE = 10
# Of one batch, by the kind of device. Elsewhere pictures are encoded one by one: on a CPU more at once is no faster.
PIXELS_AT_ONCE = {"cuda": 4 * 512 * 512}


@dataclass(frozen=True)
class Picture:
    """What the VAE sees: a view of an example, or what is left of it beside a hole, (H, W) latents and 1 there."""

    example: Example
    view: View
    hole: np.ndarray | None = None

    def address(self, encoder: str) -> str:
        """What its latents are kept under, where encoder stands for the VAE and what runs it."""
        facts = [encoder, self.example.sha256, self.example.size, dataclasses.astuple(self.view)]
        if self.hole is not None:
            facts.append([self.hole.shape, hashlib.sha256(self.hole.tobytes()).hexdigest()])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """It as the VAE wants it, of the whole image: shape (3, H, W), from -1 to 1."""
        import numpy as np
        import torch

        seen = np.asarray(render(image, self.example.size, self.view), dtype=np.float32) / 127.5 - 1
        pixels = torch.from_numpy(seen).permute(2, 0, 1)
        if self.hole is None:
            return pixels
        hole = torch.from_numpy(self.hole)[None, None]
        return pixels * (1 - torch.nn.functional.interpolate(hole, size=pixels.shape[1:])[0])


def at_once(size: Size, kind: str) -> int:
    """How many pictures of a size, (width, height), the VAE encodes at once on a kind of device, for instance "cuda".

    The last bits of latents depend on that number, and not on what else is encoded. So every batch has it, the last one
    too: a picture's latents are the same whatever was found already.
    """
    return max(1, PIXELS_AT_ONCE.get(kind, 0) // (size[0] * size[1]))


def encode(
    vae: AutoencoderKL, pictures: Sequence[Picture], device: torch.device, files: Sequence[Path] = ()
) -> list[torch.Tensor]:
    """Mean and std of the VAE's posterior of each picture, on the CPU: (2, C, H, W), scaled as the U-Net wants them.

    What one of the files holds is not encoded. The first of them then gets all that was asked for.
    """
    encoder = _digest_of_encoder(vae, device)
    names = [picture.address(encoder) for picture in pictures]
    wanted = dict(zip(names, pictures))
    own = _read(wanted.keys(), files[:1])
    known = own | _read(wanted.keys() - own.keys(), files[1:])
    known |= _by_vae(vae, wanted, known.keys(), device)
    if files and len(own) < len(wanted) and processes.rank() == 0:
        # What is no number may be an accident of this machine.
        _write({name: latents for name, latents in known.items() if is_finite(latents)}, files[0])
    return [known[name] for name in names]


def files_near(run: Path, home: Path) -> list[Path]:
    """Where latents may be: in the run's own folder, first; at its home; in the runs beside it, the newest first."""
    own = list(dict.fromkeys(folder / FILE for folder in (run, home)))
    beside: dict[Path, float] = {}
    for path in own:
        # A home that is gone, or a run that is being moved, ends nothing: what is not found is encoded.
        with contextlib.suppress(OSError):
            beside |= {other: other.stat().st_mtime for other in path.parent.parent.glob(f"*/{FILE}")}
    others = sorted(beside.keys() - set(own), key=lambda path: beside[path], reverse=True)
    return own + others[:_MOST_BESIDE]


def _digest_of_encoder(vae: AutoencoderKL, device: torch.device) -> str:
    """Stands for what latents depend on beside their picture: the VAE's settings and weights, and what computes them.

    Another device, another version of a library or another number at once gives other last bits.
    """
    import diffusers
    import PIL
    import torch

    facts = [_FORMAT, torch.__version__, diffusers.__version__, PIL.__version__, str(vae.dtype)]
    facts += [torch.cuda.get_device_name(device) if device.type == "cuda" else device.type]
    facts += [PIXELS_AT_ONCE.get(device.type), {key: value for key, value in vae.config.items() if key[0] != "_"}]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode())
            digest.update(bytes_of(tensor.cpu()))
    return digest.hexdigest()


def _by_vae(
    vae: AutoencoderKL, wanted: dict[str, Picture], known: Set[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """What is not known yet, encoded in batches of one size. The VAE goes to the device only if there is any."""
    import torch
    from tqdm import tqdm

    by_size: dict[Size, list[str]] = {}
    for name, picture in wanted.items():
        if name not in known:
            by_size.setdefault(picture.example.size, []).append(name)
    if by_size:
        vae.to(device)
    opened = functools.lru_cache(1)(_read_unchanged)  # the views of an image follow one another
    found: dict[str, torch.Tensor] = {}
    title = f"latents, {len(known)} of {len(wanted)} found"
    with (
        tqdm(desc=title, total=len(wanted), initial=len(known), file=sys.stdout, mininterval=1) as bar,
        torch.no_grad(),
    ):
        for size, names in by_size.items():
            count = at_once(size, device.type)
            for first in range(0, len(names), count):
                some = names[first : first + count]
                pixels = [wanted[name].pixels(opened(wanted[name].example)) for name in some]
                pixels += pixels[-1:] * (count - len(some))
                posterior = vae.encode(torch.stack(pixels).to(device)).latent_dist
                latents = torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor
                found |= zip(some, latents)
                bar.update(len(some))
    # Only here, so that pictures are read while a GPU encodes those before them.
    return {name: latents.cpu() for name, latents in found.items()}


def _read_unchanged(example: Example) -> Image.Image:
    """The picture of an example. Raises DbkitError where its file is not what was looked at when training began.

    Its latents would be kept under the digest of the earlier one, and found for it by every later run.
    """
    image = read_image(example.path)
    if sha256(example.path) != example.sha256:
        raise DbkitError(f"{example.path} was changed after training began; start training again")
    return image


def _read(names: Set[str], files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """What the files hold under these names, whole by its digest. A file that is damaged is said; nothing is raised."""
    found: dict[str, torch.Tensor] = {}
    for path in files:
        missing = names - found.keys()
        whole, damaged = {}, False
        try:
            if missing and path.is_file():
                stored, digests = open_tensors(path)
                there = {name: stored[name].read() for name in missing & stored.keys()}
                whole = {name: tensor for name, tensor in there.items() if digests.get(name) == _digest(name, tensor)}
                damaged = len(whole) < len(there)
        except (DbkitError, OSError):
            damaged = True
        if damaged:
            print(f"{path} is damaged or cannot be read; the latents that are not whole in it are made again")
        found |= whole
    return found


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Put these tensors in the place of what a file holds. That it cannot be written is said, and ends nothing."""
    digests = {name: _digest(name, tensors[name]) for name in sorted(tensors)}
    try:
        with whole_file(path) as partial:
            write_safetensors({name: held(tensor) for name, tensor in tensors.items()}, partial, digests)
    except (DbkitError, OSError) as error:
        print(f"the latents could not be kept: {error}; training goes on, and the next run encodes them again")


def _digest(name: str, tensor: torch.Tensor) -> str:
    """Of a tensor and its name, so that none stands for another."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(bytes_of(tensor))
    return digest.hexdigest()
