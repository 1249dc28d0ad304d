"""Settings chosen from the facts: the table of cases, what is given stands, runs that go on keep theirs, and every
figure that is printed can be recomputed from what stands beside it.
"""

import dataclasses
import inspect
import re

import pytest
import torch
import yaml
from conftest import draw_photo

from dbkit import DbkitError, TrainConfig, embedded, train
from dbkit.auto import Machine, choose, has_8bit_adam, machine_of, memory
from dbkit.cli import _parse
from dbkit.memory import STABLE_DIFFUSION_1, USABLE, Place, step_peak
from dbkit.settings import AUTO
from dbkit.train_config import TIERS

T4 = Machine("Tesla T4", 15.6, "fp16", True)
T4_PLAIN = dataclasses.replace(T4, has_8bit_adam=False)
L4 = Machine("NVIDIA L4", 23.6, "bf16", True)
A100_40, A100_80 = Machine("NVIDIA A100", 42, "bf16", True), Machine("NVIDIA A100", 84, "bf16", True)
SMALL, TWELVE = Machine("a card of 8 GB", 7.9, "bf16", True), Machine("a card of 12 GB", 12.3, "bf16", True)
CPU = Machine("CPU", None, "fp32", False)

PRIOR = {"with_prior_preservation": True, "class_prompt": "photo of a dog"}
TEXT = {**PRIOR, "train_text_encoder": True}
PERSON = {**TEXT, "instance_prompt": "photo of zwx Person", "class_prompt": "photo of a person"}
NATIVE = {"instance_prompt": None, "use_txt_as_label": True}
TINY = {**PRIOR, "pretrained_model_name_or_path": embedded.NAME, "resolution": embedded.RESOLUTION}
NAMES = [field.name for field in dataclasses.fields(TrainConfig) if field.metadata.get("auto")]


def made(**changes):
    common = {"pretrained_model_name_or_path": "owner/name", "instance_data_dir": "photos", "auto": True}
    return TrainConfig(**{**common, "instance_prompt": "photo of zwx dog", **changes})


@pytest.mark.parametrize(
    "changes, images, machine, steps, rate, batch, passes, checkpointing, eight, class_images, every",
    [
        (PRIOR, 5, T4, 800, 5e-6, 1, 1, False, True, 50, 200),
        (PRIOR, 10, T4, 1000, 5e-6, 1, 1, False, True, 100, 250),
        (PRIOR, 10, T4_PLAIN, 1000, 5e-6, 1, 1, True, False, 100, 250),
        (PRIOR, 20, L4, 2000, 5e-6, 1, 1, False, False, 200, 500),
        (PRIOR, 40, A100_40, 4000, 5e-6, 1, 1, False, False, 200, 500),
        (PRIOR, 200, A100_80, 4000, 5e-6, 1, 1, False, False, 200, 500),
        (PRIOR, 10, TWELVE, 1000, 5e-6, 1, 1, False, True, 100, 250),
        (PRIOR, 10, SMALL, 1000, 5e-6, 1, 1, True, True, 100, 250),
        ({**PRIOR, "resolution": 768}, 10, T4, 1000, 5e-6, 1, 1, False, True, 100, 250),
        ({**PRIOR, "resolution": 768}, 10, A100_40, 1000, 5e-6, 1, 1, False, False, 100, 250),
        (TEXT, 10, T4, 1000, 2e-6, 1, 1, False, True, 100, 250),
        (PERSON, 20, L4, 2000, 1e-6, 1, 1, False, False, 200, 500),
        ({}, 3, CPU, 400, 5e-6, 1, 1, False, False, 100, 100),
        (NATIVE, 20, T4, 500, 1e-5, 4, 1, False, True, 100, 100),
        (NATIVE, 200, L4, 5000, 1e-5, 4, 1, False, False, 100, 500),
        (NATIVE, 1000, A100_80, 15000, 1e-5, 4, 1, False, False, 100, 500),
        (NATIVE, 40, CPU, 1000, 1e-5, 1, 4, False, False, 100, 250),
        (TINY, 5, CPU, 200, 2e-4, 4, 1, False, False, 24, 100),
        (TINY, 24, T4, 200, 2e-4, 4, 1, False, False, 24, 100),
    ],
)
def test_the_table(changes, images, machine, steps, rate, batch, passes, checkpointing, eight, class_images, every):
    values, reasons = choose(made(**changes), [images], machine)
    assert values == {
        "max_train_steps": steps,
        "learning_rate": rate,
        "train_batch_size": batch,
        "gradient_accumulation_steps": passes,
        "gradient_checkpointing": checkpointing,
        "use_8bit_adam": eight,
        "num_class_images": class_images,
        "save_model_every_n_steps": every,
        **({"memory": "tiny"} if machine is SMALL else {}),
    }
    # All but the class images of a training without them are accounted for, and the values are good ones.
    assert {name for name in NAMES if f"{name} " in "\n".join(reasons)} >= set(NAMES) - {"num_class_images"}
    dataclasses.replace(made(**changes), **values)


@pytest.mark.parametrize(
    ("machine", "checkpointing"), [(SMALL, True), (TWELVE, False), (T4, False)], ids=lambda value: str(value)
)
def test_a_lora_learns_faster_and_fits_a_small_card(machine, checkpointing):
    values, reasons = choose(made(adapter="lora", **PRIOR), [10], machine)
    assert values["learning_rate"] == 1e-4 and values["use_8bit_adam"] is False
    assert values["gradient_checkpointing"] is checkpointing
    assert "too little room" not in reasons[0]


def test_a_lora_of_the_embedded_model_has_a_rate_and_steps_of_its_own():
    values, reasons = choose(made(adapter="lora", **TINY), [5], CPU)
    assert values["learning_rate"] == pytest.approx(2e-3) and values["max_train_steps"] == 400
    assert "max_train_steps 400: twice what suits tiny-sd without a LoRA" in reasons


def test_another_optimizer_has_no_8_bit_moments_and_prodigy_a_rate_of_its_own():
    values, _ = choose(made(optimizer="prodigy", **PRIOR), [10], T4)
    assert values["learning_rate"] == 1 and values["use_8bit_adam"] is False
    values, reasons = choose(made(optimizer="lion", **PRIOR), [10], T4)
    assert values["learning_rate"] == 1e-6
    assert "learning_rate 1e-06: that of diffusers for a subject, a fifth of it with lion" in reasons


def test_contradictions_with_what_is_to_be_chosen_wait_and_others_do_not():
    assert made(optimizer="prodigy").learning_rate == AUTO
    with pytest.raises(DbkitError, match=r"^optimizer prodigy multiplies the rate that it finds by learning_rate"):
        made(optimizer="prodigy", learning_rate=1e-4)
    with pytest.raises(DbkitError, match=r"^class_prompt has no effect"):
        made(class_prompt="photo of a dog")


def test_class_images_are_for_each_class_and_steps_for_all_concepts():
    values, _ = choose(made(**PRIOR), [4, 12], T4)
    assert (values["num_class_images"], values["max_train_steps"]) == (120, 1600)


# The table in the README of ShivamShrirao/diffusers, examples/dreambooth, in GB on a T4.
@pytest.mark.parametrize(
    ("dtype", "batch", "passes", "checkpointing", "eight", "published"),
    [
        ("fp16", 1, 1, True, True, 9.92),
        ("fp32", 1, 1, True, True, 10.08),
        ("fp16", 2, 1, True, True, 10.4),
        ("fp16", 1, 1, False, True, 11.17),
        ("fp32", 1, 1, False, True, 11.17),
        ("fp16", 1, 2, True, True, 11.56),
        ("fp16", 2, 1, False, True, 13.67),
        ("fp16", 1, 2, False, True, 13.7),
        ("fp16", 1, 1, True, False, 15.79),
        ("fp16", 1, 1, False, False, 17.7),
    ],
)
def test_the_estimate_of_memory_is_near_the_published_figures(dtype, batch, passes, checkpointing, eight, published):
    machine = dataclasses.replace(T4, dtype=dtype)
    way = {
        "train_batch_size": batch,
        "gradient_accumulation_steps": passes,
        "gradient_checkpointing": checkpointing,
        "use_8bit_adam": eight,
    }
    assert memory(made(**PRIOR), STABLE_DIFFUSION_1, machine, **way)[0] == pytest.approx(published, rel=0.12)


@pytest.mark.parametrize("machine", [T4, T4_PLAIN, L4, A100_80, SMALL, TWELVE])
@pytest.mark.parametrize("changes", [PRIOR, TEXT, NATIVE, {**PRIOR, "resolution": 768}])
def test_the_printed_sum_is_true_and_fits_or_says_that_it_does_not(machine, changes):
    values, reasons = choose(made(**changes), [10], machine)
    need, name, parts = re.search(r"about ([\d.]+) GB( for Stable Diffusion 1) = ([^;]+)", reasons[0]).groups()
    assert float(need) == pytest.approx(sum(map(float, re.findall(r"([\d.]+) GB of", parts))), abs=0.4) and name
    assert ("too little room" in reasons[0]) == (float(need) > USABLE * machine.memory)
    assert "trained weights" in parts and "CUDA" in parts
    config = dataclasses.replace(made(**changes), **values)
    place = Place("cuda", {"fp16": torch.float16, "bf16": torch.bfloat16}[machine.dtype])
    assert float(need) == pytest.approx(step_peak(config, STABLE_DIFFUSION_1, place).total / 1e9, abs=0.06)


@pytest.mark.parametrize("images", [1, 5, 10, 39, 40, 41, 200])
@pytest.mark.parametrize("changes", [PRIOR, {}, NATIVE, {**NATIVE, "train_batch_size": 3}])
def test_the_printed_steps_are_true(images, changes):
    values, reasons = choose(made(**changes), [images], L4)
    said = next(reason for reason in reasons if reason.startswith("max_train_steps"))
    steps, count, times, product = map(
        int, re.match(r"max_train_steps (\d+): (\d+) images? x (\d+) times = (\d+)", said).groups()
    )
    seen = product
    if least := re.search(r"at least (\d+)", said):
        seen = max(seen, int(least[1]))
    if most := re.search(r"at most (\d+)", said):
        seen = min(seen, int(most[1]))
    together = int(found[1]) if (found := re.search(r"; (\d+) in each step", said)) else 1
    assert (count, count * times) == (images, product)
    assert steps == values["max_train_steps"] == -(-seen // together)


def test_without_bitsandbytes_it_says_what_would_help():
    reason = choose(made(**PRIOR), [10], T4_PLAIN)[1][0]
    assert reason.endswith(
        "; that leaves too little room: a LoRA or a larger GPU is needed; after pip install bitsandbytes it is 6 bytes "
        "a parameter less"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_train_steps", 300),
        ("learning_rate", 5e-6),
        ("learning_rate", 3e-6),
        ("train_batch_size", 2),
        ("gradient_accumulation_steps", 3),
        ("gradient_checkpointing", True),
        ("gradient_checkpointing", False),
        ("use_8bit_adam", False),
        ("num_class_images", 7),
        ("save_model_every_n_steps", None),
    ],
)
def test_what_is_given_stands_even_where_it_is_the_default(name, value):
    config = made(**PRIOR, **{name: value})
    assert getattr(config, name) == value
    values, reasons = choose(config, [10], T4)
    assert name not in values and set(values) == set(NAMES) - {name}
    assert not any(re.search(rf"\b{name} ", reason.partition(":")[0]) for reason in reasons)


def test_what_is_given_is_reckoned_with():
    values, _ = choose(made(**PRIOR, train_batch_size=2, gradient_checkpointing=False), [10], T4_PLAIN)
    assert values["max_train_steps"] == 500
    values, _ = choose(made(**NATIVE, train_batch_size=2), [20], L4)
    assert (values["gradient_accumulation_steps"], values["max_train_steps"]) == (2, 500)
    # Ways that were not left to be chosen are not tried: with Adam whole only checkpointing is left.
    assert choose(made(**PRIOR, use_8bit_adam=False), [10], T4)[0]["gradient_checkpointing"] is True


def test_tiny_is_the_last_way_and_only_where_nothing_given_speaks_against_it():
    values, reasons = choose(made(**PRIOR), [10], SMALL)
    assert values["memory"] == "tiny"
    assert re.search(r"memory tiny: .* about 5\.\d GB", reasons[0])
    assert "bitsandbytes" not in reasons[0] and "too little room" not in reasons[0]
    values, _ = choose(made(**NATIVE), [20], SMALL)
    assert (values["memory"], values["train_batch_size"], values["gradient_accumulation_steps"]) == ("tiny", 4, 1)
    against = (
        {"use_8bit_adam": False},
        {"gradient_checkpointing": True},
        {"use_ema": True},
        {"gradient_accumulation_steps": 2},
        {"optimizer": "lion"},
        {"adapter": "lora"},
        {"memory": "small"},
    )
    for given in against:
        assert "memory" not in choose(made(**PRIOR, **given), [10], SMALL)[0]
    for machine in (L4, TWELVE, dataclasses.replace(SMALL, dtype="fp16")):
        assert "memory" not in choose(made(**PRIOR), [10], machine)[0]


@pytest.mark.parametrize("machine", [A100_80, SMALL, CPU])
@pytest.mark.parametrize("tier", ["fast", "balanced", "small", "tiny"])
def test_a_tier_that_is_given_decides(machine, tier):
    config = made(**NATIVE, memory=tier)
    values, reasons = choose(config, [20], machine)
    assert (values["gradient_checkpointing"], values["use_8bit_adam"]) == TIERS[tier] and "memory" not in values
    assert tier != "tiny" or values["gradient_accumulation_steps"] == 1
    assert "nothing is traded" not in reasons[0]
    dataclasses.replace(config, **values)


def test_whether_8_bit_moments_work_is_asked_beside_a_tier_too():
    assert has_8bit_adam(made(memory="fast"), torch.device("cpu")) == has_8bit_adam(made(), torch.device("cpu"))


def test_a_number_of_epochs_decides_the_steps():
    values, reasons = choose(made(num_train_epochs=30), [10], T4)
    assert values["max_train_steps"] is None and values["save_model_every_n_steps"] == 100
    assert "max_train_steps empty: num_train_epochs 30 decides" in reasons


def test_the_word_leaves_one_setting_without_the_switch():
    config = made(auto=False, learning_rate=AUTO, **PRIOR)
    assert config.max_train_steps is None and config.train_batch_size == 1
    assert choose(config, [10], T4)[0] == {"learning_rate": 5e-6}


def test_the_word_is_refused_where_nothing_chooses():
    with pytest.raises(DbkitError, match=r"^seed is 'auto'; write a whole number$"):
        made(seed="auto")


def test_a_switch_that_is_none_is_refused_in_a_sentence():
    with pytest.raises(DbkitError, match=r"^auto is 'perhaps'; write true or false$"):
        made(auto="perhaps")


def test_settings_left_to_be_chosen_are_compared_saved_and_loaded_like_others(tmp_path):
    config = made(learning_rate=2e-6)
    assert TrainConfig.load(config.save(tmp_path / "a.yaml")) == config == made(learning_rate=2e-6) != made()
    # A copy with a change leaves the same to be chosen.
    assert dataclasses.replace(config, resolution=768).max_train_steps == AUTO
    assert inspect.signature(TrainConfig).parameters["learning_rate"].default == 5e-6


def test_flags_and_files_leave_out_what_is_to_be_chosen(tmp_path):
    (tmp_path / "train.yaml").write_text("auto: true\nlearning_rate: 1.0e-05\n", encoding="utf-8")
    flags = ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "photos", "--instance_prompt", "zwx"]
    _, config = _parse(["train", "--config", "train.yaml", *flags, "--no-gradient_checkpointing"])
    assert (config.learning_rate, config.gradient_checkpointing, config.use_8bit_adam) == (1e-5, False, AUTO)
    assert _parse(["train", *flags, "--auto", "--train_batch_size", "2"])[1].train_batch_size == 2
    assert _parse(["train", *flags])[1] == made(auto=False, pretrained_model_name_or_path="m", instance_prompt="zwx")


def test_the_cpu_is_said_and_needs_no_bitsandbytes():
    assert machine_of(made(), torch.device("cpu"), torch.float32) == CPU


# Runs: the real thing, on the CPU.


@pytest.fixture
def automatic(settings):
    """A training of which everything that can be is left to be chosen."""
    return {name: value for name, value in settings.items() if name not in NAMES} | {"auto": True}


def ran(run):
    return yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8"))


def test_what_was_chosen_trains_and_is_what_is_saved(automatic, capsys):
    train(**automatic, max_train_steps=2)
    said, kept = capsys.readouterr().out, ran(automatic["output_dir"])
    assert "auto: learning_rate 5e-06: that of diffusers for a subject" in said
    assert "CPU, fp32: nothing is traded for memory" in said and "max_train_steps 2" not in said
    assert kept["auto"] is False and AUTO not in [kept[name] for name in NAMES]
    assert (kept["learning_rate"], kept["max_train_steps"]) == (5e-6, 2)


def test_the_embedded_model_is_trained_as_suits_it(tmp_path, capsys):
    run = tmp_path / "run"
    data = embedded.data_templates() / embedded.SAMPLE
    subject = {"instance_data_dir": data, "instance_prompt": "photo of zwx dog", "output_dir": run, "device": "cpu"}
    changes = {**TINY, "train_text_encoder": True, "max_train_steps": 2, "auto_test_model": False, "guidance_scale": 3}
    train(**changes, **subject, auto=True)
    kept = ran(run)
    assert {name: kept[name] for name in embedded.TRAINING} == {**embedded.TRAINING, "max_train_steps": 2}
    assert "learning_rate 0.0002: what suits tiny-sd, by measurement at 32 px" in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_what_it_ran_with(automatic, monkeypatch, capsys):
    run = automatic["output_dir"]
    train(**automatic, learning_rate=1e-4, max_train_steps=2, save_model_every_n_steps=1)
    first = ran(run)
    capsys.readouterr()
    # The next session finds a GPU on which other settings would be chosen.
    monkeypatch.setattr("dbkit.auto.machine_of", lambda config, device, dtype: Machine("tight", 0.1, "fp32", True))
    train(**automatic, max_train_steps=3)
    said = capsys.readouterr().out
    assert "goes on with" in said and "learning_rate 0.0001" in said and "continuing after step 2" in said
    assert {**first, "max_train_steps": 3, "gradient_checkpointing": True} == ran(run)
    # Begun again, it is chosen anew.
    train(**automatic, max_train_steps=1, start_over=True, use_8bit_adam=False)
    assert ran(run)["learning_rate"] == 5e-6


def test_a_run_without_a_state_is_chosen_anew(automatic, monkeypatch):
    run = automatic["output_dir"]
    run.mkdir()
    TrainConfig(**{**automatic, "auto": False, "learning_rate": 0.5}).save(run / "settings.yaml")
    train(**automatic, max_train_steps=1)
    assert ran(run)["learning_rate"] == 5e-6


def test_with_everything_given_it_says_so(config, capsys):
    train(config, auto=True)
    assert "auto has nothing to choose: all that it chooses is given\n" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_said_before_anything_is_chosen(automatic, tmp_path, capsys):
    with pytest.raises(DbkitError, match=r"nowhere is not a folder; check the path"):
        train(**{**automatic, "instance_data_dir": tmp_path / "nowhere"})
    assert capsys.readouterr().out == ""


def test_captioned_images_are_counted_in_their_folder(automatic, photos, capsys):
    draw_photo(photos / "more.png")
    (photos / "more.txt").write_text("another thing", encoding="utf-8")
    changes = {**automatic, "instance_prompt": None, "use_txt_as_label": True, "learning_rate": 1e-4}
    train(**changes, max_train_steps=1)
    assert "gradient_accumulation_steps 4" in capsys.readouterr().out
