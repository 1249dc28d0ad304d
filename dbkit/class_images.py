"""generate_class_images(): what the base model thinks the class looks like, for prior preservation."""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import draws
from dbkit.config import ClassImagesConfig
from dbkit.errors import DbkitError
from dbkit.files import safe_name, whole_file, write_text
from dbkit.images import as_html, list_images
from dbkit.libraries import choose_device, choose_dtype
from dbkit.models import Models, check_resolution, fingerprint, load_models, model_facts
from dbkit.sampling import SAMPLER, Shot, place, sample
from dbkit.settings import configured_by
from dbkit.text import check_clip_skip
from dbkit.workspace import default_folder

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
# Pictures that a notebook shows.
_SHOWN = 12


@dataclass(frozen=True)
class ClassImages:
    """The class images of one model and prompt: how many were generated now, found from before, brought by the user.

    Shows the first ones in a notebook.
    """

    folder: Path
    generated: int
    found: int
    brought: int
    # Those that num_class_images asks for; a folder that runs share may hold more.
    paths: list[Path]

    def __str__(self) -> str:
        parts = [f"{self.generated} generated", f"{self.found} found"]
        if self.brought:
            parts.append(f"{self.brought} brought by you, of unknown origin, used as they are")
        return f"class images: {', '.join(parts)}: {self.folder}"

    def _repr_html_(self) -> str:
        shown = "".join(as_html(path, 128, path.name) for path in self.paths[:_SHOWN])
        return f"<p>{html.escape(str(self))}</p><div style='display:flex;flex-wrap:wrap;gap:4px'>{shown}</div>"


@configured_by(ClassImagesConfig)
def generate_class_images(config: ClassImagesConfig) -> ClassImages:
    """Fill the folder up to num_class_images with pictures of class_prompt by the base model.

    Stopped at any moment, it continues where it was. A manifest says which model, prompt, size, sampler and seed the
    folder belongs to; images of another kind are refused, never mixed. Images without a manifest are the user's own:
    they count and are said to be used.
    """
    return make_class_images([config])[0]


def make_class_images(configs: Sequence[ClassImagesConfig]) -> list[ClassImages]:
    """The class images of several settings with one base model, which is loaded once, and only if any are missing."""
    loaded = functools.cache(_load)
    return [_fill(config, loaded) for config in configs]


def _fill(config: ClassImagesConfig, loaded: Callable[..., _Loaded]) -> ClassImages:
    facts = model_facts(config.pretrained_model_name_or_path)
    for side in config.size:
        check_resolution(side, facts)
    check_clip_skip(config.clip_skip, facts and facts.text_layers)
    identity = _identity(config)
    folder = config.class_data_dir or default_folder() / "class_images" / _key(config, identity)
    _check_manifest(folder, identity)
    brought = _brought(folder)
    wanted = [folder / f"class-{number:05d}.png" for number in range(config.num_class_images - len(brought))]
    missing = [number for number, path in enumerate(wanted) if not path.exists()]
    if missing:
        note = {**identity, "brought": [path.name for path in brought]}
        write_text(folder / MANIFEST, json.dumps(note, indent=1, ensure_ascii=False))
        base = (config.pretrained_model_name_or_path, config.revision, config.clip_skip)
        _generate(config, loaded(*base, config.device, config.mixed_precision), missing, wanted)
    return ClassImages(folder, len(missing), len(wanted) - len(missing), len(brought), [*brought, *wanted])


@dataclass(frozen=True)
class _Loaded:
    """A base model on its device, ready to be sampled."""

    models: Models
    dtype: torch.dtype


def _load(name: str, revision: str | None, clip_skip: int | None, device_name: str, mixed_precision: str) -> _Loaded:
    device = choose_device(device_name)
    dtype = choose_dtype(mixed_precision, device)
    models = load_models(name, revision, clip_skip=clip_skip)
    place(models, device, dtype)
    return _Loaded(models, dtype)


def _brought(folder: Path) -> list[Path]:
    """The images that the user put there: all of them before dbkit's first one, later those that it did not name."""
    present = list_images(folder) if folder.is_dir() else []
    path = folder / MANIFEST
    if not path.exists():
        return present
    noted = json.loads(path.read_text(encoding="utf-8")).get("brought", [])
    return [path for path in present if path.name in noted or not re.fullmatch(r"class-\d{5}\.png", path.name)]


def _identity(config: ClassImagesConfig) -> dict[str, Any]:
    return {
        "model": fingerprint(config.pretrained_model_name_or_path, config.revision),
        "class_prompt": config.class_prompt,
        "negative_prompt": config.negative_prompt,
        "resolution": config.resolution if config.size == (config.resolution,) * 2 else list(config.size),
        "sampler": SAMPLER,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "seed": config.seed,
        "clip_skip": config.clip_skip,
    }


def _key(config: ClassImagesConfig, identity: dict[str, Any]) -> str:
    # What is not given has no part in the name: a setting that comes later leaves the folders of today where they are.
    given = {name: value for name, value in identity.items() if value is not None}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    return f"{safe_name(config.class_prompt, 40)}-{digest[:8]}"


def _check_manifest(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DbkitError(f"{path} is damaged ({error}); choose another class_data_dir") from error
    if not isinstance(there, dict):
        raise DbkitError(f"{path} is not a manifest of class images; choose another class_data_dir")
    differing = [
        f"{name} {there.get(name)!r} instead of {identity[name]!r}"
        for name in identity
        if there.get(name) != identity[name]
    ]
    if differing:
        raise DbkitError(
            f"{folder} holds class images made with {', '.join(differing)}; choose another class_data_dir, or leave it "
            "empty and dbkit keeps one folder for each model and prompt"
        )


def _generate(config: ClassImagesConfig, loaded: _Loaded, missing: list[int], wanted: list[Path]) -> None:
    from tqdm import tqdm

    for side in config.size:
        check_resolution(side, loaded.models.facts)
    # Whole batches, counted from the first image, so that an interrupted generation gives the same pictures.
    size = config.sample_batch_size
    batches = sorted({number // size for number in missing})
    numbers = [n for batch in batches for n in range(batch * size, min((batch + 1) * size, len(wanted)))]
    shots = [
        Shot(
            config.class_prompt,
            draws.generator(config.seed, "class image", sample=number),
            config.guidance_scale,
            config.negative_prompt,
        )
        for number in numbers
    ]
    pictures = sample(loaded.models, shots, config.size, config.num_inference_steps, size, loaded.dtype)
    bar = tqdm(pictures, "class images", len(numbers), file=sys.stdout, mininterval=1)
    for picture, number in zip(bar, numbers):
        if wanted[number].exists():
            continue
        with whole_file(wanted[number]) as partial:
            picture.save(partial, "PNG")
