"""Every setting of training once: name, type, default, help and range."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dbkit.embedded import local_folder
from dbkit.settings import Settings, setting, with_auto, without_effect

SCHEDULERS = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
OPTIMIZERS = Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy"]
PRECISIONS = Literal["auto", "no", "fp16", "bf16"]
DEVICES = Literal["auto", "cuda", "mps", "cpu"]
# What each memory tier turns on, as (gradient_checkpointing, use_8bit_adam); tiny is more than that.
TIERS = {
    "auto": (False, False),
    "fast": (False, False),
    "balanced": (False, True),
    "small": (True, True),
    "tiny": (True, True),
}
CLIP_SKIP = "layer of the text encoder, counted from its end, that prompts are read from; 2 for models that are made for it; a user interface has to be set to the same; empty: what the model says, mostly 1"


@with_auto
@dataclass(frozen=True)
class TrainConfig(Settings):
    """Teach Stable Diffusion a subject (DreamBooth, arXiv:2208.12242) or a style (native training)."""

    pretrained_model_name_or_path: str = setting(
        ...,
        "the base model: a diffusers folder (notebook 2 makes one from a checkpoint file), a Hugging Face id, or tiny-sd, which dbkit carries",
        group="model and data",
    )
    instance_data_dir: Path | None = setting(None, "folder with the images to learn")
    output_dir: Path | None = setting(
        None,
        "folder of this run; started again, a run continues from it; empty: runs/dreambooth or runs/native in the workspace",
    )
    auto: bool = setting(
        False,
        "choose what is not given of num_class_images, max_train_steps, train_batch_size, gradient_accumulation_steps, learning_rate, memory, gradient_checkpointing, use_8bit_adam and save_model_every_n_steps from the images, the method and the GPU, and say why; a run that goes on keeps its own",
    )
    instance_prompt: str | None = setting(
        None,
        "prompt for every instance image: a rare word and the class, for instance: photo of ohwx dog",
        fixed=True,
        group="method and prompts",
    )
    with_prior_preservation: bool = setting(
        False,
        "DreamBooth: also train on images of the class, so that the class stays what it was; off: native training",
        fixed=True,
    )
    class_prompt: str | None = setting(
        None,
        "prompt of the class images, without the identifier: photo of a dog",
        fixed=True,
        needs="with_prior_preservation",
    )
    class_data_dir: Path | None = setting(
        None,
        "folder of the class images; empty: class_images/KEY in the workspace; missing ones are generated",
        advanced=True,
        needs="with_prior_preservation",
    )
    num_class_images: int = setting(
        100,
        "how many class images there should be; missing ones are generated",
        min=1,
        auto=True,
        needs="with_prior_preservation",
        idle=True,
    )
    concepts_list: Path | None = setting(
        None,
        "JSON list for several subjects in one model, each with instance_prompt, class_prompt, instance_data_dir, class_data_dir and weight; it takes the place of these settings",
        advanced=True,
    )
    prior_loss_weight: float = setting(
        1.0,
        "weight of the class images in the loss; lower protects the class less and learns the subject faster",
        min=0,
        max=100,
        fixed=True,
        advanced=True,
        needs="with_prior_preservation",
    )
    use_txt_as_label: bool = setting(
        False, "each image's prompt is the .txt file of its name (dog.txt or dog.png.txt)", fixed=True
    )
    use_filename_as_label: bool = setting(
        False, "each image's prompt is its file name without the suffix", fixed=True, advanced=True
    )
    combine_prompt_from_txt: bool = setting(
        False,
        "each image's prompt is made of the instance prompt and its .txt file by prompt_combine_template",
        fixed=True,
        advanced=True,
    )
    prompt_combine_template: str = setting(
        "{PROMPT}, {TXT_PROMPT}",
        "how combine_prompt_from_txt joins the instance prompt and the text",
        fixed=True,
        advanced=True,
        needs="combine_prompt_from_txt",
    )
    shuffle_tags: bool = setting(
        False,
        "show the comma-separated tags of a .txt file in changing order",
        fixed=True,
        advanced=True,
        needs="use_txt_as_label|combine_prompt_from_txt",
    )
    tag_dropout: float = setting(
        0.0,
        "probability with which each tag is left out, so that the subject does not hang on any one of them",
        min=0,
        max=0.9,
        fixed=True,
        advanced=True,
        needs="use_txt_as_label|combine_prompt_from_txt",
    )
    keep_tags: int = setting(
        1,
        "the first tags, which are never moved or left out, for instance the identifier",
        min=0,
        fixed=True,
        advanced=True,
        needs="shuffle_tags|tag_dropout",
    )
    caption_variants: int = setting(
        8,
        "versions of each caption that shuffle_tags and tag_dropout make; their text states are cached",
        min=2,
        max=64,
        fixed=True,
        advanced=True,
        needs="shuffle_tags|tag_dropout",
    )
    resolution: int = setting(
        512,
        "side of the training images, in pixels; images of another size are resized and cropped, never stretched",
        min=8,
        max=4096,
        fixed=True,
        group="pictures",
    )
    center_crop: bool = setting(
        True,
        "crop around the centre; the usual default, off, cuts heads; off: a random place for each image, fixed by the seed",
        fixed=True,
        advanced=True,
    )
    use_aspect_ratio_bucket: bool = setting(
        False,
        "train each image near its own shape instead of as a square; class images are made in the same shapes",
        fixed=True,
    )
    bucket_max_area: int | None = setting(
        None,
        "most pixels of a bucket; empty: 1.5 times resolution squared (768 x 512 at 512), which needs half as much memory again as the square",
        min=64,
        fixed=True,
        advanced=True,
        needs="use_aspect_ratio_bucket",
    )
    bucket_step: int | None = setting(
        None,
        "pixels between the sides of two buckets; empty: resolution / 8 (64 at 512)",
        min=1,
        max=8192,
        fixed=True,
        advanced=True,
        needs="use_aspect_ratio_bucket",
    )
    bucket_min_side: int | None = setting(
        None,
        "shortest side of a bucket, in pixels; empty: resolution / 2 (256 at 512)",
        min=8,
        max=8192,
        fixed=True,
        advanced=True,
        needs="use_aspect_ratio_bucket",
    )
    bucket_max_side: int | None = setting(
        None,
        "longest side of a bucket, in pixels; empty: 2 times resolution (1024 at 512)",
        min=8,
        max=8192,
        fixed=True,
        advanced=True,
        needs="use_aspect_ratio_bucket",
    )
    caption_dropout: float = setting(
        0.0,
        "probability with which a sample is trained without its prompt, which guidance needs (arXiv:2207.12598); 0.1 is usual in long native trainings",
        min=0,
        max=0.9,
        fixed=True,
        advanced=True,
    )
    hflip: bool = setting(
        False,
        "also learn each image mirrored, for subjects that are the same both ways; not where the caption says left or right",
        fixed=True,
        advanced=True,
    )
    augment_rotation: float = setting(
        0.0, "largest rotation of an image's variants, in degrees", min=0, max=45, fixed=True, advanced=True
    )
    augment_brightness: float = setting(
        0.0,
        "largest change of brightness of an image's variants; 0.1 is 10 %",
        min=0,
        max=0.9,
        fixed=True,
        advanced=True,
    )
    augment_contrast: float = setting(
        0.0, "largest change of contrast of an image's variants; 0.1 is 10 %", min=0, max=0.9, fixed=True, advanced=True
    )
    augment_crop: float = setting(
        0.0,
        "most of an image's side that a variant's crop cuts off, at a random place; 0.2 is 20 %",
        min=0,
        max=0.7,
        fixed=True,
        advanced=True,
    )
    augment_variants: int = setting(
        4,
        "versions of each image, the plain one among them, that the augment settings make; they are cached, so they cost no time in a step",
        min=2,
        max=64,
        fixed=True,
        advanced=True,
        needs="augment_rotation|augment_brightness|augment_contrast|augment_crop",
    )
    train_text_encoder: bool = setting(
        False,
        "also train the text encoder: better likeness, more memory, easier to overdo",
        fixed=True,
        group="what is trained",
    )
    text_encoder_learning_rate: float | None = setting(
        None,
        "peak learning rate of the text encoder, which is overdone sooner; empty: learning_rate",
        above=0,
        max=1,
        advanced=True,
        needs="train_text_encoder",
    )
    stop_text_encoder_training: float | None = setting(
        None,
        "the text encoder is trained up to this step (below 1: this part of all steps), then rests, which spares it and frees memory; empty: to the end",
        above=0,
        fixed=True,
        advanced=True,
        needs="train_text_encoder",
    )
    adapter: Literal["none", "lora"] = setting(
        "none",
        "lora: the model stays as it is, and a small file that goes with it is trained (arXiv:2106.09685): less memory, megabytes instead of gigabytes; it wants a higher learning_rate, 1e-4 is usual",
        fixed=True,
    )
    lora_rank: int = setting(
        16,
        "size of the LoRA: the inner width of each adapter; more holds more detail and makes a larger file",
        min=1,
        max=1024,
        fixed=True,
        needs="adapter=lora",
    )
    lora_alpha: float | None = setting(
        None,
        "strength of the LoRA: its output is multiplied by lora_alpha / lora_rank; empty: lora_rank, which makes that 1",
        above=0,
        max=1024,
        fixed=True,
        advanced=True,
        needs="adapter=lora",
    )
    lora_modules: Literal["attention", "transformer", "all"] = setting(
        "attention",
        "which layers get an adapter: those of attention, all of the transformer blocks (as kohya's scripts do), or these and the convolutions",
        fixed=True,
        advanced=True,
        needs="adapter=lora",
    )
    num_train_epochs: int = setting(
        100,
        "passes over the instance images when max_train_steps is empty: the rule of thumb of 100 steps an image; one epoch of ten images would teach nothing",
        min=1,
        advanced=True,
        group="steps, loss and rate",
    )
    max_train_steps: int | None = setting(
        None,
        "optimizer steps over the run's whole life; empty: auto's choice, without auto num_train_epochs decides; raise it to train a finished run further",
        min=1,
        auto=True,
    )
    train_batch_size: int = setting(
        1,
        "instance images in each forward pass; with prior preservation as many class images join them; more take more memory, 1 suits a GPU of 16 GB",
        min=1,
        max=1024,
        fixed=True,
        auto=True,
    )
    gradient_accumulation_steps: int = setting(
        1, "forward passes summed into one optimizer step", min=1, max=1024, fixed=True, advanced=True, auto=True
    )
    min_snr_gamma: float | None = setting(
        None,
        "weigh each timestep by min(SNR, gamma) (arXiv:2303.09556), 5 is usual; empty: all timesteps count alike",
        above=0,
        max=100,
        fixed=True,
        advanced=True,
    )
    noise_offset: float = setting(
        0.0,
        "noise that is the same over each channel of a picture, so that very dark and bright pictures are learnt; 0.05 to 0.1 are usual",
        min=0,
        max=1,
        fixed=True,
        advanced=True,
    )
    input_perturbation: float = setting(
        0.0,
        "extra noise on the input that is not to be predicted, against errors that add up (arXiv:2301.11706); 0.1 is usual",
        min=0,
        max=1,
        fixed=True,
        advanced=True,
    )
    rescale_zero_terminal_snr: bool = setting(
        False,
        "rescale the noise schedule so that its last step is noise alone (arXiv:2305.08891); for models that predict v",
        fixed=True,
        advanced=True,
    )
    loss_type: Literal["mse", "huber", "l1"] = setting(
        "mse", "squared error, or one that outliers move less", fixed=True, advanced=True
    )
    huber_delta: float = setting(
        0.1,
        "error from which the Huber loss is linear",
        above=0,
        max=10,
        fixed=True,
        advanced=True,
        needs="loss_type=huber",
    )
    masked_loss: bool = setting(
        False,
        "learn what a mask shows: masks/NAME.png beside the image (white counts, black does not), or the image's own transparency",
        fixed=True,
        advanced=True,
    )
    unmasked_weight: float = setting(
        0.1,
        "how much counts what the mask hides; 0 leaves the model free to forget what backgrounds are",
        min=0,
        max=1,
        fixed=True,
        advanced=True,
        needs="masked_loss",
    )
    inpainting_masks: int = setting(
        8,
        "versions of each image with a part hidden that an inpainting model learns from; a quarter of them hides all",
        min=1,
        max=64,
        fixed=True,
        advanced=True,
    )
    learning_rate: float = setting(5e-6, "peak learning rate", above=0, max=1, auto=True)
    lr_scheduler: SCHEDULERS = setting("constant", "how the learning rate runs over the steps", advanced=True)
    lr_warmup_steps: int = setting(
        0,
        "steps in which the learning rate rises from 0; the usual 500 would be most of an 800-step run; `constant` has none",
        min=0,
        advanced=True,
    )
    lr_num_cycles: int = setting(
        1,
        "how often lr_scheduler cosine_with_restarts falls from its peak to 0",
        min=1,
        max=1000,
        advanced=True,
        needs="lr_scheduler=cosine_with_restarts",
    )
    lr_power: float = setting(
        1.0,
        "power of lr_scheduler polynomial; 1 falls in a straight line",
        above=0,
        max=100,
        advanced=True,
        needs="lr_scheduler=polynomial",
    )
    scale_lr: bool = setting(
        False,
        "multiply the learning rate by train_batch_size, gradient_accumulation_steps and the number of processes",
        advanced=True,
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
        "arithmetic of the forward pass; auto takes bf16 or fp16 where the GPU is good at it; trained weights stay fp32, but for memory tiny",
        advanced=True,
        group="memory and speed",
    )
    memory: Literal["auto", "fast", "balanced", "small", "tiny"] = setting(
        "auto",
        "fast: nothing is traded for memory, 15 GB for Stable Diffusion 1 at 512 px; balanced: AdamW's moments in 8 bits, 10 GB; small: gradient_checkpointing too, which counts with larger batches and pictures; tiny: weights in bf16, each gradient applied in the backward pass, 5 GB, a little less exact; auto: what use_8bit_adam and gradient_checkpointing turn on, and where auto chooses them too, what the GPU needs",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about a quarter slower", auto=True
    )
    optimizer: OPTIMIZERS = setting(
        "adamw",
        "adamw; adamw8bit and adafactor: a quarter of its state; lion: half, wants a third to a tenth of AdamW's learning_rate; prodigy: twice, finds its own rate, wants learning_rate 1; these two need pytorch_optimizer",
        fixed=True,
        advanced=True,
    )
    use_8bit_adam: bool = setting(
        False,
        "the same as optimizer adamw8bit: 6 bytes a parameter less; bitsandbytes, or torchao where that fails",
        auto=True,
    )
    adam_beta1: float = setting(
        0.9, "decay of the first moment; adafactor has none", min=0, max=0.9999, advanced=True, fixed=True
    )
    adam_beta2: float | None = setting(
        None,
        "decay of the second moment; empty: 0.999, of lion 0.99; adafactor has its own",
        min=0,
        max=0.999999,
        advanced=True,
        fixed=True,
    )
    adam_weight_decay: float = setting(
        0.01, "weight decay, times the learning rate", min=0, max=1, advanced=True, fixed=True
    )
    adam_epsilon: float = setting(
        1e-8,
        "keeps a division finite; of adamw, adamw8bit and prodigy",
        above=0,
        max=1,
        advanced=True,
        fixed=True,
    )
    max_grad_norm: float = setting(
        1.0,
        "gradients are scaled down to this global norm; with memory tiny each weight's gradient to this norm by itself",
        above=0,
        advanced=True,
        fixed=True,
    )
    use_ema: bool = setting(
        False,
        "save and sample the moving average of the weights, which is steadier; needs memory for one more copy",
        fixed=True,
        advanced=True,
    )
    ema_decay: float = setting(
        0.9999,
        "most that the average keeps at a step; it begins at 2/11 and grows as (1 + step) / (10 + step)",
        above=0,
        max=0.999999,
        fixed=True,
        advanced=True,
        needs="use_ema",
    )
    save_model_every_n_steps: int | None = setting(
        200,
        "steps between checkpoints: usable weights in checkpoints/ and the state that a run resumes from; empty: auto's choice, without auto only at the end and when interrupted",
        min=1,
        auto=True,
        group="saving and previews",
    )
    save_min_steps: int = setting(
        0,
        "no checkpoint of usable weights before this step; the state to resume from is saved all the same",
        min=0,
        advanced=True,
    )
    save_every_n_minutes: float | None = setting(
        5.0,
        "minutes of training between saved states to resume from, beside save_model_every_n_steps: the most that a lost connection costs; empty: only with the checkpoints",
        above=0,
        advanced=True,
    )
    resume_state: Literal["exact", "small", "weights"] = setting(
        "exact",
        "what a state to resume from holds. exact: all of it, 10 GB for the U-Net of Stable Diffusion 1 with AdamW, and the run that goes on is the run that would have been; small: moments in 8 bit, 5 GB, nearly that; weights: the weights in save_precision, 2 GB, and the optimizer begins anew",
        advanced=True,
    )
    session_minutes: float | None = setting(
        None,
        "minutes that this session has left, for instance one of Colab; it is said whether the run fits, and a state is saved shortly before they end; empty: not known",
        above=0,
        max=100_000,
        advanced=True,
    )
    local_dir: Path | None = setting(
        None,
        "folder on a fast disk in which the run works, while what it saves is copied to output_dir in the background; empty: /content/dbkit_runs on Colab where output_dir is on Google Drive, elsewhere output_dir itself",
        advanced=True,
    )
    checkpoints_total_limit: int = setting(
        3,
        "how many checkpoints of usable weights are kept; the oldest go first, but for the one that judge_steps recommends",
        min=1,
        advanced=True,
    )
    save_precision: Literal["fp16", "bf16", "fp32"] = setting(
        "fp16", "precision of the usable weights on disk; resuming is always exact", advanced=True
    )
    start_over: bool = setting(
        False,
        "move the run in output_dir aside and begin at step 0; a run that was begun so goes on as long as its settings stay the same",
        advanced=True,
    )
    auto_test_model: bool = setting(True, "make preview pictures before step 1 and after each checkpoint")
    judge_steps: bool = setting(
        True,
        "after each checkpoint measure the loss at fixed noise, and of its previews the likeness to the subject and the drift of the class, and recommend a step; for other models than tiny-sd the previews are judged by CLIP and DINO, 0.7 GB from the Hub, once",
        advanced=True,
    )
    test_prompt: str | None = setting(
        None,
        "prompt of the previews; empty: the instance prompt, alone and in the snow, and the class prompt, or the first caption",
    )
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
    pretrained_vae_name_or_path: str | None = setting(
        None,
        "another VAE, folder or Hugging Face id, in place of the base model's; it is saved with the model",
        advanced=True,
        group="parts, logs and upload",
    )
    log_interval: int = setting(
        10, "steps between lines of log.jsonl; the loss is only read then", min=1, advanced=True
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hugging Face model", advanced=True, fixed=True)
    tokenizer_name: str | None = setting(
        None, "tokenizer folder or Hugging Face id, if not the base model's", advanced=True
    )
    clip_skip: int | None = setting(
        None,
        CLIP_SKIP,
        min=1,
        max=12,
        advanced=True,
        fixed=True,
    )
    pad_tokens: bool = setting(
        True,
        "read each prompt with its padding, as user interfaces do; off: its own tokens alone, as some scripts train",
        advanced=True,
        fixed=True,
    )
    device: DEVICES = setting("auto", "where to compute: auto takes a GPU if there is one", advanced=True)
    log_with: Literal["none", "tensorboard", "wandb"] = setting(
        "none",
        "a tracker beside log.jsonl, which is always written; wandb obeys WANDB_MODE=offline",
        advanced=True,
    )
    logging_dir: Path | None = setting(
        None, "folder of the tracker's files; empty: logs in output_dir", advanced=True, needs="log_with"
    )
    push_to_hub: bool = setting(
        False,
        "upload the finished model to the Hugging Face Hub; its token comes from `hf auth login`, HF_TOKEN, or on Colab the secret of that name",
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
        "repository of the upload, owner/name or name; empty: the name of the run's folder",
        advanced=True,
        needs="push_to_hub",
    )
    hub_private: bool = setting(
        True,
        "only you see the upload; usually public elsewhere, but what is taught is often a face; off: everyone sees it",
        advanced=True,
        needs="push_to_hub",
    )
    local_rank: int = setting(
        -1,
        "number of this process on its machine, for launchers that say it by a flag; torchrun and accelerate launch do not",
        min=-1,
        advanced=True,
    )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the training images where they are square."""
        return self.resolution, self.resolution

    @property
    def chosen_optimizer(self) -> str:
        """The optimizer, with use_8bit_adam and the memory tiers that mean it read as adamw8bit."""
        return "adamw8bit" if self.use_8bit_adam or TIERS[self.memory][1] else self.optimizer

    @property
    def recomputes_activations(self) -> bool:
        """gradient_checkpointing, or a memory tier that means it."""
        return self.gradient_checkpointing or TIERS[self.memory][0]

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate of the run, after scale_lr."""
        images = self.train_batch_size * self.gradient_accumulation_steps
        return self.learning_rate * (images if self.scale_lr else 1)

    def contradictions(self) -> list[str]:
        """Sentences about settings that do not go together."""
        mistakes = [
            *without_effect(self),
            *self._data_mistakes(),
            *self._label_mistakes(),
            *self._prior_mistakes(),
            *self._schedule_mistakes(),
            *self._optimizer_mistakes(),
            *self._memory_mistakes(),
        ]
        model = Path(self.pretrained_model_name_or_path)
        # Not Path.exists(), which raises where a name is longer than a file's can be.
        if self.revision and os.path.exists(local_folder(model)):  # noqa: PTH110
            mistakes.append(f"revision has no effect on the folder {model}; leave revision out")
        used = {"instance_data_dir": self.instance_data_dir, "class_data_dir": self.class_data_dir}
        used |= {"pretrained_model_name_or_path": model} if os.path.exists(model) else {}  # noqa: PTH110
        vae = self.pretrained_vae_name_or_path
        used |= {"pretrained_vae_name_or_path": Path(vae)} if vae and os.path.exists(vae) else {}  # noqa: PTH110
        for name, folder in used.items():
            if self.output_dir and folder and folder.resolve().is_relative_to(self.output_dir.resolve()):
                mistakes.append(f"output_dir {self.output_dir} holds {name} {folder}; choose another output_dir")
        return mistakes

    def _data_mistakes(self) -> list[str]:
        stop = self.stop_text_encoder_training
        if stop and stop > 1 and stop % 1:
            return [f"stop_text_encoder_training is {stop}; write a whole step, or a part of all steps below 1"]
        if not self.concepts_list:
            return (
                [] if self.instance_data_dir else ["instance_data_dir is missing: the folder with the images to learn"]
            )
        given = [name for name in _OF_A_CONCEPT if getattr(self, name)]
        if not given:
            return []
        return [f"concepts_list says {' and '.join(given)} for each concept; leave {' and '.join(given)} empty"]

    def _schedule_mistakes(self) -> list[str]:
        mistakes = []
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            mistakes.append("lr_scheduler constant has no warm-up; choose constant_with_warmup, or lr_warmup_steps 0")
        if self.lr_scheduler == "polynomial" and self.peak_learning_rate <= 1e-7:
            mistakes.append(
                f"lr_scheduler polynomial falls to 1e-07, and learning_rate {self.peak_learning_rate:g} is not above "
                "that; raise learning_rate or choose linear"
            )
        return mistakes

    def _optimizer_mistakes(self) -> list[str]:
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            return [f"use_8bit_adam means adamw8bit, and optimizer is {self.optimizer}; leave one of them out"]
        unused = {"adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon"), "lion": ("adam_epsilon",)}
        given = [n for n in unused.get(self.optimizer, ()) if getattr(self, n) != getattr(type(self), n)]
        mistakes = [f"{name} has no effect with optimizer {self.optimizer}; leave it out" for name in given]
        if self.optimizer == "prodigy" and self.learning_rate < 1e-3:
            mistakes.append(
                f"optimizer prodigy multiplies the rate that it finds by learning_rate, and {self.learning_rate:g} would "
                "learn nothing; set learning_rate to 1"
            )
        if self.optimizer == "prodigy" and self.text_encoder_learning_rate not in (None, self.learning_rate):
            mistakes.append("optimizer prodigy finds one rate for all parts; leave text_encoder_learning_rate out")
        return mistakes

    def _memory_mistakes(self) -> list[str]:
        if self.memory == "auto":
            return []
        tier = f"memory {self.memory}"
        recomputes, eight = TIERS[self.memory]
        mistakes = []
        if self.gradient_checkpointing and not recomputes:
            mistakes.append(
                f"{tier} is without gradient_checkpointing, which is on; choose memory small, or turn it off"
            )
        if not eight and self.chosen_optimizer == "adamw8bit":
            how = "use_8bit_adam is on" if self.use_8bit_adam else "optimizer is adamw8bit"
            mistakes.append(f"{tier} is without 8-bit moments, and {how}; choose memory balanced, or leave that out")
        if eight and self.optimizer not in ("adamw", "adamw8bit"):
            mistakes.append(
                f"{tier} means optimizer adamw8bit, and optimizer is {self.optimizer}; leave one of them out"
            )
        if self.memory == "tiny":
            small = "; leave that out, or choose memory small"
            if self.gradient_accumulation_steps > 1:
                mistakes.append(
                    "memory tiny frees each gradient in the backward pass, so none can be summed over "
                    f"gradient_accumulation_steps {self.gradient_accumulation_steps}{small}"
                )
            if self.adapter != "none":
                mistakes.append(f"memory tiny is for training the whole model, and adapter is {self.adapter}{small}")
            if self.use_ema:
                mistakes.append(f"memory tiny has no room for the averages of use_ema{small}")
            if self.mixed_precision in ("no", "fp16"):
                mistakes.append(f"memory tiny computes in bf16, and mixed_precision is {self.mixed_precision}{small}")
        return mistakes

    def _label_mistakes(self) -> list[str]:
        labels = ("combine_prompt_from_txt", "use_txt_as_label", "use_filename_as_label")
        chosen = [name for name in labels if getattr(self, name)]
        # Each concept of a list has its own instance prompt, and says so itself where it is missing.
        prompt = bool(self.instance_prompt or self.concepts_list)
        if self.instance_prompt and "combine_prompt_from_txt" not in chosen:
            chosen.insert(0, "instance_prompt")
        if len(chosen) > 1:
            return [f"{' and '.join(chosen)} exclude each other, since each image has one prompt; keep one of them"]
        if not prompt and not chosen:
            return ["no prompt is given: set instance_prompt, or use_txt_as_label with a .txt file beside each image"]
        if self.combine_prompt_from_txt and not prompt:
            return ["combine_prompt_from_txt needs instance_prompt, which it joins with each image's text"]
        if self.combine_prompt_from_txt and "{TXT_PROMPT}" not in self.prompt_combine_template:
            return ["prompt_combine_template has no {TXT_PROMPT}, so no text would be used; {PROMPT}, {TXT_PROMPT} has"]
        if self.combine_prompt_from_txt and "{PROMPT}" not in self.prompt_combine_template:
            return [
                "prompt_combine_template has no {PROMPT}, so the identifier would be lost; use_txt_as_label does that"
            ]
        return []

    def _prior_mistakes(self) -> list[str]:
        if not self.with_prior_preservation or self.concepts_list:
            return []
        if not self.class_prompt:
            return ["with_prior_preservation needs class_prompt, for instance: photo of a dog"]
        if (
            self.class_data_dir
            and self.instance_data_dir
            and self.class_data_dir.resolve() == self.instance_data_dir.resolve()
        ):
            return ["class_data_dir and instance_data_dir are the same folder; choose another class_data_dir"]
        if self.class_prompt == self.instance_prompt:
            return [
                "class_prompt and instance_prompt are the same; put an identifier, a rare word, in instance_prompt only"
            ]
        return []


_OF_A_CONCEPT = ("instance_prompt", "class_prompt", "instance_data_dir", "class_data_dir")
