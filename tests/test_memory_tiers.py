"""Memory tiers: each learns what the plain training learns, resumes bit for bit, and refuses what it cannot do."""

import pytest
import torch
from conftest import draw_photo
from safetensors.torch import load_file
from test_train import assert_equal, assert_same_run, log_of, state_of, stop_in_pass
from torch.nn.modules.module import register_module_forward_pre_hook

from dbkit import DbkitError, TrainConfig, train
from dbkit.in_backward import is_large
from dbkit.libraries import choose_dtype
from dbkit.models import read_weights
from dbkit.settings import replace
from dbkit.train_config import TIERS

# How far the losses of a tier may lie from those of fast, in proportion, over 20 steps with the same noise: the mean
# and the largest of one step. The two that compute the same by other means come near rounding.
TOLERANCES = {"balanced": (0.005, 0.02), "small": (0.005, 0.02), "tiny": (0.02, 0.06)}
SAME = {"mixed_precision": "bf16", "log_interval": 1, "max_train_steps": 20}
RATE = 1e-3
TEXT = {
    "train_text_encoder": True,
    "stop_text_encoder_training": 6,
    "clip_skip": 2,
    "use_aspect_ratio_bucket": True,
    "train_batch_size": 2,
}


def sizes(run) -> dict[str, int]:
    return {path.name: path.stat().st_size for folder in (run / "resume").iterdir() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def known() -> dict[str, torch.Tensor]:
    """Losses that several tiers are compared with."""
    return {}


def losses(config: TrainConfig, tmp_path, known: dict[str, torch.Tensor], name: str, **changes) -> torch.Tensor:
    if name not in known:
        run = train(config, **SAME, **changes, output_dir=tmp_path / name).parent
        known[name] = torch.tensor([line["loss"] for line in log_of(run)], dtype=torch.float64)
    return known[name]


@pytest.mark.parametrize("tier", TOLERANCES)
def test_each_tier_learns_as_fast_does(config, tmp_path, known, tier):
    if tier != "tiny":
        pytest.importorskip("bitsandbytes")
    fast = losses(config, tmp_path, known, "fast", memory="fast", learning_rate=RATE)
    frozen = losses(config, tmp_path, known, "frozen", memory="fast", learning_rate=1e-9)
    own = losses(config, tmp_path, known, tier, memory=tier, learning_rate=RATE)
    mean, most = TOLERANCES[tier]
    # More is learnt than what may differ, or that would say nothing.
    assert float((frozen - fast)[10:].mean() / frozen[10:].mean()) > 3 * mean
    off = (own / fast - 1).abs()
    assert float(off.mean()) < mean and float(off.max()) < most


@pytest.mark.parametrize("tier", ["fast", "balanced", "small"])
def test_a_tier_is_what_its_single_settings_are(config, tmp_path, tier):
    if TIERS[tier][1]:
        pytest.importorskip("bitsandbytes")
    checkpointing, eight = TIERS[tier]
    single = train(
        config, gradient_checkpointing=checkpointing, use_8bit_adam=eight, output_dir=tmp_path / "single"
    ).parent
    named = train(config, memory=tier, output_dir=tmp_path / "named").parent
    assert_equal(state_of(single), state_of(named))
    # So a run may go on under the other name.
    train(config, memory=tier, output_dir=single, max_train_steps=3)


@pytest.mark.parametrize("more", [{}, TEXT], ids=["unet", "text encoder, several sizes"])
def test_tiny_resumed_is_tiny_straight(config, photos, tmp_path, more):
    if more:
        draw_photo(photos / "wide.png", (160, 60)).with_suffix(".txt").write_text("a wide thing")
    config = replace(config, memory="tiny", max_train_steps=10, **more)
    straight = train(config, output_dir=tmp_path / "straight").parent
    stopped = tmp_path / "stopped"
    passes = len(log_passes(config, tmp_path)) if more else 4
    stop_in_pass(config, passes, 4, output_dir=stopped)
    train(config, output_dir=stopped)
    assert_same_run(straight, stopped)


def log_passes(config: TrainConfig, tmp_path) -> list[int]:
    """The passes of the U-Net in the first four steps."""
    passes = []

    def count(module, inputs):
        if type(module).__name__ == "UNet2DConditionModel" and module.training:
            passes.append(1)

    handle = register_module_forward_pre_hook(count)
    try:
        train(config, max_train_steps=4, output_dir=tmp_path / "counted")
    finally:
        handle.remove()
    return passes


def test_what_tiny_holds_and_saves(config, model, tmp_path):
    run = train(config, memory="tiny", save_precision="fp16", output_dir=tmp_path / "tiny").parent
    (state,) = (run / "resume").iterdir()
    weights = load_file(state / "unet.safetensors")
    for tensor in weights.values():
        assert tensor.dtype == (torch.bfloat16 if is_large(tensor) else torch.float32)
    moments = torch.load(state / "optimizer.pt", weights_only=True)["state"]
    assert len(moments) == len(weights)
    count = sum(tensor.numel() for tensor in weights.values())
    # 2 bytes of weight and 2 of moments, where fast has 4 and 8; this narrow model has many small tensors.
    whole = train(config, memory="fast", output_dir=tmp_path / "fast").parent
    ours, theirs = (sizes(folder)["unet.safetensors"] + sizes(folder)["optimizer.pt"] for folder in (run, whole))
    assert theirs > 12 * count and ours < 0.45 * theirs
    # What can be used is in save_precision, is what was trained, and what was not trained is as it was.
    made = read_weights(run / "model", "unet")
    assert {tensor.dtype for tensor in made.values()} == {torch.float16}
    assert all(torch.equal(made[name], weights[name].half()) for name in weights)
    text, base = (read_weights(folder, "text_encoder") for folder in (run / "model", model))
    assert all(torch.equal(text[name], base[name].half()) for name in base)


def test_layers_that_clip_skip_passes_over_stay_whole(config, model):
    made = train(config, memory="tiny", train_text_encoder=True, clip_skip=2)
    new, old = read_weights(made, "text_encoder"), read_weights(model, "text_encoder")
    last = [name for name in old if ".layers.1." in name]
    assert last and all(torch.equal(new[name], old[name]) for name in last)
    assert any(not torch.equal(new[name], old[name]) for name in old if ".layers.0." in name)


def test_previews_are_made_of_what_tiny_holds(config):
    run = train(config, memory="tiny", auto_test_model=True, resolution=32, train_text_encoder=True).parent
    assert (run / "previews" / "step_000002.png").is_file()


def test_a_run_does_not_go_on_with_weights_of_another_kind(config):
    pytest.importorskip("bitsandbytes")
    train(config, memory="tiny")
    with pytest.raises(DbkitError, match=r"library of the optimizer was 'dbkit \(memory tiny\)' and is '\w+'; change"):
        train(config, memory="small", max_train_steps=3)


def test_weights_that_are_no_numbers_are_not_saved(config):
    with pytest.raises(DbkitError, match=r"weights that are not numbers at step 2"):
        train(config, memory="tiny", learning_rate=1, adam_epsilon=1e-30, adam_weight_decay=1, max_grad_norm=1e38)


def made(**changes) -> TrainConfig:
    common = {"pretrained_model_name_or_path": "owner/name", "instance_data_dir": "photos", "instance_prompt": "zwx"}
    return TrainConfig(**{**common, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"memory": "balanced", "gradient_checkpointing": True},
            "memory balanced is without gradient_checkpointing, which is on; choose memory small, or turn it off",
        ),
        (
            {"memory": "fast", "use_8bit_adam": True},
            "memory fast is without 8-bit moments, and use_8bit_adam is on; choose memory balanced, or leave that out",
        ),
        (
            {"memory": "fast", "optimizer": "adamw8bit"},
            "memory fast is without 8-bit moments, and optimizer is adamw8bit; choose memory balanced, or leave "
            "that out",
        ),
        (
            {"memory": "small", "optimizer": "lion"},
            "memory small means optimizer adamw8bit, and optimizer is lion; leave one of them out",
        ),
        (
            {"memory": "tiny", "gradient_accumulation_steps": 2},
            "memory tiny frees each gradient in the backward pass, so none can be summed over "
            "gradient_accumulation_steps 2; leave that out, or choose memory small",
        ),
        (
            {"memory": "tiny", "adapter": "lora"},
            "memory tiny is for training the whole model, and adapter is lora; leave that out, or choose memory small",
        ),
        (
            {"memory": "tiny", "use_ema": True},
            "memory tiny has no room for the averages of use_ema; leave that out, or choose memory small",
        ),
        (
            {"memory": "tiny", "mixed_precision": "fp16"},
            "memory tiny computes in bf16, and mixed_precision is fp16; leave that out, or choose memory small",
        ),
    ],
)
def test_settings_that_contradict_a_tier_are_said(changes, sentence):
    with pytest.raises(DbkitError) as error:
        made(**changes)
    assert str(error.value) == sentence


def test_settings_that_agree_with_a_tier_may_be_given():
    for tier, (checkpointing, eight) in TIERS.items():
        config = made(memory=tier, gradient_checkpointing=checkpointing, use_8bit_adam=eight)
        assert (config.recomputes_activations, config.chosen_optimizer == "adamw8bit") == (checkpointing, eight)
        alone = made(memory=tier)
        assert (alone.recomputes_activations, alone.chosen_optimizer == "adamw8bit") == (checkpointing, eight)


def test_tiny_computes_in_bf16_or_is_refused():
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert choose_dtype("auto", cpu) == torch.float32 and choose_dtype("auto", cpu, "small") == torch.float32
    assert choose_dtype("auto", cpu, "tiny") == choose_dtype("bf16", mps, "tiny") == torch.bfloat16
    with pytest.raises(DbkitError, match=r"^memory tiny computes in bf16, which this GPU is not made for; choose"):
        choose_dtype("auto", mps, "tiny")
