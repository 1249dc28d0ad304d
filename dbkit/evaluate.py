"""evaluate(): how well a subject or style was learnt, and what it cost, in figures and in the pictures they come from.

Subject and prompt fidelity and the class's likeness to the subject are measured as in the DreamBooth paper
(arXiv:2208.12242, section 4: DINO, CLIP-I, CLIP-T, PRES). No single figure says that a training was good: the best
likeness is that of a model that can draw nothing else.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import draws, embedded
from dbkit.captions import read_caption
from dbkit.config import EvaluateConfig
from dbkit.errors import DbkitError
from dbkit.files import whole_file
from dbkit.images import as_html, list_images, read_image, render
from dbkit.libraries import choose_device, choose_dtype, hub_options, loading
from dbkit.lora import Source, find_source, load_source
from dbkit.models import check_resolution, model_facts
from dbkit.preview import labelled_grid
from dbkit.run_folder import run_settings
from dbkit.sampling import Shot, place, sample
from dbkit.settings import configured_by, replace
from dbkit.tokenizer import clip_tokenizer

if TYPE_CHECKING:
    import torch
    from PIL import Image

    Pictures = Sequence[Image.Image]

# Where the subject is asked for when no prompts are given.
PLACES = ("on the beach", "in the snow", "in the city", "in the forest", "under water", "in space")


@dataclass(frozen=True)
class Figures:
    """What was measured of one model. All are means; similarities are cosines, 1 for the same picture.

    prompt_match needs two different prompts, the figures of the class a class prompt; otherwise they are None.
    """

    subject_fidelity: float
    subject_fidelity_clip: float
    prompt_fidelity: float
    prompt_match: float | None
    class_leak: float | None
    class_diversity: float | None


# Each figure, the paper's name for it, and how to read it.
_MEANINGS = {
    "subject_fidelity": ("DINO", "likeness of the samples to the instance images; higher is closer"),
    "subject_fidelity_clip": ("CLIP-I", "the same by CLIP, which looks at kinds more than at individuals"),
    "prompt_fidelity": ("CLIP-T", "agreement of the samples with their prompts; higher is better"),
    "prompt_match": ("", "share of the samples that fit their own prompt best among all prompts"),
    "class_leak": ("PRES", "drift: likeness of class samples to the instance images; should stay as in the base"),
    "class_diversity": ("", "drift: mean DINO distance between class samples; should stay as in the base"),
}


@dataclass(frozen=True)
class Evaluation:
    """The figures of the base model and of the trained one, and a grid of pictures that they were read from.

    Shows both in a notebook.
    """

    base: Figures
    model: Figures
    grid: Path

    def __str__(self) -> str:
        rows = [f"{'':21}  {'':6}  {'base':>6}  {'model':>6}"]
        for field in fields(Figures):
            before, after = getattr(self.base, field.name), getattr(self.model, field.name)
            name, meaning = _MEANINGS[field.name]
            if before is not None:
                rows.append(f"{field.name:21}  {name:6}  {before:6.3f}  {after:6.3f}  {meaning}")
        return "\n".join([*rows, f"before and after: {self.grid}"])

    def _repr_html_(self) -> str:
        grid = as_html(self.grid, 2048, "before and after")
        return f"<pre>{html.escape(str(self))}</pre>{grid}"


@configured_by(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> Evaluation:
    """Sample the trained model and its base with the same prompts and noise, and compare both with the instance images.

    What is left empty is read from the settings.yaml of the run that the model lies in. Raises DbkitError when there is
    nothing to compare with.
    """
    trained = find_source(config.model)
    facts = model_facts(trained.pretrained_model_name_or_path)
    if facts is None:
        raise DbkitError(f"there is no model folder {config.model}; give a run's model/ or one of its checkpoints")
    run = run_settings(config.model)
    config = _completed(config, run)
    model_facts(config.pretrained_model_name_or_path)
    side = config.resolution or facts.resolution
    check_resolution(side, facts)
    device = choose_device(config.device)
    dtype = choose_dtype(config.mixed_precision, device)
    output = _grid_path(config)
    paths = _instance_images(config.instance_data_dir)
    prompts = list(config.prompt) or _default_prompts(config, run, paths)
    instance = [render(read_image(path), (side, side)) for path in paths]

    clip_name, dino_name = judges_of(trained.pretrained_model_name_or_path)
    clip, dino = Clip(config.clip or clip_name, device), Dino(config.dino or dino_name, device)
    # CLIP has never heard of the identifier: its text names the class alone.
    texts = [without_identifier(prompt, config.instance_prompt, config.class_prompt) for prompt in prompts]
    origin = {name: run.get(name) for name in ("revision", "tokenizer_name", "clip_skip")}
    untrained = Source(config.pretrained_model_name_or_path, **origin)
    pictures = [_samples(config, prompts, side, device, dtype, source) for source in (untrained, trained)]
    base, model = (_measure(drawn, instance, texts, clip, dino) for drawn in pictures)
    _save_grid(output, prompts, pictures, config)
    return Evaluation(base, model, output)


def judges_of(model: str | Path) -> tuple[str | Path, str | Path]:
    """The CLIP and the image encoder that judge a model's pictures: the small ones for the embedded model."""
    if embedded.is_embedded(model):
        return embedded.CLIP, embedded.DINO
    return "openai/clip-vit-base-patch32", "facebook/dino-vits16"


def _completed(config: EvaluateConfig, run: dict[str, Any]) -> EvaluateConfig:
    """The settings with the gaps filled from the run's own."""
    names = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "class_prompt", "guidance_scale")
    config = replace(config, **{name: run[name] for name in names if getattr(config, name) is None and run.get(name)})
    needed = [name for name in names[:2] if getattr(config, name) is None]
    if needed:
        raise DbkitError(
            f"{' and '.join(needed)} cannot be read from a run's settings.yaml beside {config.model}; give "
            f"{'them' if len(needed) > 1 else 'it'}"
        )
    return config


def _grid_path(config: EvaluateConfig) -> Path:
    model = config.model.absolute()
    output = config.output or model.parent / f"{model.name}-evaluation.png"
    if output.suffix.lower() != ".png" or output.is_dir():
        raise DbkitError(f"output is {output}; give the grid the name of a file that ends in .png")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def _instance_images(folder: Path) -> list[Path]:
    paths = list_images(folder) if folder.is_dir() else []
    if not paths:
        raise DbkitError(f"there are no images in instance_data_dir {folder}; name the folder that was trained on")
    return paths


def _default_prompts(config: EvaluateConfig, run: dict[str, Any], paths: list[Path]) -> list[str]:
    """The subject in six places, or what the first six images were trained with natively."""
    if config.instance_prompt:
        return [f"{config.instance_prompt} {place}" for place in PLACES]
    labels = [path.stem if run.get("use_filename_as_label") else read_caption(path) for path in paths]
    captions = list(dict.fromkeys(filter(None, labels)))[: len(PLACES)]
    if not captions:
        raise DbkitError(
            f"there is no instance_prompt and no caption in {config.instance_data_dir}; give a prompt to sample"
        )
    return captions


def own_words(instance_prompt: str | None, class_prompt: str | None) -> set[str]:
    """The words that only the instance prompt has: the identifier, where there is a class prompt."""
    return set((instance_prompt or "").split()) - set((class_prompt or "").split())


def without_identifier(prompt: str, instance_prompt: str | None, class_prompt: str | None) -> str:
    """The prompt with the class where the subject was, and without the words that only the instance prompt has."""
    if not instance_prompt or not class_prompt:
        return prompt
    identifier = own_words(instance_prompt, class_prompt)
    text = prompt.replace(instance_prompt, class_prompt)
    return " ".join(word for word in text.split() if word not in identifier)


def _samples(
    config: EvaluateConfig,
    prompts: list[str],
    side: int,
    device: torch.device,
    dtype: torch.dtype,
    source: Source,
) -> tuple[Pictures, Pictures]:
    """Pictures of the prompts, num_per_prompt of each in turn, and of the class prompt, as many as of all prompts."""
    from tqdm import tqdm

    models = load_source(source)
    place(models, device, dtype)
    wanted = [(prompt, number) for prompt in prompts for number in range(config.num_per_prompt)]
    count = len(wanted)
    wanted += [(config.class_prompt, number) for number in range(count)] if config.class_prompt else []
    guidance_scale = 7.5 if config.guidance_scale is None else config.guidance_scale
    shots = [Shot(prompt, draws.generator(config.seed, "preview", sample=n), guidance_scale) for prompt, n in wanted]
    drawn = sample(models, shots, (side, side), config.num_inference_steps, config.sample_batch_size, dtype)
    label = f"samples of {Path(source.lora or source.pretrained_model_name_or_path).name}"
    pictures = list(tqdm(drawn, label, len(shots), file=sys.stdout, mininterval=1, leave=False))
    return pictures[:count], pictures[count:]


def _measure(drawn: tuple[Pictures, Pictures], instance: Pictures, texts: list[str], clip: Clip, dino: Dino) -> Figures:
    """The figures of as many samples for each text, in the order of the texts, and of the class samples, if any."""
    import torch

    samples, class_samples = drawn
    subject = dino(instance)
    seen = clip(samples)
    # Prompts that differ in the identifier alone are one text: none of them could be told from the other.
    distinct = list(dict.fromkeys(texts))
    own = torch.tensor([distinct.index(text) for text in texts for _ in range(len(samples) // len(texts))])
    agreement = (seen @ clip.texts(distinct).T).cpu()
    matched = (agreement.argmax(1) == own).float().mean()
    leak = diversity = None
    if class_samples:
        features = dino(class_samples)
        leak = float((features @ subject.T).mean())
        pairs = torch.triu_indices(len(features), len(features), 1)
        diversity = float(1 - (features @ features.T)[pairs[0], pairs[1]].mean()) if pairs.numel() else None
    return Figures(
        subject_fidelity=float((dino(samples) @ subject.T).mean()),
        subject_fidelity_clip=float((seen @ clip(instance).T).mean()),
        prompt_fidelity=float(agreement.gather(1, own[:, None]).mean()),
        prompt_match=float(matched) if len(distinct) > 1 else None,
        class_leak=leak,
        class_diversity=diversity,
    )


class Dino:
    """Unit feature vectors of pictures by an image encoder of DINO's kind: its class token (arXiv:2104.14294)."""

    def __init__(self, name: str | Path, device: torch.device):
        with loading(name):
            from transformers import AutoImageProcessor, AutoModel

            self.options = {} if Path(name).is_dir() else hub_options(str(name), "config.json")
            self.processor = AutoImageProcessor.from_pretrained(name, **self.options)
            # Always fp32: the versions of transformers differ in the type they load, and figures must not.
            self.model = AutoModel.from_pretrained(name, **self.options).float().to(device).eval()
        self._check(name)

    def _check(self, name: str | Path) -> None:
        if hasattr(self.model, "text_projection") or not hasattr(self.model, "embeddings"):
            raise DbkitError(f"dino {name} is not an image encoder of DINO's kind; give one, or leave dino empty")

    def __call__(self, pictures: Pictures) -> torch.Tensor:
        return self._unit(pictures, lambda pixels: self.model(pixel_values=pixels).last_hidden_state[:, 0])

    def _unit(self, pictures: Pictures, features: Any) -> torch.Tensor:
        """(N, D) for N pictures, 64 at a time."""
        import torch

        parts = []
        for first in range(0, len(pictures), 64):
            pixels = self.processor(images=list(pictures[first : first + 64]), return_tensors="pt").pixel_values
            with torch.no_grad():
                parts.append(torch.nn.functional.normalize(features(pixels.to(self.model.device)), dim=-1))
        return torch.cat(parts)


class Clip(Dino):
    """Unit feature vectors of pictures and texts in CLIP's common space (arXiv:2103.00020)."""

    def __init__(self, name: str | Path, device: torch.device):
        super().__init__(name, device)
        with loading(name):
            self.tokenizer = clip_tokenizer(name, **self.options)

    def _check(self, name: str | Path) -> None:
        if not hasattr(self.model, "text_projection"):
            raise DbkitError(f"clip {name} is not a CLIP model; give one, or leave clip empty")

    def __call__(self, pictures: Pictures) -> torch.Tensor:
        # The projections are applied here because what get_image_features() returns differs between versions.
        vision, project = self.model.vision_model, self.model.visual_projection
        return self._unit(pictures, lambda pixels: project(vision(pixel_values=pixels).pooler_output))

    def texts(self, prompts: list[str]) -> torch.Tensor:
        """(N, D) for N texts, cut at what the model reads."""
        import torch

        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            pooled = self.model.text_model(**tokens.to(self.model.device)).pooler_output
            return torch.nn.functional.normalize(self.model.text_projection(pooled), dim=-1)


def _save_grid(
    output: Path, prompts: list[str], pictures: list[tuple[Pictures, Pictures]], config: EvaluateConfig
) -> None:
    """Each prompt a row: at most four pictures before, and of the same noise after."""
    count, shown = config.num_per_prompt, min(4, config.num_per_prompt)
    rows = [[drawn[row * count + n] for drawn, _ in pictures for n in range(shown)] for row in range(len(prompts))]
    labels = list(prompts)
    if config.class_prompt:
        rows.append([class_drawn[n] for _, class_drawn in pictures for n in range(shown)])
        labels.append(config.class_prompt)
    with whole_file(output) as partial:
        labelled_grid(rows, labels, ["before"] * shown + ["after"] * shown).save(partial, "PNG")
