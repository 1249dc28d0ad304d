"""The YAML beside an original file: from it user interfaces know what a file's tensors do not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dbkit.errors import DbkitError
from dbkit.settings import read_yaml


def config_beside(file: Path) -> Path:
    """Where clients look for the YAML of a file: beside it, under its name."""
    return file.with_suffix(".yaml")


def read_prediction_type(path: Path) -> str | None:
    """What the YAML of a model says that it predicts; None where there is none, or it is of something else."""
    if not path.is_file():
        return None
    model = read_yaml(path).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("params"), dict):
        return None
    return "v_prediction" if model["params"].get("parameterization") == "v" else "epsilon"


def require_replaceable_config(path: Path) -> None:
    """Raise DbkitError where something else than the YAML of a model has its name: it would be lost."""
    if path.exists() and read_prediction_type(path) is None:
        raise DbkitError(
            f"the model needs a {path.name} beside it, and {path} is there and no such file; choose another name"
        )


def original_config(configs: dict[str, Any], is_sd2: bool, inpaints: bool) -> str:
    """The YAML of a model with these settings, as the loaders of CompVis, Stability AI and AUTOMATIC1111 read it."""
    import yaml

    scheduler, vae = configs["scheduler"], configs["vae"]
    params = {
        "linear_start": scheduler.get("beta_start", 0.00085),
        "linear_end": scheduler.get("beta_end", 0.012),
        "timesteps": scheduler.get("num_train_timesteps", 1000),
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 64,
        "channels": vae["latent_channels"],
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if inpaints else "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": vae.get("scaling_factor", 0.18215),
        "use_ema": False,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": _unet(configs["unet"], is_sd2),
        },
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": _vae(vae)},
        "cond_stage_config": _text(is_sd2),
    }
    # Absent means epsilon, as in the files that were published.
    if scheduler.get("prediction_type") == "v_prediction":
        params["parameterization"] = "v"
    if inpaints:
        params["finetune_keys"] = None
    kind = "LatentInpaintDiffusion" if inpaints else "LatentDiffusion"
    model = {"base_learning_rate": 1e-4, "target": f"ldm.models.diffusion.ddpm.{kind}", "params": params}
    return yaml.safe_dump({"model": model}, sort_keys=False)


def _unet(config: dict[str, Any], is_sd2: bool) -> dict[str, Any]:
    channels = list(config["block_out_channels"])
    attention = [2**level for level, kind in enumerate(config["down_block_types"]) if kind.startswith("CrossAttn")]
    own = {
        "use_checkpoint": True,
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "attention_resolutions": attention[::-1],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": [width // channels[0] for width in channels],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": config["cross_attention_dim"],
        "legacy": False,
    }
    if is_sd2:
        return own | {"use_fp16": True, "num_head_channels": 64, "use_linear_in_transformer": True}
    return own | {"num_heads": 8}


def _vae(config: dict[str, Any]) -> dict[str, Any]:
    channels = list(config["block_out_channels"])
    return {
        "embed_dim": config["latent_channels"],
        "monitor": "val/rec_loss",
        "ddconfig": {
            "double_z": True,
            "z_channels": config["latent_channels"],
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": channels[0],
            "ch_mult": [width // channels[0] for width in channels],
            "num_res_blocks": config["layers_per_block"],
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def _text(is_sd2: bool) -> dict[str, Any]:
    if is_sd2:
        return {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"freeze": True, "layer": "penultimate"},
        }
    return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
