"""The key tables name exactly the tensors of Stable Diffusion 1, in both directions."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from dbkit import keys
from dbkit.models import state_dict

LISTS = Path(__file__).parents[2] / "shared" / "data" / "checkpoints"
needs_list = pytest.mark.skipif(not LISTS.is_dir(), reason="the lists of key names are not beside the checkout")


@pytest.fixture(scope="module")
def full_size() -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of Stable Diffusion 1 as diffusers names them: shapes only, no memory."""
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
            ),
        }
    return {part: state_dict(module, part) for part, module in modules.items()}


def tables(full_size) -> dict[str, dict[str, str]]:
    """From original module names to those of diffusers."""
    return {
        "unet": keys.unet_table(4, 2) | keys.upsampler_table(4, 2, full_size["unet"]),
        "vae": keys.vae_table(4, 2),
        "text_encoder": {"text_model": "text_model"},
    }


def original_names(full_size) -> dict[str, tuple[str, str]]:
    """For each original name the part and the diffusers name that it stands for."""
    names = {}
    for part, table in tables(full_size).items():
        reverse = {new: old for old, new in table.items()}
        assert len(reverse) == len(table)
        for name in full_size[part]:
            names[keys.PREFIXES[part] + keys.rename(name, reverse)] = part, name
    return names


def required() -> dict[str, list[int]]:
    listed = json.loads((LISTS / "sd1_keys.json").read_text())["keys"]
    return {entry["key"]: entry["shape"] for entry in listed if entry["role"] == "required"}


@needs_list
def test_the_full_model_has_exactly_the_required_names(full_size):
    assert sorted(original_names(full_size)) == sorted(required())


@needs_list
def test_the_full_model_has_the_required_shapes(full_size):
    shapes = required()
    squeezed = []
    for original, (part, name) in original_names(full_size).items():
        shape = list(full_size[part][name].shape)
        if shape != shapes[original]:
            assert [*shape, 1, 1] == shapes[original]
            squeezed.append(original.removeprefix("first_stage_model."))
    assert sorted(squeezed) == sorted(
        f"{side}.mid.attn_1.{layer}.weight" for side in ("encoder", "decoder") for layer in ("q", "k", "v", "proj_out")
    )


@needs_list
def test_names_that_are_not_required_are_ignored_and_no_others():
    listed = json.loads((LISTS / "sd1_keys.json").read_text())
    assert [entry["key"] for entry in listed["keys"] if keys.IGNORED.fullmatch(entry["key"])] == [
        entry["key"] for entry in listed["keys"] if entry["role"] != "required"
    ]
    assert all(keys.IGNORED.fullmatch(entry["key"]) for entry in listed["ema"])


def test_renaming_there_and_back_is_the_identity(full_size):
    for part, table in tables(full_size).items():
        reverse = {new: old for old, new in table.items()}
        names = {name: keys.rename(name, reverse) for name in full_size[part]}
        assert None not in names.values()
        assert len(set(names.values())) == len(names)
        assert {name: keys.rename(original, table) for name, original in names.items()} == {n: n for n in names}


@pytest.mark.parametrize(("levels", "layers"), [(2, 1), (3, 2), (4, 1), (4, 3)])
def test_tables_follow_the_number_of_levels_and_layers(levels, layers):
    attention = [True] * (levels - 1) + [False]
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32,) * levels,
            down_block_types=down,
            up_block_types=up,
            layers_per_block=layers,
            cross_attention_dim=16,
        )
        vae = AutoencoderKL(
            block_out_channels=(32,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=layers,
        )
    names = unet.state_dict()
    for module, table in (
        (unet, keys.unet_table(levels, layers) | keys.upsampler_table(levels, layers, names)),
        (vae, keys.vae_table(levels, layers)),
    ):
        reverse = {new: old for old, new in table.items()}
        originals = [keys.rename(name, reverse) for name in module.state_dict()]
        assert None not in originals
        assert [keys.rename(name, table) for name in originals] == list(module.state_dict())


@pytest.mark.parametrize(
    ("diffusers", "original"),
    [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("down_blocks.1.resnets.0.conv_shortcut.weight", "input_blocks.4.0.skip_connection.weight"),
        ("down_blocks.0.downsamplers.0.conv.bias", "input_blocks.3.0.op.bias"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        ),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("conv_norm_out.weight", "out.0.weight"),
    ],
)
def test_known_pairs_of_the_unet(full_size, diffusers, original):
    table = tables(full_size)["unet"]
    assert keys.rename(original, table) == diffusers


@pytest.mark.parametrize(
    ("diffusers", "original"),
    [
        ("encoder.down_blocks.3.resnets.1.conv2.weight", "encoder.down.3.block.1.conv2.weight"),
        ("decoder.up_blocks.0.resnets.2.norm1.bias", "decoder.up.3.block.2.norm1.bias"),
        ("decoder.up_blocks.3.resnets.0.conv_shortcut.weight", "decoder.up.0.block.0.nin_shortcut.weight"),
        ("encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid.attn_1.proj_out.weight"),
        ("post_quant_conv.bias", "post_quant_conv.bias"),
    ],
)
def test_known_pairs_of_the_vae(diffusers, original):
    assert keys.rename(original, keys.vae_table(4, 2)) == diffusers


def test_a_name_that_no_table_knows_is_none():
    assert keys.rename("input_blocks.99.0.op.weight", keys.unet_table(4, 2)) is None
    assert keys.rename("weight", {"": "x"}) is None


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "my_betas",
    ],
)
def test_no_weight_of_a_model_is_ignored(name):
    assert not keys.IGNORED.fullmatch(name)


def test_counting_finds_how_many_numbers_stand_in_a_place():
    assert keys.count(["a.0.x", "a.1.x", "a.1.y", "a.10.x", "b.5.x"], r"a\.(\d+)\.") == 3
