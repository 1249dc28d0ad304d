"""The names of Stable Diffusion 1's and 2's tensors: original files on one side, diffusers folders on the other.

The tables are data, made by rule from the number of levels and layers, and both directions read the same ones, so
that there and back is the identity. A table maps a module's original name to its diffusers name; whatever follows the
module's name is the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Where each part lies in an original file.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
# The text encoder of Stable Diffusion 2, which has the names of OpenCLIP.
OPEN_CLIP = "cond_stage_model.model."
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# The VAE's one attention layer had other names in diffusers before 0.15.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Tensors of original files that no model needs: copies, buffers that follow from the settings, traces of training.
IGNORED = re.compile(
    r"model_ema\..*|betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|lvlb_weights|logvar"
    r"|global_step|.*\.position_ids|(first_stage_model\.)?loss\..*"
    r"|cond_stage_model\.((model|transformer)\.)?(logit_scale|text_projection(\.weight)?|attn_mask)"
)
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Where OpenCLIP joins the matrices and biases of query, key and value, one below the other.
JOINED = {"in_proj_weight": "weight", "in_proj_bias": "bias"}
QKV = ("q_proj", "k_proj", "v_proj")
RESBLOCKS, TEXT_LAYERS = "transformer.resblocks", "text_model.encoder.layers"
# A tensor of its own in OpenCLIP, the weight of a module in diffusers.
POSITIONS = ("positional_embedding", "text_model.embeddings.position_embedding.weight")


def unet_table(levels: int, layers: int) -> dict[str, str]:
    """The U-Net's modules, for so many resolution levels with so many layers each (SD1: 4 and 2)."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    for number, original in enumerate(("middle_block.0", "middle_block.2")):
        table |= _inside(original, f"mid_block.resnets.{number}", _UNET_RESNET)
    for level in range(levels):
        for layer in range(layers):
            original = f"input_blocks.{1 + level * (layers + 1) + layer}"
            table |= _inside(f"{original}.0", f"down_blocks.{level}.resnets.{layer}", _UNET_RESNET)
            table[f"{original}.1"] = f"down_blocks.{level}.attentions.{layer}"
        table[f"input_blocks.{(level + 1) * (layers + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for layer in range(layers + 1):
            original = f"output_blocks.{level * (layers + 1) + layer}"
            table |= _inside(f"{original}.0", f"up_blocks.{level}.resnets.{layer}", _UNET_RESNET)
            table[f"{original}.1"] = f"up_blocks.{level}.attentions.{layer}"
    return table


def upsampler_table(levels: int, layers: int, names: Iterable[str]) -> dict[str, str]:
    """The U-Net's upsamplers. In original files they come after the attention layer where a level has one."""
    names = list(names)
    table = {}
    for level in range(levels - 1):
        block = f"output_blocks.{level * (layers + 1) + layers}"
        attention = any(
            name.startswith((f"{block}.1.transformer_blocks", f"up_blocks.{level}.attentions.")) for name in names
        )
        table[f"{block}.{2 if attention else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def vae_table(levels: int, layers: int) -> dict[str, str]:
    """The VAE's modules (SD1: 4 levels of 2 layers). Its decoder counts levels from the other end."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        table |= _inside(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _VAE_ATTENTION)
        for number in range(2):
            table |= _inside(f"{side}.mid.block_{number + 1}", f"{side}.mid_block.resnets.{number}", _VAE_RESNET)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers):
            table |= _inside(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", _VAE_RESNET)
        for layer in range(layers + 1):
            table |= _inside(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", _VAE_RESNET)
        table[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        table[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return table


def open_clip_table(layers: int) -> dict[str, str]:
    """The modules of Stable Diffusion 2's text encoder, but for those that JOINED and POSITIONS name."""
    table = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "ln_final": "text_model.final_layer_norm",
    }
    for layer in range(layers):
        table |= _inside(f"{RESBLOCKS}.{layer}", f"{TEXT_LAYERS}.{layer}", _OPEN_CLIP_LAYER)
    return table


def _inside(original: str, diffusers: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{original}.{a}": f"{diffusers}.{b}" for a, b in names.items()}


def rename(name: str, table: dict[str, str]) -> str | None:
    """A tensor's name on the other side: the longest module name in the table is replaced. None if there is none."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if (module := ".".join(parts[:cut])) in table:
            return ".".join([table[module], *parts[cut:]])
    return None


def count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers stand where the pattern's group is: the number of levels, layers or blocks."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
