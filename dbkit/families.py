"""Which model family a set of tensors is, and the settings of a Stable Diffusion 1 or 2 model by its tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import keys
from dbkit.errors import DbkitError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """What the names and shapes of a model's tensors tell of its kind."""

    is_sd2: bool
    inpaints: bool

    @property
    def name(self) -> str:
        """For sentences."""
        return f"Stable Diffusion {2 if self.is_sd2 else 1}"


def find_family(shapes: Shapes, source: Path, without_vae: bool = False) -> Family:
    """The family of a whole model's tensors under original names; without_vae: its VAE comes from elsewhere.

    Raises DbkitError where it is none that dbkit converts.
    """

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    unet = keys.PREFIXES["unet"]
    if is_lora(shapes):
        fault = "is a LoRA, which is read from a .safetensors file only"
    elif has("conditioner.embedders."):
        fault = "is a Stable Diffusion XL model"
    elif not has(unet + "input_blocks."):
        fault = (
            "is not a Stable Diffusion model" if not has("down_blocks.") else "holds one part of a model, not the whole"
        )
    elif lacking := [part for part in _lacking(shapes) if not (part == "vae" and without_vae)]:
        fault = f"lacks its {' and its '.join(lacking)}"
    else:
        channels = shapes.get(unet + "input_blocks.0.0.weight", (0, 4))[1]
        latents = shapes.get(keys.PREFIXES["vae"] + "post_quant_conv.weight", (4,))[0]
        if channels in (latents, 2 * latents + 1):
            return Family(is_sd2(shapes), inpaints=channels != latents)
        fault = f"has {channels} input channels, neither those of a plain model nor of one that inpaints"
    raise DbkitError(f"{source} {fault}; dbkit converts whole Stable Diffusion 1 and 2 models, so take one of those")


def _lacking(shapes: Shapes) -> list[str]:
    prefixes = {**keys.PREFIXES, "text_encoder": "cond_stage_model."}
    return [part for part, prefix in prefixes.items() if not any(name.startswith(prefix) for name in shapes)]


def is_lora(names: Iterable[str]) -> bool:
    """Whether these names of tensors are a LoRA's, of whatever spelling and kind."""
    return any(re.match(r"lora_|.*[._]lora[._]", name) for name in names)


def is_sd2(shapes: Shapes) -> bool:
    """Whether tensors under original names or diffusers' are of Stable Diffusion 2; a few of them are enough."""
    wide = (".attn2.to_k.weight", ".self_attn.q_proj.weight")
    return (
        any(name.startswith(keys.OPEN_CLIP) for name in shapes)
        or any(len(shape) == 2 for name, shape in shapes.items() if name.endswith(".proj_in.weight"))
        or any(shape[1:] == (1024,) for name, shape in shapes.items() if name.endswith(wide))
    )


def original_shapes(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """A folder's shapes under the few names by which families are told apart."""
    shapes = {
        keys.PREFIXES[part] + name: tuple(t.shape) for part, weights in parts.items() for name, t in weights.items()
    }
    shapes[keys.PREFIXES["unet"] + "input_blocks.0.0.weight"] = shapes.get(
        keys.PREFIXES["unet"] + "conv_in.weight", (0, 4)
    )
    return shapes


def model_configs(weights: Mapping[str, Mapping[str, Any]], is_sd2: bool, prediction_type: str) -> dict[str, Any]:
    """Settings of a model: widths and depths from its tensors, the family's for the rest."""
    return {
        "unet": _unet_config(weights["unet"], is_sd2, prediction_type),
        "vae": vae_config(weights["vae"]),
        "text_encoder": _text_config(weights["text_encoder"], is_sd2),
        "scheduler": scheduler_config(prediction_type),
    }


def _unet_config(unet: Mapping[str, Any], is_sd2: bool, prediction_type: str) -> dict[str, Any]:
    levels = keys.count(unet, r"down_blocks\.(\d+)\.")
    attention = [f"down_blocks.{level}.attentions.0.norm.weight" in unet for level in range(levels)]
    channels = [unet[f"down_blocks.{n}.resnets.0.conv2.weight"].shape[0] for n in range(levels)]
    config = {
        "_class_name": "UNet2DConditionModel",
        # Of old diffusers had this name for the number of heads, and keeps it.
        "attention_head_dim": [max(1, width // 64) for width in channels] if is_sd2 else 8,
        "block_out_channels": channels,
        "cross_attention_dim": unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "in_channels": unet["conv_in.weight"].shape[1],
        "layers_per_block": keys.count(unet, r"down_blocks\.0\.resnets\.(\d+)\."),
        "out_channels": unet["conv_out.weight"].shape[0],
        # Published models that predict v were trained on 768 px.
        "sample_size": 96 if is_sd2 and prediction_type == "v_prediction" else 64,
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
    }
    # Without upcast_attention version 2.1 overflows in fp16.
    return config | ({"use_linear_projection": True, "upcast_attention": True} if is_sd2 else {})


def vae_config(vae: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a VAE by its tensors."""
    levels = keys.count(vae, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [vae[f"encoder.down_blocks.{n}.resnets.0.conv2.weight"].shape[0] for n in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "latent_channels": vae["post_quant_conv.weight"].shape[0],
        "layers_per_block": keys.count(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "sample_size": 512,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_config(text: Mapping[str, Any], is_sd2: bool) -> dict[str, Any]:
    embedding = text["text_model.embeddings.token_embedding.weight"]
    return {
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "hidden_act": hidden_act(is_sd2),
        "hidden_size": embedding.shape[1],
        "intermediate_size": text["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "max_position_embeddings": text["text_model.embeddings.position_embedding.weight"].shape[0],
        "num_attention_heads": 16 if is_sd2 else 12,
        "num_hidden_layers": keys.count(text, r"text_model\.encoder\.layers\.(\d+)\."),
        "pad_token_id": 1,
        "projection_dim": 512 if is_sd2 else 768,
        "vocab_size": embedding.shape[0],
    }


def hidden_act(is_sd2: bool) -> str:
    """The activation of the family's text encoder: of OpenAI's CLIP, or of OpenCLIP."""
    return "gelu" if is_sd2 else "quick_gelu"


def scheduler_config(prediction_type: str) -> dict[str, Any]:
    """The noise schedule of Stable Diffusion 1 and 2, with the sampler their makers shipped."""
    is_v = prediction_type == "v_prediction"
    return {
        "_class_name": "DDIMScheduler" if is_v else "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }


# What user interfaces compute every model of these families with, and a file's tensors do not show.
_FIXED = {
    "unet": {
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "resnet_out_scale_factor": 1,
        "resnet_skip_time_act": False,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    },
    "vae": {"act_fn": "silu", "scaling_factor": 0.18215, "shift_factor": None},
    "text_encoder": {"layer_norm_eps": 1e-5},
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "trained_betas": None,
    },
}
# What diffusers takes where a setting is missing, if that is not the family's.
_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def require_usual(configs: Mapping[str, Mapping[str, Any]], is_sd2: bool, source: Path, vae: str | None) -> None:
    """Raise DbkitError for settings with which user interfaces would compute something else from a file.

    vae is the name of one that takes the place of the model's own.
    """
    for part, fixed in _FIXED.items():
        for name, usual in fixed.items():
            found = configs[part].get(name, _DEFAULTS.get(name, usual))
            if found != usual:
                owner = f"the VAE {vae}" if vae and part == "vae" else f"the {part} of {source}"
                raise DbkitError(
                    f"{owner} has {name} {found}, and user interfaces compute {Family(is_sd2, False).name} with "
                    f"{usual}, so its file would make other pictures; correct its settings if it was trained with "
                    f"{usual}, else use it as a folder"
                )


def unusual(configs: Mapping[str, Mapping[str, Any]], is_sd2: bool) -> list[str]:
    """Settings that narrow models and some schedules have, and user interfaces do not find out by themselves."""
    unet, vae, text, scheduler = (configs[part] for part in ("unet", "vae", "text_encoder", "scheduler"))
    widths, heads = unet["block_out_channels"], unet.get("attention_head_dim", 8)
    pairs = {
        # Of old diffusers had this name for the number of heads, and keeps it.
        "attention_head_dim of the U-Net": (
            list(heads) if isinstance(heads, (list, tuple)) else [heads] * len(widths),
            [max(1, width // 64) for width in widths] if is_sd2 else [8] * len(widths),
        ),
        "norm_num_groups of the U-Net": (unet.get("norm_num_groups", 32), 32),
        "norm_num_groups of the VAE": (vae.get("norm_num_groups", 32), 32),
        "num_attention_heads of the text encoder": (text.get("num_attention_heads", 12), 16 if is_sd2 else 12),
        "rescale_betas_zero_snr of the schedule": (bool(scheduler.get("rescale_betas_zero_snr")), False),
    }
    return [f"{name} {found} (they take {usual})" for name, (found, usual) in pairs.items() if found != usual]
