"""preview(): prompts × seeds, or × guidance scales, as single pictures and a labelled grid."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit import draws
from dbkit.config import PreviewConfig
from dbkit.errors import DbkitError
from dbkit.files import require_place, safe_name, whole_file
from dbkit.libraries import choose_device, choose_dtype
from dbkit.lora import find_source, load_source
from dbkit.models import Models, check_resolution, model_facts
from dbkit.sampling import Shot, borrowed, place, sample
from dbkit.settings import configured_by
from dbkit.text import check_clip_skip

if TYPE_CHECKING:
    import torch
    from PIL import Image


# Pixels along a side of a JPEG.
_MOST_JPEG = 65500


@dataclass(frozen=True)
class Preview:
    """Where the grid and the single pictures are. Shows the grid in a notebook, if it is still there."""

    grid: Path
    pictures: list[Path]

    def __str__(self) -> str:
        return f"preview: {self.grid}"

    def _repr_jpeg_(self) -> bytes | None:
        import io

        from PIL import Image

        buffer = io.BytesIO()
        try:
            with Image.open(self.grid) as grid:
                grid.thumbnail((_MOST_JPEG, _MOST_JPEG))
                grid.convert("RGB").save(buffer, "JPEG", quality=90)
        except (OSError, Image.DecompressionBombError):  # one that is gone by now, or larger than any page
            return None
        return buffer.getvalue()


@configured_by(PreviewConfig)
def preview(config: PreviewConfig) -> Preview:
    """Sample a model folder: each prompt with each seed, or with each guidance scale, into a grid and single pictures.

    The same settings give the same pictures, whatever was trained or sampled before.
    """
    prompts = [*config.prompt, *(read_prompts(config.prompts_file) if config.prompts_file else ())]
    output = config.output or _unused(config.model)
    if output.suffix.lower() != ".png":
        raise DbkitError(f"output is {output}; give the grid a name that ends in .png")
    require_place(output)
    if output.is_dir():
        raise DbkitError(f"output {output} is a folder; give the grid another name")
    require_place(output.with_suffix("") / "picture.png")
    source = find_source(config.model, config.lora)
    facts = model_facts(source.pretrained_model_name_or_path)
    if config.resolution:
        check_resolution(config.resolution, facts)
    check_clip_skip(config.clip_skip, facts and facts.text_layers)
    device = choose_device(config.device)
    dtype = choose_dtype(config.mixed_precision, device)
    # Before the work: a folder that cannot be made is said at once.
    output.with_suffix("").mkdir(parents=True, exist_ok=True)
    models = load_source(dataclasses.replace(source, clip_skip=config.clip_skip or source.clip_skip))
    place(models, device, dtype)
    return make_preview(
        models,
        prompts,
        output=output,
        seeds=range(config.seed, config.seed + config.num_per_prompt),
        guidance_scales=config.guidance_scale,
        negative_prompt=config.negative_prompt,
        side=config.resolution or models.facts.resolution,
        steps=config.num_inference_steps,
        batch_size=config.sample_batch_size,
        device=device,
        dtype=dtype,
    )


def _unused(model: Path) -> Path:
    """A grid beside the model that replaces none; of a model without a folder of its own here in the current one."""
    model = model.absolute() if model.exists() else Path(model.name)
    ends = itertools.chain([""], (f"-{number}" for number in itertools.count(1)))
    paths = (model.with_name(f"{model.name}-preview{end}.png") for end in ends)
    return next(path for path in paths if not path.exists())


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one on each line; empty lines do not count."""
    if not path.is_file():
        raise DbkitError(f"there is no prompts file {path}; check the path")
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DbkitError(f"{path} is not UTF-8 text; save it again as UTF-8") from error
    if not prompts:
        raise DbkitError(f"{path} holds no prompt; write one on each line")
    return prompts


def make_preview(
    models: Models,
    prompts: Sequence[str],
    *,
    output: Path,
    seeds: Sequence[int],
    guidance_scales: Sequence[float] = (7.5,),
    negative_prompt: str = "",
    side: int,
    steps: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Preview:
    """Sample models in memory; with several guidance scales all columns share the first seed."""
    from tqdm import tqdm

    columns = (
        [(seeds[0], scale) for scale in guidance_scales]
        if len(guidance_scales) > 1
        else [(seed, guidance_scales[0]) for seed in seeds]
    )
    # Column by column, so that pictures of one guidance scale follow one another and share a batch.
    cells = [(row, seed, scale) for seed, scale in columns for row in range(len(prompts))]
    shots = [Shot(prompts[row], draws.generator(seed, "preview"), scale, negative_prompt) for row, seed, scale in cells]
    with borrowed(models, device):
        drawn = sample(models, shots, (side, side), steps, batch_size, dtype)
        pictures = list(tqdm(drawn, "preview", len(shots), file=sys.stdout, mininterval=1, leave=False))
    paths = [single_picture(output, row, prompts[row], seed, scale) for row, seed, scale in cells]
    for path, picture in zip(paths, pictures):
        _save(path, picture)
    by_row = [pictures[row :: len(prompts)] for row in range(len(prompts))]
    heads = [f"seed {seed}, guidance {scale:g}" for seed, scale in columns]
    _save(output, labelled_grid(by_row, prompts, heads))
    return Preview(output, paths)


def single_picture(grid: Path, row: int, prompt: str, seed: int, guidance_scale: float) -> Path:
    """Where one picture of a grid is: in the folder of the grid's name without the suffix. Rows count from 0."""
    # 48 characters of four bytes each still fit into the 255 bytes that a name may have.
    name = f"{row + 1:02d}-{safe_name(prompt, 48)}-seed{seed}-guidance{guidance_scale:g}.png"
    return grid.with_suffix("") / name


def _save(path: Path, picture: Image.Image) -> None:
    with whole_file(path) as partial:
        picture.save(partial, "PNG")


def labelled_grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], heads: Sequence[str]) -> Image.Image:
    """One picture of rows of equally large pictures, each row under its label, the columns under their heads.

    Small pictures are enlarged by a whole number without smoothing, so that what the model drew is what is seen.
    """
    from PIL import Image, ImageDraw, ImageFont

    side = rows[0][0].width
    zoom = max(1, -(-160 // side))
    cell, gap, size = side * zoom, 8, 15
    font = ImageFont.load_default(size)
    width = gap + len(heads) * (cell + gap)
    wrapped = [textwrap.wrap(label, max(12, width // 8)) or [""] for label in labels]
    top = size + 2 * gap
    height = top + sum(len(lines) * (size + 4) + gap + cell + gap for lines in wrapped)
    grid = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(grid)
    for column, head in enumerate(heads):
        pen.text((gap + column * (cell + gap), gap), head, fill="dimgray", font=font)
    y = top
    for lines, pictures in zip(wrapped, rows):
        for line in lines:
            pen.text((gap, y), line, fill="black", font=font)
            y += size + 4
        y += gap
        for column, picture in enumerate(pictures):
            grid.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (gap + column * (cell + gap), y))
        y += cell + gap
    return grid
