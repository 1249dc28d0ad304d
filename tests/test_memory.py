"""The count of memory: against sizes written out by hand, against a real step, and how settings move it."""

import dataclasses
import math
import sys

import pytest
import torch

from dbkit import DbkitError, TrainConfig
from dbkit.counting import ACTIVATIONS, COPIES, make_arithmetic, make_ledger, run_backward
from dbkit.losses import add_noise, per_sample_loss
from dbkit.memory import (
    AVERAGES,
    CUDA_BYTES,
    FROZEN,
    GRADIENTS,
    OF_CUDA,
    OF_PROCESS,
    PROCESS_BYTES,
    SAVED,
    STATE,
    TRAINED,
    Place,
    device_peaks,
    fits,
    process_peaks,
    read_configs,
    sizes_of_parts,
    step_peak,
)
from dbkit.models import load_models, read_config

CPU, GPU = Place("cpu", torch.float32), Place("cuda", torch.float32)
HALF = Place("cuda", torch.bfloat16)


@pytest.fixture
def count(settings):
    """What a step holds at its peak, with some settings changed."""

    def counted(place=GPU, **changes):
        config = TrainConfig(**{**settings, **changes})
        return step_peak(config, read_configs(config), place)

    return counted


@pytest.fixture(scope="module")
def parameters(model):
    """The number of parameters of each part, by the modules that are really loaded."""
    loaded = load_models(model)
    parts = {part: getattr(loaded, part) for part in ("unet", "text_encoder", "vae")}
    return {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}


def test_a_ledger_follows_storages_from_their_first_tensor_to_their_last():
    ledger = make_ledger()
    with ledger:
        first = torch.empty(1024, device="meta")
        second = first * 2
        view = second.view(32, 32).t()
        del second
        assert ledger.total == 2 * 4096
        del first
        third = view + 1
        assert ledger.total == 2 * 4096
        del view
    assert (ledger.total, ledger.most) == (4096, 2 * 4096)
    del third
    assert ledger.total == 0


def test_a_layer_and_its_backward_pass_hold_what_is_reckoned_by_hand():
    """In fp32 a linear layer keeps its input; in bf16 both it and the weight once more, at half the size."""
    for dtype, copies, inputs in ((torch.float32, 0, 4), (torch.bfloat16, 2, 4 + 2)):
        layer = torch.nn.Linear(256, 512, bias=False, device="meta")
        ledger = make_ledger()
        ledger.see(layer.weight, "weight")
        arithmetic = make_arithmetic(ledger, dtype, "cuda")
        with ledger, arithmetic:
            x = torch.empty(128, 256, device="meta", requires_grad=True)
            y = layer(x)
            arithmetic.copies = None
            held = dict(ledger.held)
            run_backward(y.sum())
        assert held["weight"] == 4 * 256 * 512
        assert held.get(COPIES, 0) == copies * 256 * 512
        assert held[ACTIVATIONS] == inputs * 128 * 256 + dtype.itemsize * 128 * 512
        assert layer.weight.grad.dtype == torch.float32


def test_attention_keeps_no_scores():
    ledger = make_ledger()
    with ledger, make_arithmetic(ledger, torch.float32, "cuda"):
        query, key, value = (torch.empty(1, 8, 4096, 40, device="meta", requires_grad=True) for _ in range(3))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert ledger.total == 4 * (4 * out.numel() + 8 * 4096)


def test_static_parts_are_those_of_the_real_modules(count, parameters):
    unet, text = parameters["unet"], parameters["text_encoder"]
    at_unet = count(use_ema=True).parts
    for kind, each in ((TRAINED, 4), (STATE, 8), (AVERAGES, 4)):
        assert at_unet[kind] == pytest.approx(each * unet, rel=0.01)
    assert count(train_text_encoder=True).parts[STATE] == 8 * (unet + text)
    assert count(optimizer="lion").parts[STATE] == 4 * unet
    assert count().parts[OF_CUDA] == CUDA_BYTES
    # On the CPU all of the model is there, and the process itself.
    on_cpu = count(CPU).parts
    assert on_cpu[TRAINED] + on_cpu[FROZEN] == pytest.approx(4 * sum(parameters.values()), rel=0.01)
    assert on_cpu[OF_PROCESS] == PROCESS_BYTES


def test_the_parts_of_a_model_are_counted_without_it(settings, parameters):
    assert sizes_of_parts(read_configs(TrainConfig(**settings))) == parameters


def test_no_weights_are_read(settings, copied):
    config = TrainConfig(**settings)
    expected = step_peak(config, read_configs(config), GPU)
    for path in copied.rglob("*.safetensors"):
        path.write_bytes(b"")
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(copied))
    assert step_peak(config, read_configs(config), GPU) == expected


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"train_batch_size": 3}])
def test_the_count_is_what_a_real_step_holds(settings, model, changes):
    """The same ledger follows a step with real weights on the CPU, by torch's own attention and its own checkpoints."""
    config = TrainConfig(**{**settings, **changes})
    unet = load_models(model).unet.requires_grad_(True).train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ledger = make_ledger()
    for parameter in unet.parameters():
        ledger.see(parameter, TRAINED)
    size = config.train_batch_size
    with ledger:
        latents, noise = torch.randn(2, size, 4, 8, 8)
        timesteps, text = torch.zeros(size, dtype=torch.long), torch.randn(size, 77, 64)
        seen = add_noise(latents, noise, timesteps, torch.rand(1000))
        loss = per_sample_loss(unet(seen, timesteps, text).sample, noise).mean()
        loss.backward()
    counted = step_peak(config, read_configs(config), GPU)
    held = sum(counted.parts.get(kind, 0) for kind in (TRAINED, GRADIENTS, ACTIVATIONS))
    assert held == pytest.approx(ledger.most, rel=0.03)


def test_settings_move_the_peak_the_way_they_should(count):
    larger = {"resolution": 256, "train_batch_size": 4}
    whole = count(**larger).total
    assert count(gradient_checkpointing=True, **larger).total - CUDA_BYTES < 0.7 * (whole - CUDA_BYTES)
    assert count(HALF, **larger).parts[ACTIVATIONS] < count(**larger).parts[ACTIVATIONS]
    assert count(**{**larger, "train_batch_size": 8}).total - CUDA_BYTES > 1.4 * (whole - CUDA_BYTES)
    assert count(train_text_encoder=True, **larger).total > whole
    assert count(gradient_accumulation_steps=2, **larger).total > whole
    assert count(use_aspect_ratio_bucket=True, **larger).total > whole


def test_class_images_count_as_pictures(count, prior):
    plain, twice = count(resolution=256, train_batch_size=4), count(resolution=256, train_batch_size=2, **prior)
    assert twice.total == plain.total


def test_a_lora_has_frozen_weights_and_next_to_nothing_else(count, parameters):
    pytest.importorskip("peft")
    parts = count(adapter="lora", lora_rank=4).parts
    assert parts[FROZEN] == pytest.approx(4 * parameters["unet"], rel=0.01)
    assert parts[TRAINED] < 0.1 * parts[FROZEN] and parts[STATE] < 0.2 * parts[FROZEN]


def test_counting_leaves_random_numbers_alone(count):
    before = torch.random.get_rng_state()
    count(resolution=128)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_inpainting_model_and_one_that_predicts_v_are_counted(settings, inpainting_model, sd2_v_model):
    for folder in (inpainting_model, sd2_v_model):
        config = TrainConfig(**{**settings, "pretrained_model_name_or_path": str(folder)})
        for place in (CPU, HALF):
            assert all(peak.total > 0 for peak in device_peaks(config, read_configs(config), place))


def test_phases_that_a_run_does_not_have_are_not_counted(settings, prior):
    def phases(**changes):
        config = TrainConfig(**{**settings, **changes})
        return [peak.phase for peak in device_peaks(config, read_configs(config), GPU)]

    assert phases() == ["a training step", "encoding the images"]
    assert phases(auto_test_model=True, **prior)[2:] == ["previews", "class images"]


@pytest.mark.parametrize("place", [CPU, HALF])
def test_what_fits_is_what_no_phase_exceeds(settings, prior, place):
    config = TrainConfig(**{**settings, **prior, "auto_test_model": True})
    configs = read_configs(config)
    most = max(peak.total for peak in device_peaks(config, configs, place))
    assert fits(most, config, configs, place) and not fits(most - 1, config, configs, place)


@pytest.mark.parametrize("changes", [{}, {"memory": "tiny"}, {"adapter": "lora", "lora_rank": 2}])
def test_where_weights_and_optimizer_alone_do_not_fit_no_pass_is_counted(settings, changes, monkeypatch):
    config = TrainConfig(**{**settings, "resolution": 96, "clip_skip": 2, **changes})
    configs = read_configs(config)

    def forbidden(*values):
        raise AssertionError("a pass was counted")

    monkeypatch.setattr(sys.modules["dbkit.memory"], "_forward", forbidden)
    assert not fits(CUDA_BYTES, config, configs, GPU)
    with pytest.raises(AssertionError, match="a pass was counted"):
        fits(1e12, config, configs, GPU)


def test_more_previews_at_once_take_more(settings):
    config = TrainConfig(**{**settings, "auto_test_model": True, "resolution": 256})
    one, four = (device_peaks(config, read_configs(config), HALF, previews=n)[2].total for n in (1, 4))
    assert one < four


def test_saving_takes_a_copy_of_one_tensor_for_each_file(settings, model, parameters):
    loaded = load_models(model)
    parts = {part: getattr(loaded, part) for part in ("unet", "text_encoder", "vae")}
    largest = {part: max(p.numel() for p in module.parameters()) for part, module in parts.items()}

    def copies(place, **changes):
        config = TrainConfig(**{**settings, **changes})
        load, save = process_peaks(config, read_configs(config), place)
        assert load.total == 4 * sum(parameters.values()) + PROCESS_BYTES
        kept = sum(save.parts.get(kind, 0) for kind in (TRAINED, FROZEN, STATE, OF_PROCESS))
        assert save.total == kept + save.parts.get(SAVED, 0)
        return save.parts.get(SAVED, 0)

    # From a GPU: the usable weights of three files, or those of the U-Net with both moments.
    assert copies(GPU, save_precision="fp16") == max(2 * sum(largest.values()), 12 * largest["unet"])
    assert copies(GPU, train_text_encoder=True) >= 4 * sum(largest.values())
    assert copies(GPU, resume_state="small") == 12 * largest["unet"] + 2 * parameters["unet"]
    # What lies in RAM anyway is copied where it is cast.
    assert copies(CPU, save_precision="fp16") == 2 * sum(largest.values())
    assert copies(CPU, save_precision="fp32") == 0


def test_a_model_of_the_hub_that_is_not_here_is_said(settings):
    config = TrainConfig(**{**settings, "pretrained_model_name_or_path": "owner/name"})
    with pytest.raises(DbkitError, match=r"^the model owner/name is not on this machine and Hugging Face cannot be"):
        read_configs(config)


def test_another_vae_is_counted(settings, copied):
    config = TrainConfig(**{**settings, "pretrained_vae_name_or_path": str(copied)})
    assert read_configs(config)["vae"] == read_config(copied, "vae")


def test_settings_of_another_kind_of_model_are_a_sentence(settings):
    config = TrainConfig(**settings)
    configs = {**read_configs(config), "unet": {"block_out_channels": "wide"}}
    with pytest.raises(DbkitError, match="the settings of the model are not those of Stable Diffusion"):
        step_peak(config, configs, GPU)


def test_the_peak_is_the_sum_of_its_parts(count):
    peak = count()
    assert peak.total == sum(peak.parts.values()) and not math.isnan(peak.total)
