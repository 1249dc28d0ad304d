"""The settings of a Stable Diffusion 1 model, read off its tensors, are the published ones."""

import re

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from dbkit.families import model_configs, scheduler_config


def test_the_settings_of_stable_diffusion_1_are_read_off_its_shapes():
    # The published settings, as in the model folders of Stable Diffusion 1.4 and 1.5.
    unet = {
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    }
    vae = {
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    text_encoder = {
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "vocab_size": 49408,
    }

    def build(configs):
        with torch.device("meta"):
            return {
                "unet": UNet2DConditionModel.from_config(configs["unet"]),
                "vae": AutoencoderKL.from_config(configs["vae"]),
                "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
            }

    published = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    modules = build(published)
    weights = {part: module.state_dict() for part, module in modules.items()}
    if not next(iter(weights["text_encoder"])).startswith("text_model."):
        weights["text_encoder"] = {f"text_model.{name}": tensor for name, tensor in weights["text_encoder"].items()}
    inferred = build(model_configs(weights, False, "epsilon"))
    for part, expected in published.items():
        found = dict(inferred[part].config.to_dict() if part == "text_encoder" else inferred[part].config)
        assert {
            name: list(found[name]) if isinstance(found[name], tuple) else found[name] for name in expected
        } == expected
        shapes = {name: tensor.shape for name, tensor in inferred[part].state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in modules[part].state_dict().items()}
    assert (
        DDPMScheduler.from_config(model_configs(weights, False, "epsilon")["scheduler"]).config.prediction_type
        == "epsilon"
    )


def test_the_scheduler_is_that_of_the_published_configuration():
    # CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml.
    scheduler = scheduler_config("epsilon")
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]) == (0.00085, 0.0120, 1000)
    assert (scheduler["beta_schedule"], scheduler["prediction_type"]) == ("scaled_linear", "epsilon")
    assert re.fullmatch(r"\w+Scheduler", scheduler["_class_name"])
