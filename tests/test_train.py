"""Training computes the loss it should, survives every kind of stop, and refuses what it cannot continue."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_photo
from diffusers import DDPMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from reference import PROMPTS, reference_losses
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import CLIPTextModel

from dbkit import DbkitError, TrainConfig, status, train
from dbkit.checkpoint import find_fault
from dbkit.models import WEIGHTS, load_models, read_weights
from dbkit.optimizers import LIBRARIES
from dbkit.planning import _rest_after
from dbkit.settings import replace
from dbkit.text import clip_skip_of


@contextlib.contextmanager
def at_unet_pass(number: int, action):
    """Call action() when the U-Net begins its number-th pass in training mode."""
    passes = 0

    def count(module, inputs):
        nonlocal passes
        if isinstance(module, UNet2DConditionModel) and module.training:
            passes += 1
            if passes == number:
                action()

    handle = register_module_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def stop_in_pass(config: TrainConfig, number: int, step: int, **changes) -> None:
    """Train and press Ctrl-C during the number-th pass of the U-Net, which belongs to the given step."""
    with (
        at_unet_pass(number, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(
            KeyboardInterrupt,
            match=rf"stopped after step {step} of \d+; the state of step {step} is saved, train",
        ),
    ):
        train(config, **changes)


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def flat(value, name="") -> dict:
    """A nested state as one dictionary of its leaves."""
    if isinstance(value, dict):
        return {key: leaf for inner in value for key, leaf in flat(value[inner], f"{name}/{inner}").items()}
    if isinstance(value, (list, tuple)):
        return {key: leaf for n, item in enumerate(value) for key, leaf in flat(item, f"{name}/{n}").items()}
    if is_traceable_wrapper_subclass(value):  # such as torchao's moments: several tensors that pass for one
        return flat({inner: getattr(value, inner) for inner in value.__tensor_flatten__()[0]}, name)
    return {name: value}


def state_of(run: Path) -> dict:
    """Everything that the one saved state of a run holds."""
    (folder,) = (run / "resume").iterdir()
    state = {"step": folder.name}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            state |= flat(load_file(path), path.stem)
        elif path.suffix == ".pt":
            state |= flat(torch.load(path, weights_only=True), path.stem)
    return state


def assert_equal(one: dict, two: dict):
    assert one.keys() == two.keys()
    for name in one:
        same = torch.equal(one[name], two[name]) if isinstance(one[name], torch.Tensor) else one[name] == two[name]
        assert same, name


def assert_same_run(one: Path, two: Path):
    """Weights, optimizer and model are the same bit for bit, and so is what was logged."""
    assert_equal(state_of(one), state_of(two))
    for part in WEIGHTS:
        assert_equal(read_weights(one / "model", part), read_weights(two / "model", part))
    first, second = ({line["step"]: line["loss"] for line in log_of(run)} for run in (one, two))
    assert first == second
    for run in (one, two):
        steps = [line["step"] for line in log_of(run)]
        assert steps == sorted(set(steps))
        assert all(math.isfinite(line["loss"]) for line in log_of(run))


# The loss.


def first_losses(config: TrainConfig) -> list[float]:
    line = log_of(train(config, max_train_steps=1).parent)[0]
    return [line["loss"], line["instance_loss"], line["class_loss"]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("with_prior", [False, True], ids=["alone", "with prior"])
@pytest.mark.parametrize("kind", ["model", "v_model"], ids=["epsilon", "v_prediction"])
def test_the_loss_equals_a_slow_reference(request, settings, prior, kind, with_prior, batch):
    extra = {**prior, "prior_loss_weight": 0.3} if with_prior else {}
    model = str(request.getfixturevalue(kind))
    config = TrainConfig(
        **{**settings, **extra, "pretrained_model_name_or_path": model, "train_batch_size": batch, "seed": 7}
    )
    expected = reference_losses(config, PROMPTS)
    assert first_losses(config) == pytest.approx(expected, rel=1e-4)
    assert (expected[2] > 0) == with_prior


OBJECTIVES = {
    "min-SNR": {"min_snr_gamma": 0.1},
    "offset noise": {"noise_offset": 0.1},
    "perturbation": {"input_perturbation": 0.2},
    "huber": {"loss_type": "huber"},
    "l1": {"loss_type": "l1"},
    "min-SNR and offset": {"min_snr_gamma": 1.0, "noise_offset": 0.1},
    "zero terminal SNR": {"rescale_zero_terminal_snr": True},
    "everything": {
        "rescale_zero_terminal_snr": True,
        "min_snr_gamma": 5.0,
        "noise_offset": 0.1,
        "input_perturbation": 0.1,
        "loss_type": "huber",
    },
}


# A model that predicts noise learns nothing where the input is noise alone, so it has no zero terminal SNR.
CASES = [
    pytest.param(kind, objective, id=f"{name} by {kind}")
    for kind in ("model", "v_model")
    for name, objective in OBJECTIVES.items()
    if kind == "v_model" or "rescale_zero_terminal_snr" not in objective
]


@pytest.mark.parametrize(("kind", "objective"), CASES)
@pytest.mark.parametrize("with_prior", [False, True], ids=["alone", "with prior"])
def test_every_objective_equals_a_slow_reference(request, settings, prior, kind, with_prior, objective):
    extra = {**prior, "prior_loss_weight": 0.3} if with_prior else {}
    model = str(request.getfixturevalue(kind))
    config = TrainConfig(
        **{**settings, **extra, **objective, "pretrained_model_name_or_path": model, "train_batch_size": 2, "seed": 3}
    )
    expected = reference_losses(config, PROMPTS)
    assert first_losses(config) == pytest.approx(expected, rel=1e-4)
    plain = reference_losses(
        replace(config, **{name: TrainConfig.__dataclass_fields__[name].default for name in objective}), PROMPTS
    )
    assert expected[0] != pytest.approx(plain[0], rel=1e-3)


@pytest.mark.parametrize("change", [{"clip_skip": 2}, {"pad_tokens": False}], ids=["clip_skip", "pad_tokens"])
def test_prompts_are_read_as_a_slow_reference_reads_them(settings, prior, change):
    config = TrainConfig(**{**settings, **prior, **change, "train_batch_size": 3})
    expected = reference_losses(config)
    assert first_losses(config) == pytest.approx(expected, rel=1e-4)
    usual = reference_losses(replace(config, clip_skip=None, pad_tokens=True))
    assert expected != pytest.approx(usual, rel=1e-3)


@pytest.fixture
def masks(photos) -> dict:
    """A mask beside one photograph, one photograph with a transparent background, one without either."""
    for name, box in (("crimson", (0, 0, 40, 79)), ("gold", None)):
        with Image.open(photos / f"{name}.png") as image:
            mask = Image.new("L", image.size, 0 if box else 128)
            if box:
                (photos / "masks").mkdir()
                ImageDraw.Draw(mask).rectangle(box, fill=255)
                mask.save(photos / "masks" / f"{name}.png")
            else:
                ImageDraw.Draw(mask).ellipse((20, 10, 70, 70), fill=255)
                image.putalpha(mask)
                image.save(photos / f"{name}.png")
    return {"masked_loss": True, "unmasked_weight": 0.2}


def test_a_masked_loss_equals_a_slow_reference(settings, prior, masks):
    config = TrainConfig(**{**settings, **prior, **masks, "train_batch_size": 3, "min_snr_gamma": 1.0})
    expected = reference_losses(config)
    assert first_losses(config) == pytest.approx(expected, rel=1e-4)
    assert expected[1] != pytest.approx(reference_losses(replace(config, unmasked_weight=1.0))[1], rel=1e-3)


def test_what_a_mask_hides_does_not_count(settings, photos, tmp_path):
    """With unmasked_weight 0 the gradient of the output is zero wherever the mask is black."""
    for path in photos.glob("*.png"):
        (photos / "masks").mkdir(exist_ok=True)
        mask = Image.new("L", (96, 80), 0)
        mask.paste(255, (0, 0, 48, 80))
        mask.save(photos / "masks" / path.name)
    gradients = []

    def watch(module, inputs, output):
        if isinstance(module, UNet2DConditionModel) and module.training:
            output.sample.register_hook(gradients.append)

    handle = register_module_forward_hook(watch)
    try:
        train(**{**settings, "masked_loss": True, "unmasked_weight": 0, "max_train_steps": 1})
    finally:
        handle.remove()
    (gradient,) = gradients
    # Resizing lets a little of the white through.
    assert float(gradient[..., :4].abs().max()) > 100 * float(gradient[..., 4:].abs().max())


def test_an_inpainting_model_trains_as_a_slow_reference_and_keeps_its_kind(settings, inpainting_model, prior, tmp_path):
    changes = {"pretrained_model_name_or_path": str(inpainting_model), "train_batch_size": 3, "auto_test_model": True}
    config = TrainConfig(**{**settings, **prior, **changes})
    assert first_losses(config) == pytest.approx(reference_losses(config), rel=1e-4)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(config.output_dir / "model", local_files_only=True)
    assert pipeline.unet.config.in_channels == 9
    assert json.loads((config.output_dir / "model" / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionInpaintPipeline"
    )
    assert (config.output_dir / "previews" / "step_000001.png").is_file()


def test_zero_terminal_snr_is_refused_for_a_model_that_predicts_noise(config):
    with pytest.raises(DbkitError, match="rescale_zero_terminal_snr needs a model that predicts v"):
        train(config, rescale_zero_terminal_snr=True)


def test_a_rescaled_schedule_is_saved_with_the_model(settings, v_model):
    model = train(**{**settings, "pretrained_model_name_or_path": str(v_model), "rescale_zero_terminal_snr": True})
    saved = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    assert saved.alphas_cumprod[-1] == 0
    assert saved.config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("label", "prompts"),
    [
        ("use_txt_as_label", {name: f"a {name} thing" for name in ("crimson", "gold", "teal")}),
        ("use_filename_as_label", {name: name for name in ("crimson", "gold", "teal")}),
    ],
)
def test_native_training_takes_the_prompt_of_each_image(settings, label, prompts):
    config = TrainConfig(**{**settings, "instance_prompt": None, label: True, "train_batch_size": 3})
    expected = reference_losses(config, {f"{name}.png": prompt for name, prompt in prompts.items()})
    assert first_losses(config) == pytest.approx(expected, rel=1e-4)
    one_prompt = reference_losses(config, dict.fromkeys((f"{name}.png" for name in prompts), "photo of zwx thing"))
    assert expected != pytest.approx(one_prompt, rel=1e-4)


def test_the_loss_of_a_later_step_is_that_of_its_own_draws(settings):
    # With a learning rate of nearly nothing the weights of step 2 are those of step 1.
    config = TrainConfig(**{**settings, "learning_rate": 1e-30, "log_interval": 1})
    with pytest.raises(DbkitError, match="2 steps changed no weight; raise learning_rate"):
        train(config)
    losses = [line["loss"] for line in log_of(config.output_dir)]
    assert losses == pytest.approx([reference_losses(config, PROMPTS, step)[0] for step in (1, 2)], rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_accumulated_passes_equal_one_batch_with_every_option_of_the_data(settings, mixed, tmp_path):
    config = TrainConfig(**{**settings, **mixed, "log_interval": 1, "max_train_steps": 3})
    logs = []
    for size, passes in ((4, 1), (2, 2), (1, 4)):
        run = tmp_path / f"{size} x {passes}"
        train(config, output_dir=run, train_batch_size=size, gradient_accumulation_steps=passes)
        logs.append([line["loss"] for line in log_of(run)])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    assert logs[2] == pytest.approx(logs[0], rel=1e-4)


# Stop and go on.


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"with": "prior"},
        {"train_text_encoder": True, "clip_skip": 2},
        {"gradient_accumulation_steps": 2},
        {"with": "mixed"},
        {"train_text_encoder": True, "stop_text_encoder_training": 5, "use_ema": True},
        {"with": "masked inpainting"},
    ],
    ids=[
        "plain",
        "prior",
        "text encoder",
        "accumulation",
        "buckets, augmentation, tags, two concepts",
        "averages, and a text encoder that rests after step 5",
        "masked inpainting",
    ],
)
def test_resumed_run_equals_straight_run(request, settings, tmp_path, extra):
    extra = dict(extra)
    if extra.get("with") == "masked inpainting":
        model = str(request.getfixturevalue("inpainting_model"))
        extra = {**request.getfixturevalue("masks"), "pretrained_model_name_or_path": model}
    elif "with" in extra:
        extra = request.getfixturevalue(extra["with"])
    config = TrainConfig(**{**settings, **extra, "learning_rate": 1e-3, "log_interval": 2})
    straight, once, twice = (tmp_path / name for name in ("straight", "once", "twice"))
    train(config, output_dir=straight, max_train_steps=10)
    train(config, output_dir=once, max_train_steps=4)
    shutil.copytree(once, twice)
    train(config, output_dir=once, max_train_steps=10)
    train(config, output_dir=twice, max_train_steps=7)
    train(config, output_dir=twice, max_train_steps=10)
    assert_equal(state_of(straight), state_of(once))
    assert_equal(state_of(straight), state_of(twice))
    for run in (once, twice):
        for part in WEIGHTS:
            assert_equal(read_weights(straight / "model", part), read_weights(run / "model", part))
        steps = [line["step"] for line in log_of(run)]
        assert steps == sorted(set(steps))
        assert all(math.isfinite(line["loss"]) for line in log_of(run))


def test_a_run_stopped_by_ctrl_c_equals_a_straight_run(settings, tmp_path):
    config = TrainConfig(
        **{**settings, "max_train_steps": 10, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "learning_rate": 1e-3}
    )
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config, output_dir=straight, log_interval=1)
    rates = [line["learning_rate"] for line in log_of(straight)]
    assert rates[0] == 0 and rates[2] == max(rates) and rates[-1] < rates[5] < rates[2]
    stop_in_pass(config, 4, step=4, output_dir=stopped, log_interval=1)
    assert find_fault(stopped / "checkpoints" / "step_000004", step=4) is None
    assert not (stopped / "model").exists()
    stop_in_pass(config, 3, step=7, output_dir=stopped, log_interval=1)
    train(config, output_dir=stopped, log_interval=1)
    assert_same_run(straight, stopped)


def test_ctrl_c_before_the_update_of_an_accumulated_step_finishes_that_step(settings, tmp_path):
    config = TrainConfig(**{**settings, "max_train_steps": 3, "gradient_accumulation_steps": 3, "log_interval": 1})
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config, output_dir=straight)
    stop_in_pass(config, 4, step=2, output_dir=stopped)
    train(config, output_dir=stopped)
    assert_same_run(straight, stopped)


KILLED = """
import json, os, signal, sys
import torch
import dbkit
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

settings, event, place, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
seen = 0

def kill(found, values):
    if found == event and any(place in os.fspath(v) for v in values if isinstance(v, (str, os.PathLike))):
        os.kill(os.getpid(), signal.SIGKILL)

def count(module, inputs):
    global seen
    seen += type(module).__name__ == "UNet2DConditionModel" and module.training
    if event == "pass" and seen == int(place):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
register_module_forward_pre_hook(count)
dbkit.train(**settings)
"""


def test_a_run_killed_at_every_stage_equals_a_straight_run(settings, tmp_path):
    config = {**settings, "max_train_steps": 6, "save_model_every_n_steps": 2, "log_interval": 1}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(TrainConfig(**config), output_dir=straight)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}
    plain["output_dir"] = str(killed)
    for event, place, left in (
        ("pass", "2", []),
        # While the second state is written, and while the first one goes because the second is there.
        ("os.rename", f"resume{os.sep}step_000004.partial", ["step_000002", "step_000004.partial"]),
        ("shutil.rmtree", f"resume{os.sep}step_000002", ["step_000002", "step_000004"]),
        # While the finished model is written.
        ("os.rename", "model.partial", ["step_000006"]),
    ):
        arguments = [sys.executable, "-c", KILLED, json.dumps([plain, event, place, torch.get_num_threads()])]
        ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
        resume = killed / "resume"
        assert sorted(path.name for path in resume.iterdir()) == left if left else not resume.exists()
    assert not (killed / "model").exists()
    assert train(TrainConfig(**config), output_dir=killed) == killed / "model"
    assert_same_run(straight, killed)
    assert [path.name for path in (killed / "resume").iterdir()] == ["step_000006"]


def test_previews_do_not_change_the_training(settings, tmp_path):
    config = TrainConfig(
        **{**settings, "max_train_steps": 4, "save_model_every_n_steps": 2, "train_text_encoder": True}
    )
    with_previews, without = tmp_path / "with", tmp_path / "without"
    train(config, output_dir=with_previews, resolution=32, auto_test_model=True)
    train(config, output_dir=without, resolution=32, auto_test_model=False)
    assert_same_run(with_previews, without)
    assert sorted(path.name for path in (with_previews / "previews").glob("*.png")) == [
        f"step_{step:06d}.png" for step in (0, 2, 4)
    ]
    assert not (without / "previews").exists()


def test_accumulated_batches_equal_one_large_batch(settings, prior, tmp_path):
    config = TrainConfig(**{**settings, **prior, "max_train_steps": 3, "log_interval": 1, "adam_epsilon": 1e-3})
    batch, accumulated = tmp_path / "batch", tmp_path / "accumulated"
    train(config, output_dir=batch, train_batch_size=4)
    train(config, output_dir=accumulated, train_batch_size=2, gradient_accumulation_steps=2)
    for one, two in zip(log_of(batch), log_of(accumulated)):
        for name in ("loss", "instance_loss", "class_loss", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-4)
    base = load_models(config.pretrained_model_name_or_path).unet.state_dict()
    one, two = (read_weights(run / "model", "unet") for run in (batch, accumulated))
    moved = sum(float((one[name] - base[name]).square().sum()) for name in one) ** 0.5
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5
    assert apart < 1e-3 * moved


# What a finished, damaged or other run does.


def flip_a_byte(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    # In a new file, since tensors that were read from the old one still lie in it.
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["file", "file/run", "x" * 255])
def test_a_run_that_cannot_be_made_is_a_sentence(settings, tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(DbkitError, match=r"(no folder, or lies in what is none|has too long a name) \(.+\); choose"):
        train(**{**settings, "output_dir": tmp_path / name})


def test_a_log_that_is_a_folder_is_a_sentence(config):
    (config.output_dir / "log.jsonl").mkdir(parents=True)
    with pytest.raises(DbkitError, match=r"log\.jsonl is a folder where a file belongs"):
        train(config)


def test_a_finished_run_is_not_trained_again(config, capsys):
    model = train(config)
    before = {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*")}
    capsys.readouterr()
    assert train(config) == model == config.output_dir / "model"
    assert "\n2 steps done already; to train further, raise max_train_steps above that\n" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in config.output_dir.rglob("*")} == before
    # Of fewer steps than are done nothing is promised.
    assert train(config, max_train_steps=1) == model
    said = capsys.readouterr().out
    assert "2 steps done already" in said and "1 step" not in said


def test_a_damaged_finished_model_is_written_again_from_the_state(config):
    model = train(config)
    weights = read_weights(model, "unet")
    state = config.output_dir / "resume" / "step_000002"
    written = {path: path.stat().st_mtime_ns for path in state.iterdir()}
    flip_a_byte(model / "unet" / WEIGHTS["unet"])
    assert train(config) == model
    # The only state there is stays as it is.
    assert {path: path.stat().st_mtime_ns for path in state.iterdir()} == written
    assert_equal(read_weights(model, "unet"), weights)
    assert find_fault(model, step=2) is None


def test_a_run_extended_and_stopped_in_its_last_step_does_not_return_the_old_model(config):
    model = train(config)
    stop_in_pass(config, 2, step=4, max_train_steps=4)
    assert find_fault(model, step=2) is None
    assert train(config, max_train_steps=4) == model
    assert find_fault(model, step=4) is None
    state, weights = state_of(config.output_dir), read_weights(model, "unet")
    assert state["step"] == "step_000004"
    assert all(torch.equal(weights[name], state[f"unet/{name}"]) for name in weights)


def test_a_total_below_the_stopped_step_finishes_with_the_steps_that_are_done(config, capsys):
    stop_in_pass(config, 5, step=5, max_train_steps=8)
    model = train(config, max_train_steps=3)
    assert "5 of 5 steps are done" in capsys.readouterr().out
    assert find_fault(model, step=5) is None
    assert state_of(config.output_dir)["step"] == "step_000005"


def test_start_over_moves_the_earlier_run_aside(config, capsys):
    train(config)
    old = state_of(config.output_dir)
    train(config, start_over=True, seed=1)
    aside = config.output_dir.with_name(config.output_dir.name + "-1")
    assert f"the earlier run is moved to {aside}" in capsys.readouterr().out
    assert_equal(state_of(aside), old)
    assert state_of(config.output_dir)["step"] == "step_000002"
    assert [line["step"] for line in log_of(config.output_dir)] == [1, 2]


def test_a_damaged_state_is_skipped_by_name_and_the_one_before_continues(config, tmp_path, capsys):
    train(config, output_dir=tmp_path / "straight", max_train_steps=6, log_interval=1)
    train(config, max_train_steps=2, log_interval=1)
    older = config.output_dir / "resume" / "step_000002"
    shutil.copytree(older, tmp_path / "kept")
    train(config, max_train_steps=4, log_interval=1)
    newest = config.output_dir / "resume" / "step_000004"
    shutil.copytree(tmp_path / "kept", older)
    flip_a_byte(newest / "unet.safetensors")
    capsys.readouterr()
    stop_in_pass(config, 1, step=3, max_train_steps=6, log_interval=1)
    said = capsys.readouterr().out
    assert f"skipping {newest}: unet.safetensors has changed or is damaged" in said
    # The damaged state of a later step has not pushed out the good one of step 3.
    train(config, max_train_steps=6, log_interval=1)
    assert_same_run(tmp_path / "straight", config.output_dir)


def test_a_run_whose_only_state_is_damaged_is_refused(config):
    train(config)
    flip_a_byte(config.output_dir / "resume" / "step_000002" / "optimizer.pt")
    expected = r"no saved state in .*resume is whole; set start_over to begin again at step 0"
    with pytest.raises(DbkitError, match=expected):
        train(config, max_train_steps=4)
    train(config, max_train_steps=1, start_over=True)


def test_changed_settings_do_not_continue_a_run_and_are_named(config):
    train(config, max_train_steps=1)
    for name, value in {
        "seed": 1,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_text_encoder": True,
        "center_crop": False,
        "resolution": 72,
        "instance_prompt": "photo of qqq thing",
        "adam_beta1": 0.5,
        "max_grad_norm": 0.5,
    }.items():
        expected = rf"holds a run of 1 step that these settings do not continue: {name} was .* and is {value!r}"
        with pytest.raises(DbkitError, match=expected):
            train(config, **{name: value})


def test_settings_that_belong_to_a_session_may_change(config):
    train(config, max_train_steps=1)
    changes = {"learning_rate": 1e-5, "lr_scheduler": "cosine", "gradient_checkpointing": True, "log_interval": 1}
    train(config, **changes, save_precision="fp16", save_model_every_n_steps=1, checkpoints_total_limit=1)
    assert [line["step"] for line in log_of(config.output_dir)] == [1, 2]


def add_image(folder):
    draw_photo(folder / "white.png", colour="black")
    (folder / "white.txt").write_text("a black thing")


def change_image(folder):
    draw_photo(folder / "gold.png", colour="silver")


def remove_image(folder):
    (folder / "gold.png").unlink()


def change_caption(folder):
    (folder / "gold.txt").write_text("a silver thing")


def test_changed_data_do_not_continue_a_run(settings, photos, tmp_path):
    config = TrainConfig(**{**settings, "instance_prompt": None, "use_txt_as_label": True, "max_train_steps": 1})
    train(config)
    for change in (add_image, change_image, remove_image, change_caption):
        changed = shutil.copytree(photos, tmp_path / change.__name__)
        change(changed)
        with pytest.raises(DbkitError, match="do not continue: instance images or captions differ; change that back"):
            train(config, instance_data_dir=changed, max_train_steps=2)


def test_changed_class_images_do_not_continue_a_run(settings, prior):
    config = TrainConfig(**{**settings, **prior, "max_train_steps": 1})
    train(config)
    draw_photo(prior["class_data_dir"] / "navy.png", colour="black")
    with pytest.raises(DbkitError, match="do not continue: class images differ; change that back, choose another outp"):
        train(config, max_train_steps=2)


def test_another_model_does_not_continue_a_run(config, model, tmp_path):
    train(config, max_train_steps=1)
    other = shutil.copytree(model, tmp_path / "other")
    path = other / "unet" / WEIGHTS["unet"]
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(DbkitError, match="do not continue: pretrained_model_name_or_path differ"):
        train(config, pretrained_model_name_or_path=str(other))


def test_no_class_images_are_made_for_a_run_that_is_not_continued(config, prior, tmp_path):
    train(config, max_train_steps=1)
    with pytest.raises(DbkitError, match="do not continue: with_prior_preservation was False and is True"):
        train(config, **{**prior, "class_data_dir": tmp_path / "none yet"})
    assert not (tmp_path / "none yet").exists()


def test_moved_data_and_models_continue_a_run(config, model, photos, tmp_path):
    tokenizer = shutil.copytree(model / "tokenizer", tmp_path / "tokenizer")
    made = train(config, max_train_steps=1, tokenizer_name=str(tokenizer))
    # Where it lay is nobody's business who gets the model.
    assert str(tmp_path) not in (made / "manifest.json").read_text()
    moved = shutil.copytree(model, tmp_path / "moved")
    photos.rename(tmp_path / "elsewhere")
    tokenizer = tokenizer.rename(tmp_path / "there")
    places = {"pretrained_model_name_or_path": str(moved), "instance_data_dir": tmp_path / "elsewhere"}
    train(config, **places, tokenizer_name=str(tokenizer))
    assert [line["step"] for line in log_of(config.output_dir)] == [1, 2]
    with (tokenizer / "vocab.json").open("a") as file:
        file.write("\n")
    with pytest.raises(DbkitError, match="do not continue: tokenizer_name differ"):
        train(config, **places, tokenizer_name=str(tokenizer), max_train_steps=3)


def test_hidden_parts_are_of_inpainting_models_alone(config):
    with pytest.raises(
        DbkitError, match=r"inpainting_masks has no effect on .*, which is no inpainting model; leave it"
    ):
        train(config, inpainting_masks=3)


# What is wrong is said before the model is loaded.


@pytest.fixture
def broken_model(model, tmp_path) -> str:
    """A model folder that can be looked at, and not loaded."""
    folder = shutil.copytree(model, tmp_path / "broken")
    for part, name in WEIGHTS.items():
        (folder / part / name).write_bytes(b"not weights")
    return str(folder)


def damage_image(folder):
    (folder / "gold.png").write_bytes(b"not an image")


def remove_caption(folder):
    (folder / "gold.txt").unlink()


def nothing(folder):
    pass


@pytest.mark.parametrize(
    ("change", "damage", "expected"),
    [
        ({"with_prior_preservation": True}, nothing, "with_prior_preservation needs class_prompt"),
        ({"instance_prompt": None}, nothing, "no prompt is given: set instance_prompt, or use_txt_as_label"),
        ({"instance_data_dir": "nowhere"}, nothing, "instance_data_dir nowhere is not a folder"),
        ({}, damage_image, r"1 of 3 images are not usable: gold\.png cannot be read as an image"),
        (
            {"instance_prompt": None, "use_txt_as_label": True},
            remove_caption,
            r"1 of 3 images in .* have no caption \(gold\.png\)",
        ),
        ({"resolution": 60}, nothing, "resolution is 60; this model's pictures need a multiple of 8"),
        ({"test_prompts_file": "nowhere.txt"}, nothing, r"there is no prompts file nowhere\.txt"),
        (
            {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
            nothing,
            "lr_warmup_steps is 2 and the run has 2 steps; make the warm-up shorter",
        ),
        ({"mixed_precision": "fp16"}, nothing, "mixed_precision is fp16, which needs a GPU"),
    ],
)
def test_mistakes_are_said_before_the_model_is_loaded(settings, photos, broken_model, change, damage, expected):
    damage(photos)
    with pytest.raises(DbkitError, match=expected):
        train(**{**settings, "pretrained_model_name_or_path": broken_model, **change})
    assert not settings["output_dir"].exists()


def test_a_model_that_cannot_be_loaded_is_said_once_all_else_is_right(settings, broken_model):
    with pytest.raises(DbkitError, match=r"the model .*broken cannot be loaded \(.+\); copy or convert it again"):
        train(**{**settings, "pretrained_model_name_or_path": broken_model})


def test_a_model_that_predicts_something_else_is_refused(settings, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "sample")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
    with pytest.raises(DbkitError, match="predicts 'sample'; dbkit trains models of epsilon or v_prediction"):
        train(**{**settings, "pretrained_model_name_or_path": str(folder)})


# What is trained, and what it gives.


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_trained_parts_change_and_frozen_parts_do_not(config, model, train_text_encoder):
    made = train(config, train_text_encoder=train_text_encoder)
    trained = {"unet", "text_encoder"} if train_text_encoder else {"unet"}
    for part in WEIGHTS:
        before, after = read_weights(model, part), read_weights(made, part)
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == (set(before) if part in trained else set())


def test_a_finished_model_loads_in_diffusers_and_samples(config):
    made = train(config, train_text_encoder=True)
    pipeline = StableDiffusionPipeline.from_pretrained(made)
    random = torch.Generator().manual_seed(0)
    picture = pipeline("photo of zwx thing", num_inference_steps=2, height=64, width=64, generator=random).images[0]
    assert picture.size == (64, 64)
    live = CLIPTextModel.from_pretrained(made, subfolder="text_encoder").state_dict()
    saved = load_file(made / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in saved)
    assert_equal(
        {name.removeprefix("text_model."): tensor for name, tensor in live.items()},
        {name.removeprefix("text_model."): tensor for name, tensor in saved.items()},
    )


@pytest.mark.parametrize(("save_precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_usable_weights_have_the_asked_precision_and_the_state_stays_exact(config, save_precision, dtype):
    made = train(config, save_precision=save_precision)
    state = state_of(config.output_dir)
    for part in WEIGHTS:
        assert {tensor.dtype for tensor in read_weights(made, part).values()} == {dtype}
    for name, tensor in read_weights(made, "unet").items():
        assert state[f"unet/{name}"].dtype == torch.float32
        assert torch.equal(tensor, state[f"unet/{name}"].to(dtype))


def test_checkpoints_come_at_their_steps_and_the_oldest_go(config):
    train(config, max_train_steps=9, save_model_every_n_steps=2, checkpoints_total_limit=2)
    folder = config.output_dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000006", "step_000008"]
    assert find_fault(folder / "step_000008", step=8) is None
    assert load_models(folder / "step_000008").facts.resolution == 64
    assert [path.name for path in (config.output_dir / "resume").iterdir()] == ["step_000009"]


def test_the_recommended_checkpoint_stays_here_and_at_home_beside_the_last_ones(config, monkeypatch, tmp_path):
    worth = {0: 0.5, 2: 0.5, 4: 0.1, 6: 0.4, 8: 0.4, 9: 0.4}

    def measure(self, step):
        with (self.run / "figures.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "validation_loss": worth[step]}) + "\n")

    monkeypatch.setattr("dbkit.judge.Judge.__call__", measure)
    places = {"output_dir": tmp_path / "home" / "run", "local_dir": tmp_path / "fast"}
    places["output_dir"].parent.mkdir()
    saves = {"max_train_steps": 9, "save_model_every_n_steps": 2, "checkpoints_total_limit": 1, "judge_steps": True}
    train(config, **places, **saves)
    for folder in (places["output_dir"], places["local_dir"] / "run"):
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000004", "step_000008"]
    assert status(places["output_dir"]).recommended.step == 4


def test_without_saving_in_between_there_is_only_the_end(config):
    train(config, save_model_every_n_steps=None)
    assert not (config.output_dir / "checkpoints").exists()
    assert [path.name for path in (config.output_dir / "resume").iterdir()] == ["step_000002"]


def test_the_settings_that_ran_are_beside_the_run(config):
    train(config, seed=5)
    found = TrainConfig.load(config.output_dir / "settings.yaml")
    assert found.seed == 5
    assert found == TrainConfig.from_dict({**vars(config), "seed": 5})


@pytest.mark.parametrize(("with_prior", "name"), [(False, "native"), (True, "dreambooth")])
def test_a_run_without_a_folder_goes_to_the_workspace(settings, prior, workspace_folder, with_prior, name):
    made = train(**{**settings, **(prior if with_prior else {}), "output_dir": None, "max_train_steps": 1})
    assert made == workspace_folder / "runs" / name / "model"


def test_class_images_that_are_missing_are_generated(settings, workspace_folder, capsys):
    prior = {"with_prior_preservation": True, "class_prompt": "photo of a thing", "num_class_images": 2}
    train(**{**settings, **prior, "max_train_steps": 1})
    (folder,) = (workspace_folder / "class_images").iterdir()
    assert sorted(path.name for path in folder.glob("*.png")) == ["class-00000.png", "class-00001.png"]
    assert f"\nclass images: 2 generated, 0 found: {folder}\n" in capsys.readouterr().out


def test_epochs_give_the_steps_when_no_total_is_set(settings, capsys):
    train(**{**settings, "max_train_steps": None, "num_train_epochs": 3, "train_batch_size": 2})
    # 3 images 3 times, 2 at each step: 4.5 steps.
    said = capsys.readouterr().out
    assert "\n5 steps x 2 images = 10 samples: each of 3 instance images is seen 3.33 times on average\n" in said
    assert [line["step"] for line in log_of(settings["output_dir"])] == [1, 5]


def test_the_text_encoder_learns_at_its_own_rate(settings, tmp_path):
    moved = {}
    for name, rate in (("same", None), ("slower", 1e-6)):
        model = train(
            **{**settings, "output_dir": tmp_path / name},
            train_text_encoder=True,
            text_encoder_learning_rate=rate,
        )
        for part in ("unet", "text_encoder"):
            before = read_weights(Path(settings["pretrained_model_name_or_path"]), part)
            after = read_weights(model, part)
            moved[name, part] = max(float((after[key] - before[key]).abs().max()) for key in before)
    assert moved["slower", "text_encoder"] < 0.05 * moved["same", "text_encoder"]
    assert moved["slower", "unet"] == pytest.approx(moved["same", "unet"], rel=0.5)


def weights_after(settings: dict, steps: int, tmp_path: Path, part: str = "unet") -> dict:
    model = train(**{**settings, "output_dir": tmp_path / f"{steps} steps", "max_train_steps": steps})
    return read_weights(model, part)


def test_the_average_of_the_weights_is_what_is_saved(settings, model, tmp_path):
    settings = {**settings, "learning_rate": 1e-3}
    averages = read_weights(model, "unet")
    for step in (1, 2, 3):
        decay = min(0.3, (1 + step) / (10 + step))
        weights = weights_after(settings, step, tmp_path)
        averages = {name: decay * averages[name] + (1 - decay) * weights[name] for name in weights}
    run = tmp_path / "averaged"
    made = train(**{**settings, "output_dir": run, "max_train_steps": 3}, use_ema=True, ema_decay=0.3)
    saved, state = read_weights(made, "unet"), state_of(run)
    for name, average in averages.items():
        torch.testing.assert_close(saved[name], average)
        assert torch.equal(state[f"ema_unet/{name}"], saved[name])
        assert torch.equal(state[f"unet/{name}"], weights[name])
    assert distance(saved, weights) > 0.1 * distance(weights, read_weights(model, "unet"))


@pytest.mark.parametrize("stop", [2, 0.5])
def test_the_text_encoder_rests_after_its_last_step(settings, tmp_path, stop):
    settings = {**settings, "train_text_encoder": True, "learning_rate": 1e-3}
    at_two, unet_at_two = (weights_after(settings, 2, tmp_path, part) for part in ("text_encoder", "unet"))
    run = tmp_path / "stopped"
    made = train(**{**settings, "output_dir": run, "max_train_steps": 4}, stop_text_encoder_training=stop)
    assert_equal(read_weights(made, "text_encoder"), at_two)
    assert distance(read_weights(made, "unet"), unet_at_two) > 0
    moments = torch.load(next((run / "resume").iterdir()) / "optimizer.pt", weights_only=True)["state"]
    # What the optimizer knew of it is gone; the U-Net's comes first.
    assert set(moments) == set(range(len(unet_at_two)))


def test_a_part_of_all_steps_stays_that_of_the_first_total(settings, tmp_path):
    settings = {**settings, "train_text_encoder": True, "learning_rate": 1e-3, "stop_text_encoder_training": 0.55}
    at_two = read_weights(train(**settings, use_ema=True), "text_encoder")
    assert_equal(read_weights(train(**{**settings, "max_train_steps": 4}, use_ema=True), "text_encoder"), at_two)


@pytest.mark.parametrize(
    ("stop", "total", "expected"), [(0.55, 100, 55), (0.5, 3, 2), (0.001, 10, 1), (7, 10, 7), (None, 9, 9)]
)
def test_the_last_step_of_the_text_encoder(config, stop, total, expected):
    config = replace(config, train_text_encoder=True, stop_text_encoder_training=stop)
    assert _rest_after(config, total, None) == expected


def test_what_rests_keeps_its_averages_so_that_the_unet_learns_to_read_them(settings, tmp_path):
    settings = {**settings, "train_text_encoder": True, "use_ema": True, "learning_rate": 1e-3}
    at_two = weights_after(settings, 2, tmp_path, "text_encoder")
    made = train(**{**settings, "max_train_steps": 4}, stop_text_encoder_training=2)
    assert_equal(read_weights(made, "text_encoder"), at_two)
    state = state_of(made.parent)
    assert all(torch.equal(state[f"text_encoder/{name}"], weight) for name, weight in at_two.items())


def test_clip_skip_trains_no_layer_that_it_passes_over_and_is_kept_in_the_model(settings, model):
    made = train(**settings, clip_skip=2, train_text_encoder=True)
    before, after = (read_weights(folder, "text_encoder") for folder in (model, made))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".layers.0." in name for name in changed) and any("final_layer_norm" in name for name in changed)
    assert not any(".layers.1." in name for name in changed)
    assert clip_skip_of(load_models(made).text_encoder.config) == 2


@pytest.mark.parametrize(
    ("clip_skip", "layers", "expected"),
    [
        (3, 2, "clip_skip is 3 and the text encoder has 2 layers; lower it"),
        (2, 23, "clip_skip is 2, and the text encoder of Stable Diffusion 2 ends at its second-to-last layer already"),
    ],
)
def test_a_clip_skip_that_does_not_suit_the_model_is_refused(config, copied, clip_skip, layers, expected):
    path = copied / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": layers}))
    with pytest.raises(DbkitError, match=expected):
        train(config, pretrained_model_name_or_path=str(copied), clip_skip=clip_skip)


def test_another_vae_is_used_and_saved_with_the_model(settings, copied, tmp_path):
    weights = load_file(copied / "vae" / WEIGHTS["vae"])
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, copied / "vae" / WEIGHTS["vae"])
    own = first_losses(TrainConfig(**settings))
    for name, folder in (("model", copied), ("vae", copied / "vae")):
        config = TrainConfig(**{**settings, "output_dir": tmp_path / name, "pretrained_vae_name_or_path": folder})
        assert first_losses(config) != pytest.approx(own, rel=1e-3)
        saved = read_weights(tmp_path / name / "model", "vae")
        assert all(torch.allclose(saved[key], weights[key] * 1.5) for key in weights)


def test_a_vae_counts_by_what_it_holds_and_not_by_where_it_lies(settings, copied, tmp_path):
    config = TrainConfig(**{**settings, "pretrained_vae_name_or_path": str(copied / "vae")})
    train(config)
    shutil.copytree(copied / "vae", tmp_path / "moved")
    train(config, max_train_steps=3, pretrained_vae_name_or_path=str(tmp_path / "moved"))
    path = copied / "vae" / WEIGHTS["vae"]
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(DbkitError, match="these settings do not continue: pretrained_vae_name_or_path differ"):
        train(config, max_train_steps=4)


def test_a_folder_without_a_vae_is_refused(config, tmp_path):
    with pytest.raises(DbkitError, match=r"pretrained_vae_name_or_path .* has no VAE in it; give a folder"):
        train(config, pretrained_vae_name_or_path=str(tmp_path))


def test_no_usable_weights_are_saved_before_save_min_steps(config):
    train(config, max_train_steps=6, save_model_every_n_steps=2, save_min_steps=3)
    assert [path.name for path in sorted((config.output_dir / "checkpoints").iterdir())] == ["step_000004"]


def test_prompts_that_the_model_reads_only_in_part_are_said(settings, capsys):
    prompt = "z" * 90
    train(**{**settings, "instance_prompt": prompt, "max_train_steps": 1})
    said = capsys.readouterr().out
    assert "the first prompt has 90 tokens; the model reads at most 75" in said
    assert f"cut after 75 of 90 tokens: {prompt}" in said


def test_previews_show_the_prompts_that_were_asked_for(settings, prior, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red zwx\na blue zwx\n")
    choices = {
        "photo of zwx thing, photo of zwx thing in the snow, photo of a thing": prior,
        "my own": {"test_prompt": "my own"},
        "a red zwx, a blue zwx": {"test_prompt": "my own", "test_prompts_file": tmp_path / "prompts.txt"},
    }
    for number, (expected, change) in enumerate(choices.items()):
        run = tmp_path / f"run{number}"
        short = {"output_dir": run, "max_train_steps": 1, "resolution": 32, "auto_test_model": True}
        train(**{**settings, **change, **short})
        names = sorted(path.name for path in (run / "previews" / "step_000001").iterdir())
        assert [name[3:].partition("-seed42")[0] for name in names] == expected.split(", ")


def test_guidance_shapes_the_previews_and_the_class_images(settings, prior, tmp_path):
    shown, classes = [], []
    for guidance_scale in (1.0, 7.5):
        run = tmp_path / f"guidance{guidance_scale}"
        changes = {
            "output_dir": run,
            "class_data_dir": tmp_path / f"class{guidance_scale}",
            "guidance_scale": guidance_scale,
        }
        train(**{**settings, **prior, **changes, "max_train_steps": 1, "resolution": 32, "auto_test_model": True})
        shown.append(next((run / "previews" / "step_000000").glob("01-*.png")))
        classes.append(next(changes["class_data_dir"].glob("class-*.png")))
    assert [path.name.rpartition("-")[2] for path in shown] == ["guidance1.png", "guidance7.5.png"]
    for one, two in (shown, classes):
        assert one.read_bytes() != two.read_bytes()


def test_every_training_setting_changes_the_weights(config, tmp_path):
    changes = [
        {},
        {"seed": 1},
        {"center_crop": False},
        {"resolution": 72},
        {"instance_prompt": "photo of qqq thing"},
        {"learning_rate": 2e-4},
        {"train_batch_size": 2},
        {"train_batch_size": 2, "scale_lr": True},
        {"lr_scheduler": "cosine"},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.9},
        {"adam_weight_decay": 0.5},
        {"adam_epsilon": 1e-2},
        {"lr_scheduler": "polynomial", "lr_power": 2},
        {"max_grad_norm": 1e-4},
        {"train_text_encoder": True},
        {"tokenizer_name": str(tmp_path / "tokenizer")},
    ]
    # Another tokenizer: the same words under other numbers.
    source = Path(config.pretrained_model_name_or_path) / "tokenizer"
    words = list(json.loads((source / "vocab.json").read_text()))
    other = {word: number for number, word in enumerate([*reversed(words[:-2]), *words[-2:]])}
    shutil.copytree(source, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(other))
    of_weights = {}
    for number, change in enumerate(changes):
        weights = read_weights(
            train(config, **{"adam_epsilon": 1e-6, **change}, output_dir=tmp_path / f"{number}"), "unet"
        )
        of_weights.setdefault(b"".join(weights[name].numpy().tobytes() for name in sorted(weights)), []).append(change)
    assert [same for same in of_weights.values() if len(same) > 1] == []


# Ways to save memory.


def distance(one: dict, two: dict) -> float:
    return sum(float((one[name].float() - two[name].float()).square().sum()) for name in one) ** 0.5


def test_gradient_checkpointing_gives_the_same_weights(config, model, tmp_path):
    options = {"train_text_encoder": True, "max_train_steps": 3}
    plain, saving = (
        train(config, **options, gradient_checkpointing=on, output_dir=tmp_path / str(on)) for on in (False, True)
    )
    for part in ("unet", "text_encoder"):
        one, two, base = (read_weights(folder, part) for folder in (plain, saving, model))
        assert distance(one, two) < 1e-3 * distance(one, base)


def test_bf16_arithmetic_stays_close_and_trains_fp32_weights(config, model, tmp_path):
    # So large an epsilon makes the steps proportional to the gradients, and comparable.
    options = {"adam_epsilon": 1.0, "learning_rate": 1e-2, "max_train_steps": 3, "log_interval": 1}
    runs = [tmp_path / precision for precision in ("no", "bf16")]
    for run in runs:
        train(config, **options, mixed_precision=run.name, output_dir=run)
    for one, two in zip(*(log_of(run) for run in runs)):
        assert one["loss"] != two["loss"]
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02)
    one, two, base = (read_weights(folder, "unet") for folder in (*(run / "model" for run in runs), model))
    assert distance(one, two) < distance(one, base)
    tensors = [value for value in state_of(runs[1]).values() if isinstance(value, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize(
    ("optimizer", "library"),
    [(name, library) for name, libraries in LIBRARIES.items() for library in libraries if name != "adamw"],
)
def test_each_optimizer_trains_and_resumes_exactly(settings, tmp_path, monkeypatch, capsys, optimizer, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    rate = 1.0 if optimizer == "prodigy" else 1e-4
    config = TrainConfig(**{**settings, "optimizer": optimizer, "learning_rate": rate, "log_interval": 1})
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    with monkeypatch.context() as patch:
        if library == "torchao":
            patch.setitem(sys.modules, "bitsandbytes", None)
        train(config, output_dir=straight)
        train(config, output_dir=resumed, max_train_steps=1)
    capsys.readouterr()
    # bitsandbytes is back now, and a run that began with torchao stays with it.
    train(config, output_dir=resumed)
    assert (f"{library}'s 8-bit AdamW is used\n" in capsys.readouterr().out) == (optimizer == "adamw8bit")
    assert_same_run(straight, resumed)
    kept = [value for value in state_of(resumed).values() if isinstance(value, torch.Tensor)]
    assert any(tensor.dtype == torch.uint8 for tensor in kept) == (optimizer == "adamw8bit")


def test_another_optimizer_does_not_continue_a_run(config):
    train(config, max_train_steps=1)
    expected = "optimizer was 'adamw' and is 'adafactor', library of the optimizer was 'torch' and is 'transformers'; "
    with pytest.raises(DbkitError, match=expected):
        train(config, optimizer="adafactor")


@contextlib.contextmanager
def no_memory_for_the_unet(training: bool):
    """Every pass of the U-Net in that mode ends as it does on a GPU that is full."""

    def fail(module, inputs):
        if isinstance(module, UNet2DConditionModel) and module.training == training and module.device.type != "meta":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    handle = register_module_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_a_preview_without_memory_costs_no_run(config, tmp_path, capsys):
    with no_memory_for_the_unet(training=False):
        train(config, auto_test_model=True, output_dir=tmp_path / "without memory")
    said = capsys.readouterr().out
    for step in (0, 2):
        assert f"no preview at step {step}: too little GPU memory; set sample_batch_size to 1 or auto_test" in said
    train(config, output_dir=tmp_path / "without previews")
    assert_same_run(tmp_path / "without memory", tmp_path / "without previews")


def test_a_step_without_memory_is_said_with_what_takes_less(config):
    with (
        no_memory_for_the_unet(training=True),
        pytest.raises(DbkitError, match=r"the GPU ran out of memory at .+; take .+, and train again"),
    ):
        train(config)


# Learning.


@torch.no_grad()
def loss_at_fixed_noise(folder: Path, image: Path) -> float:
    """The mean loss over a few timesteps, each with its own noise, which does not change from call to call."""
    models = load_models(folder)
    pixels = torch.tensor(np.asarray(Image.open(image))).permute(2, 0, 1)[None] / 127.5 - 1
    latents = models.vae.encode(pixels).latent_dist.mean * models.vae.config.scaling_factor
    ids = models.tokenizer("photo of zwx thing", padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = models.text_encoder(ids).last_hidden_state
    losses = []
    for timestep in (100, 300, 500, 700, 900):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep))
        at = torch.tensor([timestep])
        model_pred = models.unet(models.noise_scheduler.add_noise(latents, noise, at), at, states).sample
        losses.append(float(((model_pred - noise) ** 2).mean()))
    return sum(losses) / len(losses)


def test_training_on_one_image_lowers_its_loss_and_a_wrong_target_does_not(settings, model, tmp_path, monkeypatch):
    image = draw_photo(tmp_path / "one" / "image.png", size=(64, 64))
    config = TrainConfig(
        **{**settings, "instance_data_dir": image.parent, "learning_rate": 1e-3, "max_train_steps": 60}
    )
    before = loss_at_fixed_noise(model, image)
    after = loss_at_fixed_noise(train(config, output_dir=tmp_path / "right"), image)
    assert after < 0.5 * before

    # The wrong sign, to show that the line above can fail.
    monkeypatch.setattr(sys.modules["dbkit.train"], "noise_target", lambda kind, latents, noise, *others: -noise)
    wrong = loss_at_fixed_noise(train(config, output_dir=tmp_path / "wrong", max_train_steps=20), image)
    assert wrong > before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"log_interval": 1}, r"the loss is nan at step \d; lower learning_rate and train again"),
        (
            {"save_model_every_n_steps": 7},
            "the unet has weights that are not numbers at step 7, and nothing was saved; lower learning_rate",
        ),
    ],
)
def test_weights_that_are_not_numbers_are_never_saved(config, change, expected):
    train(config, max_train_steps=1)
    before = state_of(config.output_dir)
    with pytest.raises(DbkitError, match=expected):
        train(config, **change, learning_rate=1, max_train_steps=8)
    assert_equal(state_of(config.output_dir), before)
    assert all(math.isfinite(line["loss"]) for line in log_of(config.output_dir))
    train(config, max_train_steps=3)
    assert find_fault(config.output_dir / "model", step=3) is None


def test_a_learning_rate_too_small_to_change_anything_is_said(config):
    with pytest.raises(DbkitError, match="2 steps changed no weight; raise learning_rate"):
        train(config, learning_rate=1e-30)
    assert not (config.output_dir / "model").exists()
