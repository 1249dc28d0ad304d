"""The YAML beside a file says what published ones say; a stranger's YAML is never replaced."""

import pytest
import yaml

from dbkit import DbkitError, convert
from dbkit.original_config import read_prediction_type


def made(folder, path):
    return yaml.safe_load(convert(folder, path).with_suffix(".yaml").read_text())["model"]


@pytest.mark.parametrize("kind", ["sd2_model", "sd2_v_model"])
def test_stable_diffusion_2_is_described_as_its_loaders_expect(request, tmp_path, kind):
    # The structure of Stability-AI/stablediffusion, configs/stable-diffusion/v2-inference.yaml, at the model's widths.
    model = made(request.getfixturevalue(kind), tmp_path / "made.safetensors")
    params = model["params"]
    assert model["target"] == "ldm.models.diffusion.ddpm.LatentDiffusion"
    assert params.get("parameterization") == ("v" if kind == "sd2_v_model" else None)
    assert (params["linear_start"], params["linear_end"], params["timesteps"]) == (0.00085, 0.012, 1000)
    assert (params["conditioning_key"], params["scale_factor"]) == ("crossattn", 0.18215)
    unet = params["unet_config"]["params"]
    assert unet["channel_mult"] == [1, 2, 4, 4] and unet["model_channels"] == 32
    assert unet["attention_resolutions"] == [4, 2, 1] and unet["num_res_blocks"] == 2
    assert unet["num_head_channels"] == 64 and unet["use_linear_in_transformer"]
    assert (unet["in_channels"], unet["out_channels"], unet["context_dim"]) == (4, 4, 64)
    text = params["cond_stage_config"]
    assert text["target"].endswith("FrozenOpenCLIPEmbedder") and text["params"]["layer"] == "penultimate"
    assert params["first_stage_config"]["params"]["ddconfig"]["ch_mult"] == [1, 2, 3, 3]


def test_stable_diffusion_1_that_predicts_v_is_described(v_model, tmp_path):
    params = made(v_model, tmp_path / "made.ckpt")["params"]
    assert params["parameterization"] == "v" and params["unet_config"]["params"]["num_heads"] == 8
    assert params["cond_stage_config"]["target"].endswith("FrozenCLIPEmbedder")


def test_stable_diffusion_1_that_predicts_noise_needs_no_description(model, tmp_path):
    convert(model, tmp_path / "made.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["made.safetensors"]


def test_another_yaml_of_that_name_is_never_replaced(v_model, tmp_path):
    (tmp_path / "made.yaml").write_text("learning_rate: 1.0e-6\n")
    with pytest.raises(DbkitError, match=r"needs a made\.yaml beside it, and .*made\.yaml is there and no such file"):
        convert(v_model, tmp_path / "made.safetensors", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["made.yaml"]
    (tmp_path / "made.yaml").write_text("model: {params: {}}\n")
    convert(v_model, tmp_path / "made.safetensors", overwrite=True)
    assert read_prediction_type(tmp_path / "made.yaml") == "v_prediction"
