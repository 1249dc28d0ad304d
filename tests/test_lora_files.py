"""A LoRA file goes from kohya's names to diffusers' and back as the same LoRA, and diffusers reads what comes out."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dbkit import DbkitError, convert, embedded
from dbkit.lora_files import Adapter, kohya_name, module_name, read_lora, write_lora

UNET, TEXT = "unet.mid_block.attentions.0.transformer_blocks.0", "text_encoder.text_model.encoder.layers.0"
NOTE = "lora_adapter_metadata"


def metadata_of(path) -> dict:
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


def random(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def pair(layer: str, rank=4, inner=(8,), outer=8, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of one layer as diffusers writes them."""
    ones = (1,) * (len(inner) - 1)
    return {
        f"{layer}.lora_A.weight": random(rank, *inner).to(dtype),
        f"{layer}.lora_B.weight": random(outer, rank, *ones).to(dtype),
    }


def write(path, tensors, metadata=None):
    save_file(tensors, path, metadata=metadata)
    return path


def assert_same_tensors(one, two):
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)


def assert_same_lora(one, two):
    one, two = read_lora(one), read_lora(two)
    assert one.keys() == two.keys()
    for name, adapter in one.items():
        assert torch.equal(adapter.down, two[name].down) and torch.equal(adapter.up, two[name].up)
        assert adapter.alpha == pytest.approx(two[name].alpha)


# Names.


@pytest.mark.parametrize("is_sd2", [False, True], ids=["1", "2"])
def test_every_layer_of_stable_diffusion_is_known_by_its_name_alone(is_sd2):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), use_linear_projection=is_sd2, cross_attention_dim=768
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(num_hidden_layers=23 if is_sd2 else 12))
    layers = 0
    for part, module in (("unet", unet), ("text_encoder", text_encoder)):
        for name, layer in module.named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                full = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                assert module_name(kohya_name(part, name)) == (part, full)
                layers += 1
    assert layers == 192 + 3 * 22 + 14 + 3 + 3 + 4 + (23 if is_sd2 else 12) * 6


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn1_to_q",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn3_to_q",
        "lora_unet_down_blocks_0_attentions_0_proj__in",
        "lora_te_text_model_encoder_layers_0_self_attn_q",
        "lora_te_encoder_layers_0_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "unet.down_blocks.0.attentions.0.proj_in",
        "",
    ],
)
def test_other_names_are_no_layers(name):
    assert module_name(name) is None


# diffusers' names to kohya's and back.


@pytest.fixture(scope="module")
def by_diffusers(tmp_path_factory):
    """What diffusers saves of a LoRA whose alpha is not its rank, of the model that dbkit carries; do not change it."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("by-diffusers")
    pipeline = StableDiffusionPipeline.from_pretrained(embedded.MODEL)
    targets = {
        "unet": ["to_q", "to_out.0", "proj_in", "conv1", "ff.net.2"],
        "text_encoder": [*(f"{x}_proj" for x in ("q", "k", "v", "out")), "fc1"],
    }
    saved = {}
    for part, names in targets.items():
        module = getattr(pipeline, part)
        settings = LoraConfig(
            r=4,
            lora_alpha=6 if part == "unet" else 4,
            target_modules=names,
            rank_pattern={"conv1": 2},
            alpha_pattern={"conv1": 3},
        )
        module.add_adapter(settings)
        layers = get_peft_model_state_dict(module, adapter_name="default")
        if part == "text_encoder":  # as transformers before 5 names them, which every version reads
            layers = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in layers.items()}
        saved[f"{part}_lora_layers"] = {name: random(*tensor.shape) * 0.05 for name, tensor in layers.items()}
        saved[f"{part}_lora_adapter_metadata"] = {
            key: list(value) if isinstance(value, set) else value
            for key, value in module.peft_config["default"].to_dict().items()
        }
    StableDiffusionPipeline.save_lora_weights(folder, **saved)
    return folder / "pytorch_lora_weights.safetensors"


def test_what_diffusers_saved_comes_back_from_kohyas_names_bit_for_bit(by_diffusers, tmp_path):
    kohya = convert(by_diffusers, tmp_path / "kohya.safetensors")
    assert all(name.startswith(("lora_unet_", "lora_te_")) for name in load_file(kohya))
    assert_same_lora(by_diffusers, kohya)
    adapters = read_lora(kohya)
    alphas = {name: (len(a.down), a.alpha) for name, a in adapters.items()}
    assert {v for n, v in alphas.items() if n.endswith("conv1")} == {(2, 3)}
    assert {v for n, v in alphas.items() if n.startswith("lora_te_")} == {(4, 4)}
    assert {v for n, v in alphas.items() if n.endswith("to_q")} == {(4, 6)}
    back = convert(kohya, tmp_path / "back.safetensors")
    assert_same_tensors(by_diffusers, back)
    assert_same_lora(by_diffusers, back)
    again = convert(back, tmp_path / "again.safetensors")
    assert_same_tensors(kohya, again)


def test_both_forms_draw_the_same_in_diffusers(by_diffusers, tmp_path):
    kohya = convert(by_diffusers, tmp_path / "kohya.safetensors")
    back = convert(kohya, tmp_path / "back.safetensors")
    plain, *others = (picture(path) for path in (None, by_diffusers, kohya, back))
    assert np.abs(others[0] - plain).mean() > 3
    assert max(np.abs(other - others[0]).max() for other in others) <= 1


def picture(lora) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(embedded.MODEL)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    side = pipeline.unet.config.sample_size
    options = {"latents": random(1, 4, side, side), "guidance_scale": 3, "num_inference_steps": 6}
    return np.asarray(
        pipeline("a dog", height=embedded.RESOLUTION, width=embedded.RESOLUTION, **options).images[0], int
    )


@pytest.mark.parametrize("alphas", [True, False])
def test_what_diffusers_loaded_and_saved_again_is_the_same_lora(by_diffusers, tmp_path, alphas):
    """Where ranks differ and no alpha is said, its note then names modules with a ^ before them."""
    source = convert(by_diffusers, tmp_path / "source.safetensors")
    if not alphas:
        source = write(tmp_path / "source.safetensors", load_file(by_diffusers))
    pipeline = StableDiffusionPipeline.from_pretrained(embedded.MODEL)
    pipeline.load_lora_weights(tmp_path, weight_name=source.name, adapter_name="it")
    saved = {}
    for part in ("unet", "text_encoder"):
        module = getattr(pipeline, part)
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(module, adapter_name="it")
        saved[f"{part}_lora_adapter_metadata"] = {
            key: list(value) if isinstance(value, set) else value
            for key, value in module.peft_config["it"].to_dict().items()
        }
    StableDiffusionPipeline.save_lora_weights(tmp_path / "again", **saved)
    again = tmp_path / "again" / "pytorch_lora_weights.safetensors"
    assert_same_lora(source, again)
    patterns = json.loads(metadata_of(again)[NOTE])["unet.alpha_pattern"]
    assert patterns and any(name.startswith("^") for name in patterns) != alphas


def test_the_names_of_transformers_5_and_the_old_ones_of_diffusers_are_read_too(tmp_path):
    wanted = convert(
        write(tmp_path / "a.safetensors", {**pair(f"{UNET}.attn1.to_out.0"), **pair(f"{TEXT}.mlp.fc1")}),
        tmp_path / "wanted.safetensors",
    )
    old = {
        f"{UNET}.attn1.processor.to_out_lora.down.weight": random(4, 8),
        f"{UNET}.attn1.processor.to_out_lora.up.weight": random(8, 4),
        "text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": random(4, 8),
        "text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": random(8, 4),
    }
    assert_same_tensors(wanted, convert(write(tmp_path / "old.safetensors", old), tmp_path / "new.safetensors"))


# What is said of the LoRA.


def test_alphas_that_are_the_rank_need_no_note(tmp_path):
    source = write(tmp_path / "a.safetensors", pair(f"{UNET}.attn1.to_q"))
    back = convert(convert(source, tmp_path / "kohya.safetensors"), tmp_path / "back.safetensors")
    assert NOTE not in metadata_of(back)
    assert metadata_of(back)["ss_v2"] == "False"


def test_the_note_says_what_differs_by_the_names_of_every_version(by_diffusers, tmp_path):
    back = convert(convert(by_diffusers, tmp_path / "kohya.safetensors"), tmp_path / "back.safetensors")
    noted = json.loads(metadata_of(back)[NOTE])
    assert (noted["unet.r"], noted["unet.lora_alpha"], noted["text_encoder.lora_alpha"]) == (4, 6, 4)
    assert set(noted["unet.rank_pattern"].values()) == {2} and noted["text_encoder.alpha_pattern"] == {}
    assert all(name.startswith("encoder.layers.") for name in noted["text_encoder.target_modules"])


def test_the_root_of_the_rank_becomes_an_alpha(tmp_path):
    noted = {"unet.lora_alpha": 8, "unet.use_rslora": True}
    source = write(tmp_path / "a.safetensors", pair(f"{UNET}.attn1.to_q"), {NOTE: json.dumps(noted)})
    (adapter,) = read_lora(convert(source, tmp_path / "b.safetensors")).values()
    assert adapter.alpha / len(adapter.down) == 8 / 4**0.5


@pytest.mark.parametrize(
    ("tensors", "second"),
    [
        (pair(f"{UNET}.attn2.to_k", inner=(1024,)), True),
        (pair(f"{UNET}.attn2.to_k", inner=(768,)), False),
        (pair("unet.mid_block.attentions.0.proj_in"), True),
        (pair("unet.mid_block.attentions.0.proj_in", inner=(8, 1, 1)), False),
        (pair(f"{TEXT}.self_attn.q_proj", inner=(1024,)), True),
        (pair(f"{TEXT}.self_attn.q_proj", inner=(768,)), False),
    ],
)
def test_user_interfaces_are_told_the_version(tmp_path, tensors, second):
    source = write(tmp_path / "a.safetensors", tensors)
    found = metadata_of(convert(source, tmp_path / "b.safetensors"))
    assert found["ss_v2"] == str(second) and found["ss_base_model_version"] == f"sd_v{2 if second else 1}"
    assert found["ss_network_dim"] == "4" and found["ss_output_name"] == "b"
    # Whether a Stable Diffusion 2 predicts v no tensor shows.
    assert found.get("modelspec.architecture") == (None if second else "stable-diffusion-v1/lora")
    v = metadata_of(convert(source, tmp_path / "v.safetensors", prediction_type="v_prediction"))
    assert v["modelspec.architecture"] == ("stable-diffusion-v2-768-v/lora" if second else "stable-diffusion-v1/lora")
    assert v["modelspec.prediction_type"] == "v"


def test_what_a_file_says_stays_but_for_hashes_of_its_bytes(tmp_path):
    said = {"ss_output_name": "dog", "ss_v2": "True", "modelspec.title": "Dog", "mine": "1", "sshs_model_hash": "ab"}
    source = write(tmp_path / "a.safetensors", pair(f"{UNET}.attn1.to_q"), said)
    for path in (
        convert(source, tmp_path / "b.safetensors"),
        convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors"),
    ):
        found = metadata_of(path)
        assert {name: found.get(name) for name in said} == {**said, "sshs_model_hash": None}


@pytest.mark.parametrize(
    ("precision", "dtype"), [(None, torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_precision_is_kept_or_as_asked(tmp_path, precision, dtype):
    source = write(tmp_path / "a.safetensors", pair(f"{UNET}.attn1.to_q", dtype=torch.bfloat16))
    kohya = convert(source, tmp_path / "b.safetensors", save_precision=precision)
    assert {tensor.dtype for tensor in load_file(kohya).values()} == {dtype}
    again = convert(convert(kohya, tmp_path / "c.safetensors"), tmp_path / "d.safetensors")
    assert_same_tensors(kohya, again)


def test_an_alpha_that_its_layers_type_cannot_hold_keeps_its_value(tmp_path):
    noted = {NOTE: json.dumps({"unet.lora_alpha": 0.1})}
    source = write(tmp_path / "a.safetensors", pair(f"{UNET}.attn1.to_q", dtype=torch.float16), noted)
    alpha = load_file(convert(source, tmp_path / "b.safetensors"))[
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha"
    ]
    assert alpha.dtype == torch.float32 and alpha.item() == pytest.approx(0.1, rel=1e-7)


# What is refused.


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            renamed("unet.mid", "transformer.mid"),
            "has layers that Stable Diffusion 1 and 2 do not have: transformer.mid_",
        ),
        (
            renamed("blocks.0", "blocks.3"),
            r"do not have: lora_unet_mid_block_attentions_0_transformer_blocks_3_attn1_to_q",
        ),
        (renamed("unet.mid_block", "base_model.model.mid_block"), "do not have: base_model.model.mid_block"),
        (renamed("lora_A.weight", "lora_A.bias"), r"is no plain LoRA; it has unet\.\S+\.lora_A\.bias, "),
        (lambda t: {**t, f"{UNET}.attn1.to_q.lora_magnitude_vector": torch.ones(8)}, "is no plain LoRA; it has"),
        (lambda t: {**t, f"{UNET}.attn1.to_q.lora.down.weight": torch.ones(4, 8)}, "is no plain LoRA; it has"),
        (lambda t: {name: tensor * float("nan") for name, tensor in t.items()}, "weights that are not numbers"),
        (lambda t: {name: (tensor * 10).to(torch.int8) for name, tensor in t.items()}, "is no plain LoRA; it has"),
    ],
    ids=["family", "SDXL", "peft", "half", "DoRA", "twice", "nan", "int8"],
)
def test_odd_files_are_refused_and_nothing_is_left(tmp_path, change, sentence):
    source = write(tmp_path / "a.safetensors", change(pair(f"{UNET}.attn1.to_q")))
    with pytest.raises(DbkitError, match=sentence):
        convert(source, tmp_path / "b.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


@pytest.mark.parametrize("noted", ["{", "[" * 100_000])
def test_a_note_that_is_no_json_is_said(tmp_path, noted):
    source = write(tmp_path / "a.safetensors", pair(f"{UNET}.attn1.to_q"), {NOTE: noted})
    with pytest.raises(
        DbkitError, match=r"a.safetensors is damaged \(its lora_adapter_metadata: .*\); download or copy it"
    ):
        convert(source, tmp_path / "b.safetensors")


def test_a_cut_file_is_said(tmp_path):
    source = write(tmp_path / "a.safetensors", pair(f"{UNET}.attn1.to_q"))
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(DbkitError, match=r"a.safetensors is damaged"):
        convert(source, tmp_path / "b.safetensors")


def test_a_value_that_fp16_cannot_hold_is_said(tmp_path):
    source = write(tmp_path / "a.safetensors", {n: t * 1e6 for n, t in pair(f"{UNET}.attn1.to_q").items()})
    with pytest.raises(
        DbkitError, match="of the LoRA is no number or does not fit in fp16; set save_precision to bf16"
    ):
        convert(source, tmp_path / "b.safetensors", save_precision="fp16")
    assert not (tmp_path / "b.safetensors").exists()


def test_the_destination_is_another_file_that_may_be_replaced(tmp_path):
    source = write(tmp_path / "a.safetensors", pair(f"{UNET}.attn1.to_q"))
    with pytest.raises(DbkitError, match=r"a LoRA is a file of its own, and .*b is none; end it in .safetensors"):
        convert(source, tmp_path / "b")
    with pytest.raises(DbkitError, match=r"a.safetensors is the source, which would be replaced; choose another"):
        convert(source, source, overwrite=True)
    taken = shutil.copy(source, tmp_path / "b.safetensors")
    with pytest.raises(DbkitError, match=r"b.safetensors exists; choose another name, or set overwrite"):
        convert(source, taken)
    assert any(name.startswith("lora_unet_") for name in load_file(convert(source, taken, overwrite=True)))


def test_a_file_that_holds_another_lora_than_it_should_is_noticed(tmp_path):
    adapters = read_lora(write(tmp_path / "a.safetensors", pair(f"{UNET}.attn1.to_q")))
    ((name, adapter),) = adapters.items()
    for wrong in (
        {name: adapter._replace(alpha=5.0)},
        {name: adapter._replace(up=adapter.up + 1)},
        {name: adapter._replace(down=adapter.down * 1.001)},
        {**adapters, name.replace("to_q", "to_k"): Adapter(*adapter)},
    ):
        with pytest.raises(DbkitError, match=r"reads back as another LoRA \(lora_unet_mid"):
            write_lora(load_file(tmp_path / "a.safetensors"), wrong, tmp_path / "b.safetensors", None, {})


def test_matrices_of_different_ranks_are_refused(tmp_path):
    tensors = pair(f"{UNET}.attn1.to_q")
    tensors[f"{UNET}.attn1.to_q.lora_B.weight"] = random(8, 3)
    path = write(tmp_path / "odd.safetensors", tensors)
    expected = r"odd\.safetensors has matrices that do not fit together \(rank 4 and 3 in lora_unet_mid_block_\w+to_q\)"
    with pytest.raises(DbkitError, match=expected):
        convert(path, tmp_path / "made.safetensors")


@pytest.mark.parametrize("layer", ["attn2.to_k", "attn2.to_v"])
def test_a_lora_of_stable_diffusion_xl_is_known_by_its_widths(tmp_path, layer):
    path = write(tmp_path / "xl.safetensors", pair(f"{UNET}.{layer}", inner=(2048,), outer=1280))
    with pytest.raises(DbkitError, match=r"xl\.safetensors is a LoRA of a Stable Diffusion XL model .* reads 2048 val"):
        convert(path, tmp_path / "made.safetensors")


def test_quantised_weights_are_refused(tmp_path):
    path = write(tmp_path / "odd.safetensors", pair(f"{UNET}.attn1.to_q", dtype=torch.float8_e4m3fn))
    with pytest.raises(
        DbkitError, match=r"odd\.safetensors has unet\..* in (float8_e4m3fn|F8_E4M3); take the file in fp16"
    ):
        convert(path, tmp_path / "made.safetensors")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pretrained_vae_name_or_path", "some.vae.pt"),
        ("extract_ema", True),
        ("tokenizer_name", "a/b"),
        ("license", "mit"),
    ],
)
def test_settings_of_whole_models_are_refused(by_diffusers, tmp_path, setting, value):
    with pytest.raises(DbkitError, match=rf"{setting} is for whole models, and .* is a LoRA; leave it out"):
        convert(by_diffusers, tmp_path / "made.safetensors", **{setting: value})
