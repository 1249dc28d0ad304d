"""LoRA: adapters compute what they should, resume exactly, and are the same model in every place they are loaded."""

import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import assert_equal, state_of, stop_in_pass
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_pre_hook

from dbkit import DbkitError, TrainConfig, convert, draws, embedded, merge, preview, train
from dbkit.checkpoint import find_fault
from dbkit.cli import main
from dbkit.lora import (
    add_lora,
    find_source,
    load_lora,
    load_source,
    lora_file,
    lora_layers,
    merge_lora,
    noted_source,
    save_lora,
)
from dbkit.lora_files import kohya_name, read_lora
from dbkit.models import load_models, model_facts, read_weights, save_models
from dbkit.settings import replace

PARTS = ("unet", "text_encoder")
IDS = torch.arange(77)[None]


@pytest.fixture
def models(model):
    return load_models(model)


@pytest.fixture
def lora(config):
    """Settings of a LoRA in both parts."""
    return replace(config, adapter="lora", lora_rank=4, lora_alpha=2.0, train_text_encoder=True)


@pytest.fixture
def linear_models(models):
    """The small model with the linear projections of Stable Diffusion 2."""
    models.unet = UNet2DConditionModel.from_config({**models.unet.config, "use_linear_projection": True})
    return models


def add_filled(models, config):
    """New adapters with random numbers in place of the zeros that they begin with."""
    random = torch.Generator().manual_seed(0)
    layers = add_lora(models, config)
    for part in layers.values():
        for layer in part.values():
            torch.nn.init.normal_(layer["lora_up"].weight, std=0.1, generator=random)
    return layers


@pytest.fixture
def file(models, lora, tmp_path):
    """A LoRA file with random numbers, of the small model."""
    add_filled(models, lora)
    return saved(models, lora, tmp_path / "lora")


def saved(models, config, folder) -> Path:
    folder.mkdir()
    save_lora(models, folder, config, "thing")
    return folder / "thing.safetensors"


def output(models, size=8) -> torch.Tensor:
    """What the U-Net makes of fixed noise and a fixed text."""
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return models.unet(noise, 500, models.text_encoder(IDS).last_hidden_state).sample


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    return bool((one - two).abs().max() < 1e-5 * one.abs().max())


def beside(layer, inputs, result, adapter, scale):
    """A layer's result with that of an adapter added: the definition of LoRA, as a hook."""
    if isinstance(layer, torch.nn.Linear):
        return result + scale * functional.linear(functional.linear(inputs[0], adapter.down), adapter.up)
    inner = functional.conv2d(inputs[0], adapter.down, stride=layer.stride, padding=layer.padding)
    return result + scale * functional.conv2d(inner, adapter.up)


# What is computed.


@pytest.mark.parametrize("choice", ["attention", "transformer", "all"])
def test_the_live_model_equals_a_slow_reference(model, models, lora, tmp_path, choice):
    lora = replace(lora, lora_modules=choice)
    before = output(models)
    add_filled(models, lora)
    adapters = read_lora(saved(models, lora, tmp_path / "lora"))
    reference = load_models(model)
    for part in PARTS:
        for name, layer in getattr(reference, part).named_modules():
            if adapter := adapters.pop(kohya_name(part, name), None):
                assert adapter.alpha == 2 and len(adapter.down) == 4
                layer.register_forward_hook(functools.partial(beside, adapter=adapter, scale=2 / 4))
    assert not adapters
    assert close(output(models), output(reference))
    assert not close(output(models), before)


@pytest.mark.parametrize("choice", ["attention", "transformer", "all"])
def test_each_choice_takes_the_layers_that_it_names(models, lora, choice):
    """Those that sd-scripts takes: `transformer` is its default, `all` is with its convolutions."""
    attention = {f"attn{n}.to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out.0")}
    transformer = attention | {"ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"}
    conv = {"conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"}
    ends = {"attention": attention, "transformer": transformer, "all": transformer | conv}[choice]
    text_ends = {"q_proj", "k_proj", "v_proj", "out_proj"} | (set() if choice == "attention" else {"fc1", "fc2"})
    expected = {
        part: {kohya_name(part, n) for n, _ in getattr(models, part).named_modules() if n.endswith(tuple(which))}
        for part, which in (("unet", ends), ("text_encoder", text_ends))
    }
    layers = add_lora(models, replace(lora, lora_modules=choice))
    assert {part: set(found) for part, found in layers.items()} == expected
    assert min(map(len, expected.values())) >= 8


def test_new_adapters_change_nothing_and_alone_are_trained(models, lora):
    before = output(models)
    models.unet.requires_grad_(True)
    layers = add_lora(models, replace(lora, train_text_encoder=False))
    assert list(layers) == ["unet"]
    assert torch.equal(output(models), before)
    wanted = {id(weight) for weight in layers["unet"].parameters()}
    assert {id(weight) for weight in models.unet.parameters() if weight.requires_grad} == wanted
    assert not any(weight.requires_grad for weight in models.text_encoder.parameters())
    assert all(weight.dtype == torch.float32 for weight in layers["unet"].parameters())


def test_first_weights_are_a_function_of_the_seed_alone(model, lora):
    def first(seed, global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        layers = add_lora(load_models(model), replace(lora, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([weight.detach().flatten() for part in layers.values() for weight in part.parameters()])

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(first(0, 1), first(0, 2))
        assert not torch.equal(first(0, 1), first(1, 1))


def test_no_two_layers_begin_alike_and_none_beyond_its_bound(models, lora):
    downs = [layer["lora_down"].weight for part in add_lora(models, lora).values() for layer in part.values()]
    assert len({weight.detach().numpy().tobytes() for weight in downs}) == len(downs)
    for weight in downs:
        bound = weight[0].numel() ** -0.5
        assert 0.9 * bound < weight.abs().max() <= bound


def test_gradient_checkpointing_changes_no_gradient(model, lora):
    def gradients(checkpointing):
        models = load_models(model)
        layers = add_filled(models, replace(lora, lora_modules="all"))
        if checkpointing:
            models.unet.enable_gradient_checkpointing()
            models.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
        text = models.text_encoder.train()(IDS).last_hidden_state
        models.unet.train()(torch.ones(1, 4, 8, 8), 500, text).sample.square().sum().backward()
        return {f"{part} {n}": w.grad for part in PARTS for n, w in layers[part].named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(grad.abs().max() > 0 for grad in plain.values())
    assert all(torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-6) for name in plain)


def test_quantisation_libraries_are_not_asked(models, lora, monkeypatch):
    """peft raises this where torchao is older than it wants, as on Colab, though no layer is torchao's."""

    def too_old():
        raise ImportError("Found an incompatible version of torchao")

    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", too_old)
    assert len(add_lora(models, lora)) == 2


# A run.


def test_training_changes_the_adapters_and_nothing_else(lora, model):
    seen = {}

    def remember(module, inputs):
        if isinstance(module, UNet2DConditionModel):
            seen["unet"] = module

    handle = register_module_forward_pre_hook(remember)
    try:
        run = train(lora).parent
    finally:
        handle.remove()
    original = load_models(model).unet.state_dict()
    live = {name.replace(".base_layer", ""): weight for name, weight in seen["unet"].state_dict().items()}
    assert all(torch.equal(live.pop(name), weight) for name, weight in original.items())
    assert live and all("lora_" in name for name in live)
    ups = [weight for name, weight in state_of(run).items() if "lora_up" in name]
    assert len(ups) == len(live) // 2 + 2 * 4
    assert all(weight.abs().max() > 0 for weight in ups)


@pytest.mark.parametrize("changes", [{"lora_modules": "all"}, {"gradient_checkpointing": True}], ids=["all", "saving"])
def test_a_stopped_run_goes_on_to_the_same_result(lora, tmp_path, changes):
    lora = replace(lora, max_train_steps=5, save_model_every_n_steps=2, **changes)
    straight, stopped = tmp_path / "a" / "run", tmp_path / "b" / "run"
    train(lora, output_dir=straight)
    stop_in_pass(lora, 3, 3, output_dir=stopped)
    train(lora, output_dir=stopped)
    assert_equal(state_of(straight), state_of(stopped))
    for folder in ("model", "checkpoints/step_000004"):
        one, two = (load_file(lora_file(run / folder)) for run in (straight, stopped))
        assert_equal(one, two)


def test_a_run_leaves_small_files_named_after_it(lora, tmp_path):
    run = tmp_path / "my dog"
    assert train(lora, output_dir=run, save_model_every_n_steps=1) == run / "model"
    assert {path.name for path in (run / "model").iterdir()} == {"my dog.safetensors", "lora.json", "manifest.json"}
    assert find_fault(run / "model", step=2) is None
    assert lora_file(run / "checkpoints" / "step_000001").name == "my dog-000001.safetensors"
    (state,) = (run / "resume").iterdir()
    # Of the model itself nothing is saved.
    assert all(name.startswith("lora_unet_") for name in load_file(state / "unet.safetensors"))


def test_a_finished_run_can_be_trained_further(lora, capsys):
    first = load_file(lora_file(train(lora)))
    further = load_file(lora_file(train(lora, max_train_steps=3)))
    assert "continuing after step 2" in capsys.readouterr().out
    assert not torch.equal(
        *(tensors[next(name for name in tensors if "lora_up" in name)] for tensors in (first, further))
    )


def test_another_rank_does_not_continue_a_run(lora):
    train(lora)
    with pytest.raises(DbkitError, match="lora_rank was 4 and is 8"):
        train(lora, lora_rank=8)


def test_a_missing_peft_is_said_before_the_model_is_loaded(lora, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)
    with pytest.raises(
        DbkitError, match=r'LoRA needs peft, which does not work here .*; pip install --upgrade "peft>='
    ):
        train(lora)


# The file.


def test_the_file_has_the_names_and_shapes_that_user_interfaces_know(models, lora, tmp_path):
    lora = replace(lora, lora_modules="all", save_precision="fp16")
    add_filled(models, lora)
    tensors = load_file(saved(models, lora, tmp_path / "lora"))
    block = "lora_unet_down_blocks_0_attentions_0"
    shapes = {
        f"{block}_transformer_blocks_0_attn2_to_k": ([4, 64], [32, 4]),
        f"{block}_transformer_blocks_0_attn1_to_out_0": ([4, 32], [32, 4]),
        f"{block}_transformer_blocks_0_ff_net_0_proj": ([4, 32], [256, 4]),
        f"{block}_proj_in": ([4, 32, 1, 1], [32, 4, 1, 1]),
        "lora_unet_down_blocks_0_downsamplers_0_conv": ([4, 32, 3, 3], [32, 4, 1, 1]),
        "lora_unet_mid_block_resnets_1_conv2": ([4, 96, 3, 3], [96, 4, 1, 1]),
        "lora_unet_mid_block_resnets_0_time_emb_proj": ([4, 128], [96, 4]),
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj": ([4, 64], [64, 4]),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": ([4, 64], [256, 4]),
    }
    for name, (down, up) in shapes.items():
        assert list(tensors[f"{name}.lora_down.weight"].shape) == down
        assert list(tensors[f"{name}.lora_up.weight"].shape) == up
        assert tensors[f"{name}.alpha"].item() == 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}


def metadata_of(path) -> dict:
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def test_the_metadata_say_what_user_interfaces_ask_and_no_path(lora, file, tmp_path, model):
    found = metadata_of(file)
    expected = {
        "ss_output_name": "thing",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": model.name,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "thing",
        "modelspec.trigger_phrase": "photo of zwx thing",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "64x64",
    }
    assert {name: found.get(name) for name in expected} == expected
    settings = json.loads(found["dbkit.train"])
    assert settings["lora_rank"] == 4 and settings["pretrained_model_name_or_path"] == model.name
    assert not {"hub_token", "instance_data_dir", "output_dir"} & settings.keys()
    assert not any(str(folder) in value for value in found.values() for folder in (tmp_path, model.parent))


def test_a_lora_of_stable_diffusion_2_says_so_and_has_linear_projections(linear_models, lora, tmp_path):
    lora = replace(lora, lora_modules="transformer")
    linear_models.noise_scheduler.register_to_config(prediction_type="v_prediction")
    add_filled(linear_models, lora)
    path = saved(linear_models, lora, tmp_path / "lora")
    found = metadata_of(path)
    # Without this A1111 hides it among the models of Stable Diffusion 2.
    assert found["ss_v2"] == "True"
    assert (found["ss_base_model_version"], found["modelspec.prediction_type"]) == ("sd_v2_v", "v")
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    name = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    assert list(load_file(path)[name].shape) == [4, 96]


def test_weights_that_do_not_fit_in_fp16_are_not_written(models, lora, tmp_path):
    next(iter(add_filled(models, lora)["unet"].parameters())).data.fill_(1e6)
    with pytest.raises(DbkitError, match=r"the weight lora_unet_.* of the LoRA is no number or does not fit in fp16"):
        saved(models, replace(lora, save_precision="fp16"), tmp_path / "lora")


def old_diffusers(name: str) -> str:
    """A PEFT name as diffusers spelled it before it used PEFT."""
    name = name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
    for layer in ("to_q", "to_k", "to_v"):
        name = name.replace(f".{layer}.lora.", f".processor.{layer}_lora.")
    name = name.replace(".to_out.0.lora.", ".processor.to_out_lora.")
    return name.replace("_proj.lora.", "_proj.lora_linear_layer.")


def test_diffusers_own_files_in_both_of_its_spellings_are_the_same_lora(models, lora, file, tmp_path):
    from peft import get_peft_model_state_dict

    layers = {part: get_peft_model_state_dict(getattr(models, part), adapter_name="default") for part in PARTS}
    facts = {part: getattr(models, part).peft_config["default"].to_dict() for part in PARTS}
    for part in PARTS:  # peft's sets are no JSON
        facts[part] = {key: value for key, value in facts[part].items() if key in ("r", "lora_alpha", "alpha_pattern")}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=facts["unet"],
        text_encoder_lora_adapter_metadata=facts["text_encoder"],
    )
    by_diffusers = tmp_path / "pytorch_lora_weights.safetensors"
    wanted, found = read_lora(file), read_lora(by_diffusers)
    assert_same_adapters(wanted, found)
    # Older files have no alphas: their scale is 1.
    old = {old_diffusers(name): tensor for name, tensor in load_file(by_diffusers).items()}
    assert any("processor.to_out_lora.up" in name for name in old) and any("lora_linear_layer" in name for name in old)
    save_file(old, tmp_path / "old.safetensors")
    assert_same_adapters(
        {name: adapter._replace(alpha=4) for name, adapter in wanted.items()}, read_lora(tmp_path / "old.safetensors")
    )


def assert_same_adapters(one, two):
    assert one.keys() == two.keys()
    for name, adapter in one.items():
        assert torch.equal(adapter.down, two[name].down) and torch.equal(adapter.up, two[name].up)
        assert adapter.alpha == two[name].alpha


# Loading and merging.


def test_a_file_is_the_model_that_it_was_saved_from(models, model, file):
    loaded, merged = load_models(model), load_models(model)
    load_lora(loaded, file)
    merge_lora(merged, file)
    assert close(output(models), output(loaded))
    assert close(output(models), output(merged))
    assert_same_adapters(*(read_lora(path) for path in (file, resaved(loaded, file))))


def resaved(models, path) -> Path:
    """The live adapters of a model, with the alphas of a file, as another file."""
    tensors = {name: tensor for name, tensor in load_file(path).items() if name.endswith(".alpha")}
    for layers in lora_layers(models).values():
        tensors |= {name: weight.contiguous() for name, weight in layers.state_dict().items()}
    save_file(tensors, path.with_name("again.safetensors"))
    return path.with_name("again.safetensors")


@pytest.mark.parametrize("choice", ["attention", "all"])
@pytest.mark.parametrize("scale", [0.5, -1.0])
def test_merged_weights_are_the_sum(model, models, lora, tmp_path, scale, choice):
    lora = replace(lora, lora_modules=choice)
    add_filled(models, lora)
    path = saved(models, lora, tmp_path / "lora")
    beside_it, merged = load_models(model), load_models(model)
    load_lora(beside_it, path, scale)
    merge_lora(merged, path, scale)
    assert close(output(beside_it), output(merged))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    adapter = read_lora(path)[kohya_name("unet", name)]
    wanted = load_models(model).unet.get_submodule(name).weight + scale * 0.5 * adapter.up @ adapter.down
    assert torch.allclose(merged.unet.get_submodule(name).weight, wanted, rtol=1e-6, atol=1e-7)


def test_ranks_and_alphas_may_differ_from_layer_to_layer(model, file):
    tensors = load_file(file)
    names = sorted(name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha"))
    for number, name in enumerate(names):
        rank = 1 + number % 4
        tensors[f"{name}.lora_down.weight"] = tensors[f"{name}.lora_down.weight"][:rank].clone()
        tensors[f"{name}.lora_up.weight"] = tensors[f"{name}.lora_up.weight"][:, :rank].clone()
        tensors[f"{name}.alpha"] = torch.tensor(0.5 + number % 3)
    del tensors[f"{names[0]}.alpha"]
    save_file(tensors, file)
    assert read_lora(file)[names[0]].alpha == 1
    loaded, merged = load_models(model), load_models(model)
    load_lora(loaded, file)
    merge_lora(merged, file)
    assert close(output(loaded), output(merged))


def foreign(file, change) -> Path:
    path = file.with_name("foreign.safetensors")
    save_file(change(load_file(file)), path)
    return path


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("put", [load_lora, merge_lora])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            renamed("lora_te_", "lora_te2_"),
            "is a LoRA of another kind of model: this one has no lora_te2_text_model_enc",
        ),
        (
            renamed("unet_down_blocks_0", "unet_input_blocks_4"),
            "this one has no lora_unet_input_blocks_4_attentions_0_",
        ),
        (renamed("lora_down", "hada_w1_a"), r"is no plain LoRA; it has lora_te\S+\.hada_w1_a\.weight, "),
        (
            lambda tensors: {"emb_params": torch.zeros(2, 64)},
            "is no plain LoRA; it has emb_params; choose another file",
        ),
        (renamed("lora_up.weight", "alpha"), r"is no plain LoRA; it has lora_\S+\.alpha, "),
        (lambda tensors: {}, "is no plain LoRA; choose another file"),
        (
            lambda tensors: {n: t for n, t in tensors.items() if "mid_block" not in n or "to_v.lora_up" not in n},
            "is no plain LoRA; it has lora_unet_mid_block",
        ),
        (
            lambda tensors: {
                n: t.repeat(1, 2) if t.ndim == 2 and "attn2_to_k.lora_d" in n else t for n, t in tensors.items()
            },
            r"attn2_to_k is \(4, 128\) and \(32, 4\) for a layer of \(32, 64\)",
        ),
        (
            lambda tensors: {n: t.flatten() for n, t in tensors.items()},
            "is no plain LoRA; it has lora_te",
        ),
        (lambda tensors: {n: t[:0] for n, t in tensors.items() if t.ndim}, "is no plain LoRA; it has lora_te"),
        (
            lambda tensors: {n: t * float("nan") if "attn1_to_q.lora_up" in n else t for n, t in tensors.items()},
            r"has weights that are not numbers \(lora_unet_.*attn1_to_q",
        ),
        (
            lambda tensors: {n: t * float("inf") if "attn1_to_q.alpha" in n else t for n, t in tensors.items()},
            r"has weights that are not numbers \(lora_unet_.*attn1_to_q",
        ),
    ],
    ids=["te2", "names", "LoHa", "embedding", "alphas", "empty", "half", "widths", "vectors", "nothing", "nan", "inf"],
)
def test_a_file_that_is_none_of_this_model_is_refused(model, file, change, sentence, put):
    models = load_models(model)
    before = models.unet.state_dict()
    with pytest.raises(DbkitError, match=sentence):
        put(models, foreign(file, change))
    assert_equal(before, models.unet.state_dict())


def test_a_damaged_file_is_refused(models, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DbkitError, match=r"lora.safetensors is damaged or no .safetensors file"):
        merge_lora(models, tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    "noted", ["[]", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": [1]}', '{"unet.lora_alpha": NaN}']
)
def test_a_file_with_odd_metadata_is_refused(file, noted):
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(".alpha")}
    save_file(tensors, file, metadata={"lora_adapter_metadata": noted})
    with pytest.raises(DbkitError, match="has weights that are not numbers"):
        read_lora(file)


# What a run's folder is good for.


@pytest.fixture(scope="module")
def embedded_run(tmp_path_factory) -> Path:
    """A short LoRA run on the embedded model, in every layer, far enough for its pictures to be others."""
    return train(
        pretrained_model_name_or_path=embedded.NAME,
        instance_data_dir=embedded.data_templates() / "poodle",
        instance_prompt="photo of zwx dog",
        output_dir=tmp_path_factory.mktemp("runs") / "poodle",
        resolution=embedded.RESOLUTION,
        adapter="lora",
        lora_modules="all",
        train_text_encoder=True,
        learning_rate=2e-3,
        max_train_steps=10,
        guidance_scale=3,
        save_precision="fp32",
        device="cpu",
    ).parent


def pixels(*paths) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path), int) for path in paths])


SETTINGS = {"prompt": ["photo of zwx dog"], "num_per_prompt": 1, "guidance_scale": [3], "device": "cpu"}


def test_a_lora_draws_the_same_wherever_it_is_loaded(embedded_run, tmp_path):
    live, before = (pixels(*(embedded_run / "previews" / f"step_{n:06d}").glob("01-*")) for n in (10, 0))
    assert np.abs(live - before).mean() > 3
    file = lora_file(embedded_run / "model")
    shutil.copy(file, tmp_path / "other.safetensors")
    merged = merge(file, tmp_path / "merged", save_precision="fp32")
    convert(convert(merged, tmp_path / "merged.safetensors"), tmp_path / "there and back")
    for number, given in enumerate(
        (
            {"model": embedded_run / "model"},
            {"model": file},
            {"model": embedded.NAME, "lora": tmp_path / "other.safetensors"},
            {"model": embedded.MODEL, "lora": embedded_run / "model"},
            {"model": merged},
            {"model": tmp_path / "there and back"},
        )
    ):
        made = preview(**given, **SETTINGS, output=tmp_path / f"{number}.png").pictures
        assert np.abs(pixels(*made) - live).max() <= 1


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_diffusers_draws_the_same_from_the_file(embedded_run, tmp_path, names):
    file = lora_file(embedded_run / "model")
    if names == "diffusers":
        file = convert(file, tmp_path / "converted.safetensors")
        assert all(name.startswith(("unet.", "text_encoder.")) for name in load_file(file))
    pipeline = StableDiffusionPipeline.from_pretrained(embedded.MODEL)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    side = pipeline.unet.config.sample_size
    noise = draws.generator(42, "preview").standard_normal((1, 4, side, side))
    picture = pipeline(
        "photo of zwx dog",
        latents=torch.from_numpy(noise).float(),
        guidance_scale=3,
        num_inference_steps=25,
        height=embedded.RESOLUTION,
        width=embedded.RESOLUTION,
    ).images[0]
    live = pixels(*(embedded_run / "previews" / "step_000010").glob("01-*"))
    assert np.abs(np.asarray(picture, int) - live[0]).max() <= 1


def test_the_base_is_found_by_the_note_beside_the_lora(embedded_run):
    source = find_source(embedded_run / "model")
    assert source.pretrained_model_name_or_path == embedded.NAME
    assert source.lora == embedded_run / "model" / "poodle.safetensors"
    assert find_source("someone/model").lora is None
    assert close(output(load_source(source), 4), output(load_source(find_source(embedded.MODEL, source.lora)), 4))


def test_other_parts_and_a_rescaled_schedule_are_found_too(lora, v_model, tmp_path, monkeypatch):
    shutil.copytree(v_model / "vae", tmp_path / "other vae")
    monkeypatch.chdir(v_model.parent)
    changes = {"pretrained_vae_name_or_path": str(tmp_path / "other vae"), "rescale_zero_terminal_snr": True}
    made = train(lora, pretrained_model_name_or_path=v_model.name, **changes)
    monkeypatch.chdir(tmp_path)
    source = find_source(made)
    assert source.pretrained_model_name_or_path == str(v_model)
    assert source.pretrained_vae_name_or_path == str(tmp_path / "other vae")
    assert load_source(source).noise_scheduler.alphas_cumprod[-1] == 0


def test_a_base_that_has_changed_or_gone_is_said(lora, copied):
    made = train(lora, pretrained_model_name_or_path=str(copied))
    (copied / "scheduler" / "scheduler_config.json").write_text("{}")
    sentence = (
        rf"the model {copied} that {made} was trained on is not there, or has changed; dbkit merge {made} FOLDER "
        "--pretrained_model_name_or_path MODEL makes a whole model with one you choose"
    )
    with pytest.raises(DbkitError, match=sentence):
        find_source(made)
    shutil.rmtree(copied)
    with pytest.raises(DbkitError, match=sentence):
        find_source(made)
    (made / "lora.json").unlink()
    with pytest.raises(DbkitError, match=r"there is no .*lora.json, which says what model .* belongs to; dbkit merge"):
        noted_source(made)


@pytest.mark.parametrize(
    "change", ["{", "[]", {"fingerprint": None}, {"clip_skip": "two"}, {"lora": "x"}, {"revision": []}]
)
def test_a_damaged_note_is_said(lora, change):
    made = train(lora)
    noted = json.loads((made / "lora.json").read_text())
    if isinstance(change, dict):
        noted |= change
        if change == {"fingerprint": None}:
            del noted["fingerprint"]
    (made / "lora.json").write_text(change if isinstance(change, str) else json.dumps(noted))
    for asked in ((made,), (lora.pretrained_model_name_or_path, made)):
        with pytest.raises(
            DbkitError, match=r"lora.json, which says what model .* belongs to, is damaged; copy it again"
        ):
            find_source(*asked)


def test_a_lora_on_a_model_given_by_hand_is_read_as_it_was_trained(lora, v_model, copied):
    made = train(lora, pretrained_model_name_or_path=str(v_model), clip_skip=2, rescale_zero_terminal_snr=True)
    source = find_source(copied, made)
    assert source.pretrained_model_name_or_path == str(copied) and source.revision is None
    assert source.clip_skip == 2 and source.rescale_zero_terminal_snr
    # A file alone says nothing of it.
    alone = shutil.copy(source.lora, copied / "alone.safetensors")
    assert find_source(copied, alone).clip_skip is None


def test_a_lora_is_no_base_model(lora):
    made = train(lora)
    with pytest.raises(
        DbkitError, match=f"{made} is a LoRA and no whole model; make one of it first: dbkit merge {made} "
    ):
        model_facts(made)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gone", "gone is not there; give a .safetensors file, or the model/ of a run"),
        ("empty", "empty holds no LoRA; give"),
        ("two", "two holds several files; give"),
    ],
)
def test_a_path_without_a_lora_is_refused(tmp_path, name, sentence):
    (tmp_path / "empty").mkdir()
    for file in ("a", "b"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / f"{file}.safetensors").touch()
    with pytest.raises(DbkitError, match=sentence):
        find_source("tiny-sd", tmp_path / name)


# merge().


def test_a_lora_from_elsewhere_is_merged_on_the_command_line(model, models, file, tmp_path, capsys):
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    arguments = ["merge", str(alone), str(tmp_path / "merged"), "--save_precision", "fp32"]
    assert main(arguments) == 2
    assert "lora.json, which says what model" in capsys.readouterr().err
    assert main([*arguments, "--pretrained_model_name_or_path", str(model)]) == 0
    assert "merged and separate weights compute the same within" in capsys.readouterr().out
    assert close(output(load_models(tmp_path / "merged")), output(models))
    assert main([*arguments, "--pretrained_model_name_or_path", str(model)]) == 2
    assert "merged exists; choose another name, or set overwrite" in capsys.readouterr().err


def test_only_a_model_is_replaced_by_a_merged_one_and_never_its_own_base(model, file, copied, tmp_path):
    base = {"pretrained_model_name_or_path": str(model), "save_precision": "fp32", "overwrite": True}
    before = read_weights(copied, "unet")
    merge(file, copied, **base)
    after = read_weights(copied, "unet")
    assert any(not torch.equal(before[name], after[name]) for name in before) and find_fault(copied) is None
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "dog.jpg").touch()
    for folder, sentence in ((tmp_path / "own", r"more than a model \(dog.jpg\)"), (file.parent, "lies in")):
        with pytest.raises(DbkitError, match=sentence):
            merge(file, folder, **base)
    with pytest.raises(DbkitError, match=r"lies in .*, which would be replaced; choose another destination"):
        merge(file, copied, **{**base, "pretrained_model_name_or_path": str(copied)})
    assert (tmp_path / "own" / "dog.jpg").exists() and file.exists()


def test_a_wrong_merge_is_noticed_and_not_written(file, tmp_path, monkeypatch):
    monkeypatch.setattr("dbkit.lora.merge_lora", lambda models, path, scale: merge_lora(models, path, 0.9 * scale))
    with pytest.raises(
        DbkitError, match=r"the merged model differs from the base with its LoRA by .* nothing was written"
    ):
        merge(file, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_lora_of_a_linear_model_finds_and_fits_it(linear_models, lora, tmp_path):
    save_models(linear_models, tmp_path / "linear")
    lora = replace(lora, lora_modules="transformer", pretrained_model_name_or_path=str(tmp_path / "linear"))
    add_filled(linear_models, lora)
    path = saved(linear_models, lora, tmp_path / "lora")
    assert close(output(load_source(find_source(path))), output(linear_models))


def test_settings_of_a_lora_need_a_lora(settings):
    with pytest.raises(DbkitError, match="lora_rank has no effect without adapter lora; set adapter to lora or leave"):
        TrainConfig(**settings, lora_rank=8, lora_modules="all")
