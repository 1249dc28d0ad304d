"""Memory tiers: each learns what fp32 training learns, resumes bit for bit, and refuses what it cannot do."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from conftest import draw_photo
from safetensors.torch import load_file
from test_train import assert_equal, assert_same_run, at_unet_pass, state_of

from dbkit import DbkitError, TrainConfig, in_backward, train
from dbkit.auto import choose_settings
from dbkit.checkpoint import newest_valid
from dbkit.in_backward import is_large
from dbkit.libraries import choose_dtype
from dbkit.models import load_base, load_models, read_weights
from dbkit.planning import make_plan
from dbkit.settings import replace
from dbkit.state import make_state, read_state, write_state
from dbkit.train_config import TIERS

# The package's attribute `train` is the function; the module has its name.
MODULE = sys.modules[train.__module__]
CPU = torch.device("cpu")

spec = importlib.util.spec_from_file_location("tiers", Path(__file__).parents[1] / "benchmarks" / "tiers.py")
tiers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiers)

# How far a tier's loss may end from that of fp32, as a part of what fp32 training takes off it. Over the five seeds of
# benchmarks/tiers.md bf16 arithmetic is at most 0.0007 off, also with 8-bit moments, and tiny at most 0.0021.
TOLERANCES = {"fast": 0.005, "balanced": 0.005, "tiny": 0.01}


@pytest.fixture(scope="module")
def fp32(tmp_path_factory) -> tuple[float, float]:
    """The loss of the base model and that of fp32 training."""
    made = tiers.learn("fp32", 0, tmp_path_factory.mktemp("fp32"))
    return tiers.fixed_loss(tiers.BASE), tiers.fixed_loss(made)


def off(name: str, folder: Path, fp32: tuple[float, float]) -> float:
    base, reference = fp32
    return (tiers.fixed_loss(tiers.learn(name, 0, folder)) - reference) / (base - reference)


@pytest.mark.parametrize("tier", TOLERANCES)
def test_each_tier_learns_what_fp32_training_learns(tier, fp32, tmp_path):
    """small is not among them, for it computes what balanced does, bit for bit."""
    if TIERS[tier][1] and tier != "tiny":
        pytest.importorskip("bitsandbytes")
    assert abs(off(tier, tmp_path, fp32)) < TOLERANCES[tier]


def test_rounding_to_the_nearest_would_learn_less_than_half_of_it(monkeypatch, fp32, tmp_path):
    """Updates below half a step of bf16 are lost: it ends 0.57 off at least, and fails the test above by far."""
    monkeypatch.setattr(in_backward, "to_bf16", lambda values, random: values.bfloat16())
    assert off("tiny", tmp_path, fp32) > 30 * TOLERANCES["tiny"]


def few(config: TrainConfig, smaller_model: Path, **changes) -> TrainConfig:
    """A short training of a smaller model on smaller pictures."""
    small = {"pretrained_model_name_or_path": str(smaller_model), "resolution": 32, "log_interval": 1}
    return replace(config, **{**small, **changes})


def test_fast_is_training_without_savings_and_small_is_balanced_bit_for_bit(config, smaller_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = few(config, smaller_model)
    runs = {tier: train(config, memory=tier, output_dir=tmp_path / tier).parent for tier in TIERS if tier != "tiny"}
    assert_same_run(runs["auto"], runs["fast"])
    assert_same_run(runs["balanced"], runs["small"])
    # They are what their single settings are, so a run may go on under the other name.
    train(config, use_8bit_adam=True, output_dir=runs["balanced"], max_train_steps=3)


TEXT = {"train_text_encoder": True, "stop_text_encoder_training": 4, "clip_skip": 2}
SUMMED = {**TEXT, "use_ema": True, "gradient_accumulation_steps": 2}


class Killed(BaseException):
    """Nothing in dbkit catches it."""


def kill():
    raise Killed


@pytest.mark.parametrize(
    ("tier", "more"),
    [
        ("fast", SUMMED),
        ("balanced", SUMMED),
        ("small", SUMMED),
        ("tiny", {}),
        ("tiny", {**TEXT, "use_aspect_ratio_bucket": True, "train_batch_size": 2}),
    ],
    ids=["fast", "balanced", "small", "tiny", "tiny with text encoder and buckets"],
)
def test_a_training_that_is_cut_in_pieces_is_the_whole_one_in_every_tier(
    config, smaller_model, photos, tmp_path, tier, more
):
    """It ends while the text encoder is trained, dies in the pass after the next and then goes on."""
    if tier in ("balanced", "small"):
        pytest.importorskip("bitsandbytes")
    draw_photo(photos / "wide.png", (160, 60)).with_suffix(".txt").write_text("a wide thing")
    config = few(config, smaller_model, memory=tier, max_train_steps=6, **more)
    straight = train(config, output_dir=tmp_path / "straight").parent
    pieces = tmp_path / "pieces"
    train(config, output_dir=pieces, max_train_steps=2)
    with at_unet_pass(3, kill), pytest.raises(Killed):
        train(config, output_dir=pieces)
    train(config, output_dir=pieces)
    assert_same_run(straight, pieces)


def test_what_tiny_holds_is_saved_and_comes_back_bit_for_bit(config, model, tmp_path):
    config = replace(config, memory="tiny", save_precision="fp16")
    run = train(config).parent
    saved = state_of(run)
    weights = load_file(next((run / "resume").iterdir()) / "unet.safetensors")
    assert all(t.dtype == (torch.bfloat16 if is_large(t) else torch.float32) for t in weights.values())
    tensors = [value for value in saved.values() if isinstance(value, torch.Tensor)]
    assert sum(t.dtype == torch.uint8 for t in tensors) == 2 * sum(map(is_large, weights.values()))
    # In the next process, and from there to the disk again.
    state = make_state(config, load_models(model), CPU, torch.bfloat16, "dbkit (memory tiny)")
    read_state(state, newest_valid(run / "resume")[0])
    (tmp_path / "again" / "resume" / saved["step"]).mkdir(parents=True)
    write_state(state, tmp_path / "again" / "resume" / saved["step"], state.gather(), config)
    assert_equal(saved, state_of(tmp_path / "again"))
    # 2 bytes of weight and 2 of moments, and scales, where fast has 4 and 8; the small tensors are whole.
    large = sum(t.numel() for t in weights.values() if is_large(t))
    rest = sum(t.numel() for t in weights.values()) - large
    assert sum(t.numel() * t.element_size() for t in tensors) == large * (4 + 2 * 4 / 256) + rest * 12
    # What can be used is in save_precision, is what was trained, and what was not trained is as it was.
    made = read_weights(run / "model", "unet")
    assert all(torch.equal(made[name], weights[name].half()) for name in weights)
    text, base = (read_weights(folder, "text_encoder") for folder in (run / "model", model))
    assert all(torch.equal(text[name], base[name].half()) for name in base)


def test_layers_that_clip_skip_passes_over_stay_whole_and_previews_are_made(config, smaller_model, model):
    config = few(config, smaller_model, train_text_encoder=True, clip_skip=2)
    made = train(config, memory="tiny", auto_test_model=True)
    new, old = read_weights(made, "text_encoder"), read_weights(model, "text_encoder")
    last = [name for name in old if ".layers.1." in name]
    assert last and all(torch.equal(new[name], old[name]) for name in last)
    assert any(not torch.equal(new[name], old[name]) for name in old if ".layers.0." in name)
    assert (made.parent / "previews" / "step_000002.png").is_file()


def test_a_run_does_not_go_on_with_weights_of_another_kind(config, smaller_model):
    config = few(config, smaller_model)
    train(config, memory="tiny")
    with pytest.raises(
        DbkitError, match=r"library of the optimizer was 'dbkit \(memory tiny\)' and is 'torch'; change"
    ):
        train(config, memory="fast", max_train_steps=3)


# GPUs without bf16.


def test_tiny_gives_way_to_small_where_the_gpu_does_not_compute_in_bf16(config, tmp_path, capsys):
    for device, dtype, where in (("cuda", torch.float16, "this GPU"), ("mps", torch.bfloat16, "Apple's GPUs")):
        chosen = choose_settings(replace(config, memory="tiny"), tmp_path, torch.device(device), dtype)
        assert chosen.memory == "small"
        said = f"memory tiny computes in bf16, which {where} cannot do well; memory small takes its place\n"
        assert capsys.readouterr().out == said
    assert choose_settings(replace(config, memory="tiny"), tmp_path, CPU, torch.bfloat16).memory == "tiny"
    assert choose_dtype("auto", CPU, "tiny") == torch.bfloat16 and choose_dtype("auto", CPU, "small") == torch.float32


def test_fp16_with_loss_scaling_learns_what_fp32_learns(config, smaller_model, tmp_path):
    """What a T4 does in memory small. A CPU can compute it too, though slowly, and so train() refuses it there."""
    pytest.importorskip("bitsandbytes")
    config = few(config, smaller_model, memory="small", learning_rate=1e-3)
    plan = make_plan(config, tmp_path / "run", CPU)

    def steps(dtype: torch.dtype, scale: float, count: int) -> tuple[list[float], float, list[torch.Tensor]]:
        models = load_base(config)
        state = make_state(config, models, CPU, dtype, "bitsandbytes")
        if dtype == torch.float16:
            state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": scale})
        pools = MODULE._make_pools(config, models, plan, CPU)
        losses = [MODULE.train_step(state, pools, plan.order, config, step, 1e-3)[0][0] for step in range(1, count + 1)]
        return [float(loss) for loss in losses], state.scaler.get_scale(), [p.detach() for p in state.parameters]

    whole, _, _ = steps(torch.float32, 1.0, 6)
    half, scale, _ = steps(torch.float16, 2.0**10, 6)
    assert half == pytest.approx(whole, rel=0.01) and scale == 2.0**10
    # A step whose scaled gradients are no numbers is left out, and the scale halved.
    _, scale, weights = steps(torch.float16, 2.0**40, 1)
    before = load_base(config).unet.parameters()
    assert scale == 2.0**39 and all(torch.equal(*pair) for pair in zip(weights, before))


# What does not go together.


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


def test_sharded_training_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    for which in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(which, "true")
            for tier in ("balanced", "small", "tiny"):
                with pytest.raises(DbkitError, match=rf"^memory {tier} does not go with FSDP or DeepSpeed; leave it"):
                    make_plan(replace(config, memory=tier), tmp_path, CPU)
