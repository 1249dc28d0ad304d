"""plan(): what a training needs, said before anything is loaded, and changes that really make it fit."""

import itertools
import json
import re
import sys

import pytest
import torch

import dbkit
from dbkit import DbkitError, TrainConfig
from dbkit.cli import main
from dbkit.concepts import concepts_of
from dbkit.encoding import FILE
from dbkit.examples import unread_examples
from dbkit.files import size
from dbkit.memory import (
    AVERAGES,
    GRADIENTS,
    OF_PROCESS,
    PROCESS_BYTES,
    STATE,
    TRAINED,
    Place,
    device_peaks,
    held,
    read_configs,
    step_peak,
)
from dbkit.models import load_models
from dbkit.plan import (
    _amounts,
    _changed,
    _kept_latents,
    _possible,
    cheapest_changes,
    in_short,
    out_of_memory_is_told,
    plan,
)
from dbkit.planning import preview_prompts
from dbkit.settings import replace
from dbkit.state import make_state
from dbkit.tensor_files import open_tensors

CPU = torch.device("cpu")
PLACE = Place("cpu", torch.float32)
# So large that memory is that of the pictures.
LARGE = {"resolution": 256, "train_batch_size": 8}


def need(config):
    return max(peak.total for peak in device_peaks(config, read_configs(config), PLACE))


def test_the_table_has_memory_disk_and_steps(settings):
    made = plan(**settings)
    said = str(made)
    assert said.startswith("U-Net, adamw, 1 picture of 64 x 64 in each pass, float32\n")
    assert made.fits and "it fits" in said and not made.changes
    for part in ("trained weights", "optimizer state", OF_PROCESS, "disk", "memory in encoding the images"):
        assert part in said
    assert "2; how long a step takes is known after the first steps" in said
    assert made.peak.total == max(peak.total for peak in made.peaks)
    assert "<td" in made._repr_html_() and "optimizer state" in made._repr_html_()


def test_nothing_is_loaded_or_written(settings, copied, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for path in copied.rglob("*.safetensors"):
        path.write_bytes(b"")
    made = plan(**{**settings, "pretrained_model_name_or_path": str(copied)})
    assert sorted(tmp_path.rglob("*")) == before
    assert made.peaks == plan(**settings).peaks


def test_the_disk_is_that_of_what_a_run_keeps(settings, tmp_path):
    made = plan(**{**settings, "local_dir": tmp_path / "fast", "max_train_steps": None})
    (here, needed, free), (home, at_home, _) = made.disk
    assert (here, home) == (tmp_path / "fast" / "run", settings["output_dir"]) and free > 0
    dbkit.train(**settings)
    state = sum(p.stat().st_size for p in next((home / "resume").glob("step_*")).rglob("*") if p.is_file())
    model = sum(p.stat().st_size for p in (home / "model").rglob("*.safetensors"))
    assert at_home == pytest.approx(2 * state + 5 * model, rel=0.05)
    assert needed == pytest.approx(3 * state + 5 * model, rel=0.05)


def test_the_latents_that_are_kept_take_what_is_reckoned(settings, prior, inpainting_model, tmp_path):
    inpainting = {"pretrained_model_name_or_path": str(inpainting_model), "inpainting_masks": 3}
    without = plan(**settings).disk[0][1]
    for number, changes in enumerate(({**prior, "hflip": True}, {"augment_crop": 0.1}, inpainting)):
        config = TrainConfig(**{**settings, **changes, "output_dir": tmp_path / f"run{number}", "max_train_steps": 1})
        dbkit.train(config)
        stored, _ = open_tensors(config.output_dir / FILE)
        reckoned = _kept_latents(config, read_configs(config), 3)
        assert reckoned == sum(tensor.nbytes for tensor in stored.values()) > 3 * 2 * 4 * 8 * 8 * 4
    more = plan(**{**settings, "hflip": True}).disk[0][1] - without
    assert more == 3 * 2 * 4 * 8 * 8 * 4


def test_the_time_is_that_of_the_runs_own_log(settings):
    run = settings["output_dir"]
    run.mkdir()
    lines = [{"step": step, "loss": 0.5, "seconds_per_step": 6.0} for step in (10, 20)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = plan(**{**settings, "max_train_steps": 120})
    # Nothing is saved, so it would begin at 0.
    assert made.seconds == 720 and "120; about 12 min to the end" in str(made)
    assert plan(**{**settings, "max_train_steps": 120, "start_over": True}).seconds is None


def test_of_a_finished_run_there_is_no_time_but_that_it_is_finished(config):
    dbkit.train(config)
    assert "2; all are done; to train further, raise max_train_steps" in str(plan(config))
    # Moved aside, it is to be taken from the beginning.
    assert "2; how long a step takes is known after the first steps" in str(plan(config, start_over=True))


def test_a_size_that_is_not_the_models_is_said(settings, capsys):
    plan(**{**settings, "resolution": 96})
    assert "resolution" not in capsys.readouterr().out
    plan(**{**settings, "resolution": 128})
    assert (
        "resolution is 128, but this model draws pictures of 64 px, and others badly; set " in capsys.readouterr().out
    )


def test_as_many_previews_are_reckoned_with_as_a_training_makes(settings, prior):
    for changes in ({}, prior, {"instance_prompt": None, "use_txt_as_label": True}):
        config = TrainConfig(**{**settings, **changes})
        concepts = concepts_of(config)
        shown = preview_prompts(config, unread_examples(config, concepts), concepts)
        assert _amounts(config, read_configs(config), 3)[1] == len(shown)


def test_what_does_not_fit_is_said_with_what_would(settings):
    large = {**settings, "resolution": 1024, "train_batch_size": 1024}
    made = plan(**large)
    assert made.fits is False and "it does not fit" in str(made) and "  it fits with " in str(made)
    assert made.changes[0].settings["train_batch_size"] == 1 and "train_batch_size 1, " in str(made)
    for change in made.changes:
        fitting = plan(**{**large, **change.settings})
        assert fitting.fits and fitting.peak.total == change.needs
        assert change.saves == made.peak.total - change.needs


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_changes_fit_when_they_are_estimated_again_and_none_is_superfluous(settings, share):
    config = TrainConfig(**{**settings, **LARGE, "train_text_encoder": True})
    before = need(config)
    limit = PROCESS_BYTES + share * (before - PROCESS_BYTES)
    changes = cheapest_changes(config, read_configs(config), PLACE, 3, CPU, limit)
    assert len(changes) == 2
    for change in changes:
        assert need(replace(config, **change.settings)) == pytest.approx(change.needs, rel=0.001)
        assert change.needs <= limit
        for name in set(change.settings) - {"gradient_accumulation_steps"}:
            fewer = {key: value for key, value in change.settings.items() if key != name}
            if name == "train_batch_size":
                fewer.pop("gradient_accumulation_steps")
            assert need(replace(config, **fewer)) > limit


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_the_changes_are_those_that_a_search_without_shortcuts_finds(settings, share):
    config = TrainConfig(**{**settings, **LARGE, "adapter": "lora", "lora_rank": 2, "auto_test_model": True})
    configs = read_configs(config)

    def whole(some):
        changed = _changed(config, some)
        return max(peak.total for peak in device_peaks(changed, configs, PLACE, *_amounts(changed, configs, 3)))

    limit = PROCESS_BYTES + share * (whole(()) - PROCESS_BYTES)
    possible = _possible(config, configs, CPU)
    sets = [some for n in range(1, len(possible) + 1) for some in itertools.combinations(possible, n)]
    fitting = []
    for some in sorted(sets, key=lambda some: sum(change[0] for change in some)):
        if whole(some) <= limit and not any(all(change in some for change in other) for other in fitting):
            fitting.append(some)
    expected = [{name: value for change in some for name, value in change[1].items()} for some in fitting[:2]]
    found = cheapest_changes(config, configs, PLACE, 3, CPU, limit)
    assert expected and [change.settings for change in found] == expected
    assert [change.needs for change in found] == [whole(some) for some in fitting[:2]]
    assert {change.saves + change.needs for change in found} == {whole(())}


def test_in_short_it_fits_where_a_tenth_is_left_over():
    line = "memory of a step: about 9.0 GB, and {} GB are free on Tesla T4: {}"
    assert in_short(9_000_000_000, 10_000_000_000, "Tesla T4") == line.format("10.0", "it fits")
    fault = "it does not fit; dbkit plan says what makes it fit"
    assert in_short(9_000_000_000, 9_900_000_000, "Tesla T4") == line.format("9.9", fault)


def test_where_nothing_helps_it_says_so(settings):
    config = TrainConfig(**settings)
    assert cheapest_changes(config, read_configs(config), PLACE, 3, CPU, 1) == []


@pytest.mark.parametrize("auto", [False, True])
def test_that_a_lora_needs_peft_is_said_in_the_words_of_training(settings, monkeypatch, auto):
    monkeypatch.setitem(sys.modules, "peft", None)
    config = TrainConfig(**settings, adapter="lora", auto=auto)
    sentences = []
    for planned in (plan, dbkit.train):
        with pytest.raises(DbkitError, match=r"^LoRA needs peft, which does not work here .*; pip install") as error:
            planned(config)
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1]


def test_without_peft_no_lora_is_among_the_changes(settings, monkeypatch):
    config = TrainConfig(**{**settings, **LARGE})
    monkeypatch.setitem(sys.modules, "peft", None)
    changes = cheapest_changes(config, read_configs(config), PLACE, 3, CPU, 0.9 * need(config))
    assert changes and not any("adapter" in change.settings for change in changes)


def test_what_hangs_on_a_setting_that_is_turned_off_goes_with_it(settings):
    changes = {**LARGE, "train_text_encoder": True, "text_encoder_learning_rate": 1e-6, "use_ema": True}
    config = TrainConfig(**{**settings, **changes, "ema_decay": 0.99})
    for share in (0.9, 0.6):
        limit = PROCESS_BYTES + share * (need(config) - PROCESS_BYTES)
        assert cheapest_changes(config, read_configs(config), PLACE, 3, CPU, limit)


def test_who_ran_out_of_memory_sees_both_figures_and_is_told_the_cheapest_two(settings, capsys):
    config = TrainConfig(**{**settings, **LARGE, "optimizer": "lion", "use_ema": True})
    state = make_state(
        config, load_models(config.pretrained_model_name_or_path), CPU, torch.float32, "pytorch_optimizer"
    )
    expected = (
        r"^the GPU ran out of memory at .+; take gradient_checkpointing on \(saves .+ about a quarter slower\) or "
        r"train_batch_size 1, gradient_accumulation_steps 8 .+, and train again$"
    )
    with pytest.raises(DbkitError, match=expected), out_of_memory_is_told(config, state, CPU):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    said = capsys.readouterr().out
    weights = size(sum(p.nbytes for p in state.models.unet.parameters()))
    for kind in (TRAINED, AVERAGES):
        assert re.search(rf"{re.escape(kind)} +\S+ \S+ +{weights}\n", said)
    with pytest.raises(RuntimeError, match="something else"), out_of_memory_is_told(config, state, CPU):
        raise RuntimeError("something else")


def test_what_is_there_is_what_was_estimated(settings):
    """After a real step: weights, state and averages to the byte, but for the state's counter of steps."""
    config = TrainConfig(**{**settings, "use_ema": True})
    state = make_state(config, load_models(config.pretrained_model_name_or_path), CPU, torch.float32, "torch")
    for parameter in state.parameters:
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    estimated, there = step_peak(config, read_configs(config), PLACE).parts, held(state)
    for kind in (TRAINED, STATE, AVERAGES):
        assert there[kind] == pytest.approx(estimated[kind], rel=0.01)
    assert there[GRADIENTS] == there[TRAINED]


def test_the_command_takes_the_settings_of_a_training(settings, tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in settings.items() if not isinstance(value, bool)]
    assert main(["plan", *flags, "--no-auto_test_model", "--gradient_checkpointing"]) == 0
    assert "gradient checkpointing\n" in capsys.readouterr().out
    TrainConfig(**settings).save(tmp_path / "train.yaml")
    assert main(["plan", "--config", str(tmp_path / "train.yaml")]) == 0
    assert "it fits" in capsys.readouterr().out
    assert not settings["output_dir"].exists()


def test_settings_left_to_auto_are_chosen_first(settings, capsys):
    given = {name: value for name, value in settings.items() if name not in ("max_train_steps", "learning_rate")}
    made = plan(**given, auto=True)
    assert made.steps == 400 and "auto: " in capsys.readouterr().out


def test_mistakes_are_said(settings, tmp_path):
    with pytest.raises(DbkitError, match="is not a folder; check the path"):
        plan(**{**settings, "instance_data_dir": tmp_path / "nowhere"})
    with pytest.raises(DbkitError, match="resolution is 60; this model's pictures need a multiple of 8"):
        plan(**{**settings, "resolution": 60})
