"""Which model family a set of tensors is, and the settings of a Stable Diffusion 1 model by its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit import keys
from dbkit.errors import DbkitError

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


def refuse_other_families(shapes: dict[str, tuple[int, ...]], source: Path) -> None:
    """Raise DbkitError unless names and shapes are those of a plain Stable Diffusion 1 model, of any width."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    unet = keys.PREFIXES["unet"]
    if has("lora_") or any(".lora_" in name for name in shapes):
        family = "is a LoRA, not a whole model"
    elif has("conditioner.embedders."):
        family = "is a Stable Diffusion XL model"
    elif not has(unet + "input_blocks."):
        family = (
            "is not a Stable Diffusion model" if not has("down_blocks.") else "holds one part of a model, not the whole"
        )
    elif has("cond_stage_model.model.") or _text_width(shapes) == 1024 or _is_linear(shapes):
        family = "is a Stable Diffusion 2 model"
    elif shapes.get(unet + "input_blocks.0.0.weight", ())[1:2] == (9,):
        family = "is an inpainting model"
    else:
        lacking = [part for part, prefix in keys.PREFIXES.items() if not has(prefix.removesuffix("transformer."))]
        if not lacking:
            return
        family = f"lacks its {' and its '.join(lacking)}"
    raise DbkitError(f"{source} {family}; dbkit converts whole Stable Diffusion 1 models for now, so take one of those")


def _text_width(shapes: dict[str, tuple[int, ...]]) -> int | None:
    return next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)


def _is_linear(shapes: dict[str, tuple[int, ...]]) -> bool:
    return any(len(shape) == 2 for name, shape in shapes.items() if name.endswith(".proj_in.weight"))


def original_shapes(parts: dict[str, Tensors]) -> dict[str, tuple[int, ...]]:
    """A folder's shapes under the few names by which families are told apart."""
    shapes = {
        keys.PREFIXES[part] + name: tuple(t.shape) for part, weights in parts.items() for name, t in weights.items()
    }
    shapes[keys.PREFIXES["unet"] + "input_blocks.0.0.weight"] = shapes.get(keys.PREFIXES["unet"] + "conv_in.weight", ())
    return shapes


def sd1_configs(weights: dict[str, Tensors]) -> dict[str, Any]:
    """Settings of a Stable Diffusion 1 model: widths and depths from its tensors, the family's for the rest."""
    unet, vae, text = weights["unet"], weights["vae"], weights["text_encoder"]
    levels = keys.count(unet, r"down_blocks\.(\d+)\.")
    attention = [f"down_blocks.{level}.attentions.0.norm.weight" in unet for level in range(levels)]
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]
    vae_levels = keys.count(vae, r"encoder\.down_blocks\.(\d+)\.")
    embedding = text["text_model.embeddings.token_embedding.weight"]
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": 8,
            "block_out_channels": [unet[f"down_blocks.{n}.resnets.0.conv2.weight"].shape[0] for n in range(levels)],
            "cross_attention_dim": unet["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "down_block_types": down,
            "in_channels": unet["conv_in.weight"].shape[1],
            "layers_per_block": keys.count(unet, r"down_blocks\.0\.resnets\.(\d+)\."),
            "out_channels": unet["conv_out.weight"].shape[0],
            "sample_size": 64,
            "up_block_types": up,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [
                vae[f"encoder.down_blocks.{n}.resnets.0.conv2.weight"].shape[0] for n in range(vae_levels)
            ],
            "down_block_types": ["DownEncoderBlock2D"] * vae_levels,
            "latent_channels": vae["post_quant_conv.weight"].shape[0],
            "layers_per_block": keys.count(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "sample_size": 512,
            "scaling_factor": 0.18215,
            "up_block_types": ["UpDecoderBlock2D"] * vae_levels,
        },
        "text_encoder": {
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "hidden_act": "quick_gelu",
            "hidden_size": embedding.shape[1],
            "intermediate_size": text["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "max_position_embeddings": text["text_model.embeddings.position_embedding.weight"].shape[0],
            "num_attention_heads": 12,
            "num_hidden_layers": keys.count(text, r"text_model\.encoder\.layers\.(\d+)\."),
            "pad_token_id": 1,
            "projection_dim": 768,
            "vocab_size": embedding.shape[0],
        },
        "scheduler": sd1_scheduler(),
    }


def sd1_scheduler() -> dict[str, Any]:
    """The noise schedule of Stable Diffusion 1, with the sampler its makers shipped."""
    return {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
