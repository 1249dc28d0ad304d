"""Every setting once: name, type, default, help and range. Flags, YAML, forms and the docs are read from here.

Those of training are in train_config.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dbkit.settings import Settings, setting, with_auto
from dbkit.train_config import CLIP_SKIP, DEVICES, PRECISIONS, TrainConfig

FRAMINGS = Literal["center", "random", "face", "none"]
# What the doctor finds in an image or caption that may harm, and that only the user can judge.
DOUBTS = Literal[
    "small", "blurred", "near-duplicate", "overexposed", "underexposed", "text", "border", "extreme aspect", "caption"
]


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """Turn a folder of photographs into training-ready images, and say what is wrong with them."""

    source: Path = setting(..., "folder or .zip with your photographs; it is never changed", positional=True)
    destination: Path = setting(..., "folder for the prepared images, their captions and report.json", positional=True)
    resolution: int = setting(512, "side of the prepared square images, in pixels", min=8, max=4096)
    framing: FRAMINGS = setting(
        "center",
        "where the largest square is cut: around the centre; at a random place, the same at every run; around the largest face (needs OpenCV); none: the whole image is kept, for training with use_aspect_ratio_bucket",
    )
    method: Literal["dreambooth", "native"] = setting(
        "dreambooth", "what the images are for: dreambooth, a subject; native, a style, where each needs a caption"
    )
    leave_out: tuple[DOUBTS, ...] = setting(
        (), "kinds of doubtful images that are left out; the others are kept and reported", advanced=True
    )
    look_for_text: bool = setting(
        True, "read text and watermarks where rapidocr is installed; about a second an image", advanced=True
    )
    head_crops: bool = setting(
        False, "where a face is found, add a square of the head as an extra image (needs OpenCV)", advanced=True
    )
    background_caption: str | None = setting(
        None,
        "where a face is found, add the largest square beside it with this caption, for instance: photo of a room; empty: none (needs OpenCV)",
        advanced=True,
    )
    default_caption: str | None = setting(
        None, "caption written beside each image that comes without one, for instance: photo of ohwx dog"
    )
    pretrained_model_name_or_path: str | None = setting(
        None, "the base model, whose tokenizer counts the tokens of captions; empty: they are not counted"
    )
    class_data_dir: Path | None = setting(
        None, "folder with class images of your own, to see that none of them shows the subject", advanced=True
    )
    seed: int = setting(0, "decides the random places", min=0, max=2**63 - 1, advanced=True)


CAPTIONERS = Literal["blip", "tagger", "none"]


@dataclass(frozen=True)
class CaptionConfig(Settings):
    """Write a caption beside each image: a sentence by BLIP, or tags by a Danbooru-style tagger."""

    folder: Path = setting(..., "folder with the images, for instance one that prepare made", positional=True)
    captioner: CAPTIONERS = setting(
        "blip", "blip: a sentence, for photographs; tagger: Danbooru tags, for drawings; none: nothing is written"
    )
    existing: Literal["keep", "append", "prepend", "replace"] = setting(
        "keep",
        "what happens to a text that is there: nothing, the new one goes after it, before it, or in its place; the same settings never write into one text twice",
        needs="captioner",
    )
    prefix: str = setting("", "text before each new caption, for instance: photo of ohwx dog", needs="captioner")
    model: str | None = setting(
        None,
        "folder or Hugging Face id of another model of that kind (a tagger has model.onnx and selected_tags.csv); empty: a pinned one",
        advanced=True,
        needs="captioner",
    )
    batch_size: int = setting(8, "images captioned at once", min=1, max=256, advanced=True, needs="captioner")
    max_new_tokens: int = setting(
        30, "longest sentence of BLIP, in its tokens", min=1, max=75, advanced=True, needs="captioner=blip"
    )
    num_beams: int = setting(
        3,
        "beams of BLIP's search; more is slower and more careful",
        min=1,
        max=16,
        advanced=True,
        needs="captioner=blip",
    )
    threshold: float = setting(
        0.35, "the tagger keeps tags that are at least so probable", min=0, max=1, needs="captioner=tagger"
    )
    blacklist: tuple[str, ...] = setting(
        (),
        "tags that are never written, with spaces or underscores; several may stand in one text, with commas between",
        advanced=True,
        needs="captioner=tagger",
    )
    underscores: bool = setting(
        False,
        "keep the underscores of tags; off: long_hair becomes long hair; emoticons such as ^_^ keep theirs",
        advanced=True,
        needs="captioner=tagger",
    )
    escape: bool = setting(
        False,
        "write brackets in tags as \\( and \\), as user interfaces want them in prompts; training wants them plain",
        advanced=True,
        needs="captioner=tagger",
    )
    device: DEVICES = setting(
        "auto", "where to compute: auto takes a GPU if there is one", advanced=True, needs="captioner"
    )


@dataclass(frozen=True)
class IdentifierConfig(Settings):
    """Look at an identifier, the rare word that will mean the subject, as the base model's tokenizer reads it."""

    instance_prompt: str = setting(..., "for instance: photo of ohwx dog", positional=True)
    class_prompt: str | None = setting(None, "the same without the identifier, for instance: photo of a dog")
    pretrained_model_name_or_path: str | None = setting(
        None, "the base model: a diffusers folder or a Hugging Face id; empty: the tokenizer of Stable Diffusion 1"
    )


@dataclass(frozen=True)
class ClassImagesConfig(Settings):
    """Generate images of the class with the base model, for prior preservation."""

    pretrained_model_name_or_path: str = setting(..., "the base model: a diffusers folder or a Hugging Face id")
    class_prompt: str = setting(..., "the prompt of the class, without the identifier, for instance: photo of a dog")
    class_data_dir: Path | None = setting(
        None,
        "folder of the class images; empty: class_images/KEY in the workspace, one folder for each model and prompt",
    )
    num_class_images: int = setting(100, "how many class images there should be; missing ones are generated", min=1)
    resolution: int = setting(512, "side of the generated images, in pixels", min=8, max=4096)
    width: int | None = setting(None, "width, where the images are not square", min=8, max=4096, advanced=True)
    height: int | None = setting(None, "height, where the images are not square", min=8, max=4096, advanced=True)
    sample_batch_size: int = setting(4, "images generated at once", min=1, max=256)
    negative_prompt: str = setting("", "what the class images should not show")
    guidance_scale: float = setting(7.5, "classifier-free guidance (arXiv:2207.12598); 1 is off", min=1, max=50)
    num_inference_steps: int = setting(25, "denoising steps for each image", min=1, max=1000)
    seed: int = setting(0, "image i is drawn from a generator keyed by (seed, i)", min=0, max=2**63 - 1)
    revision: str | None = setting(None, "branch, tag or commit of a Hugging Face model", advanced=True)
    clip_skip: int | None = setting(None, CLIP_SKIP, min=1, max=12, advanced=True)
    mixed_precision: PRECISIONS = setting(
        "auto", "arithmetic: auto takes bf16 or fp16 where the GPU is good at it", advanced=True
    )
    device: DEVICES = setting("auto", "where to compute: auto takes a GPU if there is one", advanced=True)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the generated images."""
        return self.width or self.resolution, self.height or self.resolution


@with_auto
@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Say what a training needs before anything is loaded: memory, disk and time, and what to change where it will not fit."""


@dataclass(frozen=True)
class PreviewConfig(Settings):
    """Sample a model: every prompt with every seed (or guidance scale), as single pictures and a labelled grid."""

    model: Path = setting(
        ..., "a run's model/, one of its checkpoints/, or a base model: a diffusers folder", positional=True
    )
    prompt: tuple[str, ...] = setting(
        (), "prompts, one for each row of the grid; on the command line give the flag once for each"
    )
    prompts_file: Path | None = setting(None, "text file with one prompt on each line, added to prompt")
    output: Path | None = setting(
        None,
        "the grid, in place of an earlier one of that name; single pictures go in a folder of the same name beside it; empty: a new one beside the model",
    )
    negative_prompt: str = setting("", "what the pictures should not show")
    seed: int = setting(42, "seed of the first column", min=0, max=2**63 - 1)
    num_per_prompt: int = setting(4, "columns: pictures for each prompt, with seeds counting up", min=1, max=64)
    guidance_scale: tuple[float, ...] = setting(
        (7.5,),
        "classifier-free guidance; several values, as in 3,7.5,12, make the columns, with one seed, which shows overfitting",
        min=1,
        max=50,
    )
    num_inference_steps: int = setting(25, "denoising steps for each picture", min=1, max=1000)
    resolution: int | None = setting(None, "side of the pictures, in pixels; empty: the model's own", min=8, max=4096)
    lora: Path | None = setting(
        None,
        "a LoRA to put on model: a .safetensors file, or a run's model/; a LoRA run's own model/ needs only be given as model",
    )
    clip_skip: int | None = setting(None, CLIP_SKIP, min=1, max=12, advanced=True)
    sample_batch_size: int = setting(4, "pictures made at once", min=1, max=256, advanced=True)
    mixed_precision: PRECISIONS = setting(
        "auto", "arithmetic: auto takes bf16 or fp16 where the GPU is good at it", advanced=True
    )
    device: DEVICES = setting("auto", "where to compute: auto takes a GPU if there is one", advanced=True)

    def contradictions(self) -> list[str]:
        """Sentences about settings that do not go together."""
        if not self.prompt and not self.prompts_file:
            return ["prompt is missing: say what the pictures should show"]
        if not self.guidance_scale:
            return ["guidance_scale is empty; give at least one value"]
        return []


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Measure a trained model against its base: subject fidelity, prompt fidelity and drift, with pictures before and after."""

    model: Path = setting(..., "the trained model: a run's model/ or one of its checkpoints/", positional=True)
    prompt: tuple[str, ...] = setting(
        (),
        "prompts to sample; empty: the instance prompt in six places, or the first six captions; on the command line give the flag once for each",
    )
    num_per_prompt: int = setting(4, "pictures for each prompt; figures of few pictures are rough", min=1, max=64)
    output: Path | None = setting(None, "the grid of before and after; empty: beside the model")
    pretrained_model_name_or_path: str | None = setting(None, "the base model; empty: that of the run's settings.yaml")
    instance_data_dir: Path | None = setting(
        None, "the images that were learnt; empty: those of the run's settings.yaml"
    )
    instance_prompt: str | None = setting(None, "prompt with the identifier; empty: that of the run's settings.yaml")
    class_prompt: str | None = setting(
        None, "prompt of the class, of which the drift is measured; empty: that of the run's settings.yaml"
    )
    seed: int = setting(42, "seed of the pictures, the same before and after", min=0, max=2**63 - 1)
    guidance_scale: float | None = setting(
        None,
        "classifier-free guidance (arXiv:2207.12598); 1 is off; empty: that of the run's settings.yaml, or 7.5",
        min=1,
        max=50,
    )
    num_inference_steps: int = setting(25, "denoising steps for each picture", min=1, max=1000)
    resolution: int | None = setting(None, "side of the pictures, in pixels; empty: the model's own", min=8, max=4096)
    clip: str | None = setting(
        None,
        "CLIP model, folder or Hugging Face id; empty: openai/clip-vit-base-patch32, or the embedded model's own",
        advanced=True,
    )
    dino: str | None = setting(
        None,
        "DINO model, folder or Hugging Face id; empty: facebook/dino-vits16, or the embedded model's own",
        advanced=True,
    )
    sample_batch_size: int = setting(4, "pictures made at once", min=1, max=256, advanced=True)
    mixed_precision: PRECISIONS = setting(
        "auto", "arithmetic: auto takes bf16 or fp16 where the GPU is good at it", advanced=True
    )
    device: DEVICES = setting("auto", "where to compute: auto takes a GPU if there is one", advanced=True)


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """Turn an original Stable Diffusion file into a diffusers folder, or a folder into a file that user interfaces load; or rename a LoRA's layers."""

    source: str = setting(
        ...,
        "a .safetensors or .ckpt file, a diffusers folder, or the .safetensors file of a LoRA (under kohya's names or diffusers'): a path, a Hugging Face id (owner/name, or owner/name/FILE), or the https address of a file",
        positional=True,
    )
    destination: Path = setting(
        ...,
        "the folder to make, or the .safetensors or .ckpt file; of a LoRA a .safetensors file, under the other names",
        positional=True,
    )
    save_precision: Literal["fp16", "bf16", "fp32"] | None = setting(
        None,
        "precision of the weights on disk; fp16 is half the size of fp32 and makes the same pictures; empty: as it is (the models that train saves are fp16)",
    )
    overwrite: bool = setting(False, "replace the destination if it exists")
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = setting(
        "auto",
        "what the model predicts; auto: what the folder, the file or the .yaml beside it says, and epsilon for Stable Diffusion 1",
    )
    pretrained_vae_name_or_path: str | None = setting(
        None,
        "a VAE that takes the place of the one inside: a .safetensors, .ckpt or .vae.pt file, a diffusers folder, a Hugging Face id or the address of a file",
        advanced=True,
    )
    sha256: str | None = setting(
        None,
        "the SHA-256 of the source's file, which is compared; civitai, for instance, shows it under the hashes (what the Hugging Face Hub states of its files is compared anyway)",
        advanced=True,
    )
    extract_ema: bool = setting(
        False,
        "take the moving average (EMA) of the U-Net's weights from a file that holds both; off: the weights that user interfaces load",
        advanced=True,
    )
    tokenizer_name: str | None = setting(
        None,
        "tokenizer folder or Hugging Face id for a file that does not carry one; empty: CLIP's, which these models have",
        advanced=True,
    )
    license: str | None = setting(
        None, "licence to note in a file, as creativeml-openrail-m: that of the base model goes on", advanced=True
    )
    push_to_hub: bool = setting(
        False,
        "upload the file to the Hugging Face Hub; its token comes from `hf auth login`, HF_TOKEN, or on Colab the secret of that name",
        advanced=True,
    )
    hub_token: str | None = setting(
        None,
        "token of the upload, if not the one that is logged in; it is never saved",
        advanced=True,
        secret=True,
        needs="push_to_hub",
    )
    hub_model_id: str | None = setting(
        None,
        "repository of the upload, owner/name or name; empty: the file's name",
        advanced=True,
        needs="push_to_hub",
    )
    hub_private: bool = setting(
        True, "only you see the upload; off: everyone sees it", advanced=True, needs="push_to_hub"
    )
    download: bool = setting(False, "on Colab: also hand the file to your browser, which downloads it", advanced=True)

    def contradictions(self) -> list[str]:
        """Sentences about settings that do not go together."""
        if self.sha256 and not re.fullmatch("[0-9a-fA-F]{64}", self.sha256):
            return [f"sha256 is {self.sha256!r}; write its 64 digits, which are 0 to 9 and a to f"]
        return []


@dataclass(frozen=True)
class MergeConfig(Settings):
    """Put a LoRA into its base model for good: a whole diffusers folder, which needs no LoRA any more."""

    lora: Path = setting(..., "a LoRA: a .safetensors file, or the model/ of a run with adapter lora", positional=True)
    destination: Path = setting(..., "the diffusers folder to make", positional=True)
    overwrite: bool = setting(False, "replace the destination if it is a model folder")
    pretrained_model_name_or_path: str | None = setting(
        None, "the base model: a diffusers folder or a Hugging Face id; empty: the one that a run's LoRA was trained on"
    )
    scale: float = setting(1.0, "how much of the LoRA: 1 is all, 0.5 is half, below 0 is its opposite", min=-10, max=10)
    save_precision: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16", "precision of the weights on disk; the sum itself is made in fp32", advanced=True
    )


@dataclass(frozen=True)
class ExtractLoraConfig(Settings):
    """Take the LoRA nearest to what a training changed out of a whole model: a small file that goes with the base."""

    model: Path = setting(
        ..., "the trained model: a run's model/, one of its checkpoints/, or a diffusers folder", positional=True
    )
    destination: Path = setting(..., "the .safetensors file to make", positional=True)
    overwrite: bool = setting(False, "replace the destination if it exists")
    pretrained_model_name_or_path: str | None = setting(
        None,
        "the model that it was trained from: a diffusers folder or a Hugging Face id; empty: that of the run's settings.yaml",
    )
    rank: int = setting(
        32, "size of the LoRA: a higher rank keeps more of the difference in a larger file", min=1, max=1024
    )
    lora_modules: Literal["attention", "transformer", "all"] = setting(
        "transformer",
        "which layers get an adapter: those of attention, all of the transformer blocks, or these and the convolutions",
        advanced=True,
    )
    save_precision: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16", "precision of the weights on disk; what they are taken from is computed in fp32", advanced=True
    )


@dataclass(frozen=True)
class StatusConfig(Settings):
    """Say how far a run is and what of it is safe, from its files alone, while it trains or later."""

    run: Path | None = setting(
        None, "folder of the run; empty: the run of the workspace that was worked on last", positional=True
    )
    verify: bool = setting(
        False, "compare the SHA-256 of every saved file; off: only look whether all are there in the right size"
    )


@dataclass(frozen=True)
class WatchConfig(Settings):
    """Show how a run goes on while it trains, here or in another notebook or terminal, from its files alone."""

    run: Path | None = setting(
        None, "folder of the run; empty: the run of the workspace that was worked on last", positional=True
    )
    every_seconds: float = setting(2.0, "seconds between two looks", min=1, max=3600)


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Teach the embedded model a subject: prepare, class images, train, pictures before and after, convert."""

    folder: Path | None = setting(None, "where everything goes; empty: demo in the workspace")
    max_train_steps: int | None = setting(None, "optimizer steps of the training; empty: what suits the model", min=1)


COMMANDS: dict[str, type[Settings]] = {
    "prepare": PrepareConfig,
    "caption": CaptionConfig,
    "identifier": IdentifierConfig,
    "class-images": ClassImagesConfig,
    "plan": PlanConfig,
    "train": TrainConfig,
    "preview": PreviewConfig,
    "evaluate": EvaluateConfig,
    "merge": MergeConfig,
    "extract-lora": ExtractLoraConfig,
    "convert": ConvertConfig,
    "status": StatusConfig,
    "watch": WatchConfig,
    "demo": DemoConfig,
}
