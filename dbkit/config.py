"""Every setting once: name, type, default, help and range. Flags, YAML, forms and the docs are read from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dbkit.settings import Settings, setting, waiting


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """Turn a folder of photographs into training-ready images of one size."""

    source: Path = setting(..., "folder or .zip with your photographs; it is never changed", positional=True)
    destination: Path = setting(..., "folder for the prepared images, their captions and report.json", positional=True)
    resolution: int = setting(512, "side of the prepared square images, in pixels", min=8, max=4096)
    center_crop: bool = setting(
        True, "crop around the centre; off: a random place, the same at every run with one seed"
    )
    seed: int = setting(0, "decides the random crop places", min=0, max=2**63 - 1)
    default_caption: str | None = setting(
        None, "caption written beside each image that comes without one, for instance: photo of zwx dog"
    )


SCHEDULERS = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
PRECISIONS = Literal["auto", "no", "fp16", "bf16"]
DEVICES = Literal["auto", "cuda", "mps", "cpu"]


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
    sample_batch_size: int = setting(4, "images generated at once", min=1, max=256)
    negative_prompt: str = setting("", "what the class images should not show")
    guidance_scale: float = setting(7.5, "classifier-free guidance (arXiv:2207.12598); 1 is off", min=1, max=50)
    num_inference_steps: int = setting(25, "denoising steps for each image", min=1, max=1000)
    seed: int = setting(0, "image i is drawn from a generator keyed by (seed, i)", min=0, max=2**63 - 1)
    revision: str | None = setting(None, "branch, tag or commit of a Hugging Face model", advanced=True)
    mixed_precision: PRECISIONS = setting(
        "auto", "arithmetic: auto takes bf16 or fp16 where the GPU is good at it", advanced=True
    )
    device: DEVICES = setting("auto", "where to compute: auto takes a GPU if there is one", advanced=True)


LATER = "later version of dbkit"


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Teach Stable Diffusion a subject (DreamBooth, arXiv:2208.12242) or a style (native training)."""

    pretrained_model_name_or_path: str = setting(
        ...,
        "the base model: a diffusers folder (notebook 2 makes one from a checkpoint file), a Hugging Face id, or tiny-sd, which dbkit carries",
    )
    instance_data_dir: Path = setting(..., "folder with the images to learn")
    output_dir: Path | None = setting(
        None,
        "folder of this run; started again, a run continues from it; empty: runs/dreambooth or runs/native in the workspace",
    )
    instance_prompt: str | None = setting(
        None, "prompt for every instance image: a rare word and the class, for instance: photo of zwx dog", fixed=True
    )
    with_prior_preservation: bool = setting(
        False,
        "DreamBooth: also train on images of the class, so that the class stays what it was; off: native training",
        fixed=True,
    )
    class_prompt: str | None = setting(
        None, "prompt of the class images, without the identifier: photo of a dog", fixed=True
    )
    class_data_dir: Path | None = setting(
        None,
        "folder of the class images; empty: class_images/KEY in the workspace; missing ones are generated",
        advanced=True,
    )
    num_class_images: int = setting(100, "how many class images there should be; missing ones are generated", min=1)
    prior_loss_weight: float = setting(
        1.0,
        "weight of the class images in the loss; lower protects the class less and learns the subject faster",
        min=0,
        max=100,
        fixed=True,
        advanced=True,
    )
    use_txt_as_label: bool = setting(
        False, "each image's prompt is the .txt file of its name (dog.txt or dog.png.txt)", fixed=True
    )
    use_filename_as_label: bool = setting(
        False, "each image's prompt is its file name without the suffix", fixed=True, advanced=True
    )
    resolution: int = setting(
        512,
        "side of the training images, in pixels; images of another size are cropped and resized",
        min=8,
        max=4096,
        fixed=True,
    )
    center_crop: bool = setting(
        True,
        "crop around the centre; the usual default, off, cuts heads; off: a random place for each image, fixed by the seed",
        fixed=True,
        advanced=True,
    )
    train_text_encoder: bool = setting(
        False, "also train the text encoder: better likeness, more memory, easier to overdo", fixed=True
    )
    num_train_epochs: int = setting(
        100,
        "passes over the instance images when max_train_steps is empty: the rule of thumb of 100 steps an image; one epoch of ten images would teach nothing",
        min=1,
        advanced=True,
    )
    max_train_steps: int | None = setting(
        None,
        "optimizer steps over the run's whole life; empty: num_train_epochs decides; raise it to train a finished run further",
        min=1,
    )
    train_batch_size: int = setting(
        1,
        "instance images in each forward pass; with prior preservation as many class images join them; 1, not 4, so that a 16 GB GPU holds it",
        min=1,
        max=1024,
        fixed=True,
    )
    gradient_accumulation_steps: int = setting(
        1, "forward passes summed into one optimizer step", min=1, max=1024, fixed=True, advanced=True
    )
    learning_rate: float = setting(5e-6, "peak learning rate", above=0, max=1)
    lr_scheduler: SCHEDULERS = setting("constant", "how the learning rate runs over the steps", advanced=True)
    lr_warmup_steps: int = setting(
        0,
        "steps in which the learning rate rises from 0; the usual 500 would be most of an 800-step run; `constant` has none",
        min=0,
        advanced=True,
    )
    scale_lr: bool = setting(
        False, "multiply the learning rate by train_batch_size and gradient_accumulation_steps", advanced=True
    )
    seed: int = setting(
        0,
        "decides order, noise, timesteps and crops: one seed, one result; never empty, because a run that resumes needs it",
        min=0,
        max=2**63 - 1,
        fixed=True,
        advanced=True,
    )
    mixed_precision: PRECISIONS = setting(
        "auto",
        "arithmetic of the forward pass; auto takes bf16 or fp16 where the GPU is good at it; trained weights stay fp32",
        advanced=True,
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about a quarter slower"
    )
    use_8bit_adam: bool = setting(
        False, "keep the optimizer's moments in 8 bit (bitsandbytes): 6 bytes a parameter less", fixed=True
    )
    adam_beta1: float = setting(0.9, "decay of AdamW's first moment", min=0, max=0.9999, advanced=True, fixed=True)
    adam_beta2: float = setting(0.999, "decay of AdamW's second moment", min=0, max=0.999999, advanced=True, fixed=True)
    adam_weight_decay: float = setting(0.01, "AdamW's weight decay", min=0, max=1, advanced=True, fixed=True)
    adam_epsilon: float = setting(
        1e-8, "AdamW's epsilon, which keeps a division finite", above=0, max=1, advanced=True, fixed=True
    )
    max_grad_norm: float = setting(
        1.0, "gradients are scaled down to this global norm", above=0, advanced=True, fixed=True
    )
    save_model_every_n_steps: int | None = setting(
        200,
        "steps between checkpoints: usable weights in checkpoints/ and the state that a run resumes from; empty: only at the end and when interrupted",
        min=1,
    )
    checkpoints_total_limit: int = setting(
        3, "how many checkpoints of usable weights are kept; the oldest go first", min=1, advanced=True
    )
    save_precision: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16", "precision of the usable weights on disk; resuming is always exact", advanced=True
    )
    start_over: bool = setting(False, "move what is in output_dir aside and begin at step 0", advanced=True)
    auto_test_model: bool = setting(True, "make preview pictures before step 1 and after each checkpoint")
    test_prompt: str | None = setting(None, "prompt of the previews; empty: the instance prompt, or the first caption")
    test_prompts_file: Path | None = setting(
        None, "text file with one preview prompt on each line; wins over test_prompt", advanced=True
    )
    test_negative_prompt: str = setting("", "what the previews should not show", advanced=True)
    test_seed: int = setting(
        42,
        "seed of the first preview picture of each prompt; previews never touch the training's random numbers",
        min=0,
        max=2**63 - 1,
        advanced=True,
    )
    test_num_per_prompt: int = setting(1, "preview pictures for each prompt", min=1, max=64, advanced=True)
    guidance_scale: float = setting(
        7.5,
        "classifier-free guidance (arXiv:2207.12598) of the class images and previews; 1 is off",
        min=1,
        max=50,
        advanced=True,
    )
    sample_batch_size: int = setting(4, "class images and previews generated at once", min=1, max=256, advanced=True)
    log_interval: int = setting(
        10, "steps between lines of log.jsonl; the loss is only read then", min=1, advanced=True
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hugging Face model", advanced=True, fixed=True)
    tokenizer_name: str | None = setting(
        None, "tokenizer folder or Hugging Face id, if not the base model's", advanced=True, fixed=True
    )
    device: DEVICES = setting("auto", "where to compute: auto takes a GPU if there is one", advanced=True)
    log_with: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "a tracker beside log.jsonl, which is always written", advanced=True, waits=LATER
    )
    logging_dir: Path | None = setting(None, "folder of the tracker's files", advanced=True, waits=LATER)
    push_to_hub: bool = setting(False, "upload the finished model to the Hugging Face Hub", advanced=True, waits=LATER)
    hub_token: str | None = setting(None, "token for the upload", advanced=True, waits=LATER, secret=True)
    hub_model_id: str | None = setting(None, "repository of the upload", advanced=True, waits=LATER)
    local_rank: int = setting(-1, "rank of this process among several GPUs", advanced=True, waits=LATER)

    def contradictions(self) -> list[str]:
        """Sentences about settings that do not go together."""
        mistakes = [*waiting(self), *self._label_mistakes(), *self._prior_mistakes()]
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            mistakes.append("lr_scheduler constant has no warm-up; choose constant_with_warmup, or lr_warmup_steps 0")
        model = Path(self.pretrained_model_name_or_path)
        used = {"instance_data_dir": self.instance_data_dir, "class_data_dir": self.class_data_dir}
        used |= {"pretrained_model_name_or_path": model} if model.exists() else {}
        for name, folder in used.items():
            if self.output_dir and folder and folder.resolve().is_relative_to(self.output_dir.resolve()):
                mistakes.append(f"output_dir {self.output_dir} holds {name} {folder}; choose another output_dir")
        return mistakes

    def _label_mistakes(self) -> list[str]:
        sources = [
            name for name in ("instance_prompt", "use_txt_as_label", "use_filename_as_label") if getattr(self, name)
        ]
        if not sources:
            return ["no prompt is given: set instance_prompt, or use_txt_as_label with a .txt file beside each image"]
        if len(sources) > 1:
            return [f"{' and '.join(sources)} exclude each other, since each image has one prompt; keep one of them"]
        return []

    def _prior_mistakes(self) -> list[str]:
        if not self.with_prior_preservation:
            given = [name for name in ("class_prompt", "class_data_dir") if getattr(self, name)]
            return [
                f"{name} has no effect without with_prior_preservation; turn that on or leave {name} empty"
                for name in given
            ]
        if not self.class_prompt:
            return ["with_prior_preservation needs class_prompt, for instance: photo of a dog"]
        if self.class_data_dir and self.class_data_dir.resolve() == self.instance_data_dir.resolve():
            return ["class_data_dir and instance_data_dir are the same folder; choose another class_data_dir"]
        if self.class_prompt == self.instance_prompt:
            return [
                "class_prompt and instance_prompt are the same; put an identifier, a rare word, in instance_prompt only"
            ]
        return []


@dataclass(frozen=True)
class PreviewConfig(Settings):
    """Sample a model: every prompt with every seed (or guidance scale), as single pictures and a labelled grid."""

    model: Path = setting(
        ..., "a diffusers folder: a run's model/, one of its checkpoints/, or a base model", positional=True
    )
    prompt: tuple[str, ...] = setting(
        (), "prompts, one for each row of the grid; on the command line give the flag once for each"
    )
    prompts_file: Path | None = setting(None, "text file with one prompt on each line, added to prompt")
    output: Path = setting(Path("preview.png"), "the grid; single pictures go in a folder of the same name beside it")
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
    """Turn an original Stable Diffusion file into a diffusers folder, or a folder into a file that user interfaces load."""

    source: Path = setting(..., "a .safetensors or .ckpt file, or a diffusers folder", positional=True)
    destination: Path = setting(..., "the folder to make, or the .safetensors or .ckpt file", positional=True)
    half: bool = setting(
        False,
        "store the weights in fp16: half the size, the same pictures; the models that train saves are fp16 already",
    )
    overwrite: bool = setting(False, "replace the destination if it exists")
    tokenizer_name: str | None = setting(
        None,
        "tokenizer folder or Hugging Face id for a file that does not carry one; empty: the one of Stable Diffusion 1",
        advanced=True,
    )


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Teach the embedded model a subject: prepare, class images, train, pictures before and after, convert."""

    folder: Path | None = setting(None, "where everything goes; empty: demo in the workspace")
    max_train_steps: int | None = setting(None, "optimizer steps of the training; empty: what suits the model", min=1)


COMMANDS: dict[str, type[Settings]] = {
    "prepare": PrepareConfig,
    "class-images": ClassImagesConfig,
    "train": TrainConfig,
    "preview": PreviewConfig,
    "evaluate": EvaluateConfig,
    "convert": ConvertConfig,
    "demo": DemoConfig,
}
