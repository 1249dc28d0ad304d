"""Training teaches: on the embedded model a subject that it has never seen is learnt, prior preservation keeps the
class what it was, and a style is taken on. With a broken loss none of this holds.

The runs and their measurement are those of benchmarks/learning.py; the margins are well inside what its table,
benchmarks/learning.md, has at worst over five seeds.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from dbkit import DbkitError, train
from dbkit.cache import draw_batches
from dbkit.losses import prior_preservation_loss

# The package's attribute `train` is the function; the module has its name.
MODULE = sys.modules[train.__module__]
# What a check or train() says of a training that did not teach.
NOT_LEARNT = r"^assert |the loss is |are not numbers|changed no weight|is no number"

spec = importlib.util.spec_from_file_location("learning", Path(__file__).parents[1] / "benchmarks" / "learning.py")
learning = importlib.util.module_from_spec(spec)
spec.loader.exec_module(learning)


def check_subject(made, margin=0.25):
    """Likeness rose, and the settings that prompts name are still there, though the subject was never seen in them."""
    assert made.model.subject_fidelity > made.base.subject_fidelity + margin
    assert made.model.prompt_match > 0.6


def check_style(made):
    """Less than for a subject: the prints show many things and are themselves not much alike (0.33 and 0.42)."""
    assert made.model.subject_fidelity > made.base.subject_fidelity + 0.02
    assert made.model.subject_fidelity_clip > made.base.subject_fidelity_clip + 0.07


def test_a_subject_is_learnt_and_prior_preservation_limits_the_drift_of_its_class(tmp_path):
    kept = learning.learn_subject("poodle", 0, True, tmp_path, num_per_prompt=2)
    check_subject(kept)
    adrift = learning.learn_subject("poodle", 0, False, tmp_path, num_per_prompt=2)
    check_subject(adrift, 0.15)
    # Over five seeds the likeness with prior preservation is the higher one in the mean, and 0.2 lower at worst.
    assert kept.model.subject_fidelity > adrift.model.subject_fidelity - 0.35
    assert kept.model.class_leak < adrift.model.class_leak - 0.2


def test_a_lora_learns_a_subject_too(tmp_path):
    check_subject(learning.learn_subject("poodle", 0, True, tmp_path, num_per_prompt=2, **learning.LORA))


def test_native_training_takes_on_a_style(tmp_path):
    check_style(learning.learn_style(0, tmp_path, num_per_prompt=2))


def flipped(*arguments):
    loss, *parts = prior_preservation_loss(*arguments)
    return -loss, *parts


def shuffled(*arguments):
    """The batches with the prompts of instance and class images exchanged."""
    return [
        dataclasses.replace(batch, prompts=batch.prompts.roll(batch.instances, 0)) for batch in draw_batches(*arguments)
    ]


def test_prompts_of_the_other_images_do_not_pass_for_learning(monkeypatch, tmp_path):
    monkeypatch.setattr(MODULE, "draw_batches", shuffled)
    with pytest.raises((AssertionError, DbkitError), match=NOT_LEARNT):
        check_subject(learning.learn_subject("poodle", 0, True, tmp_path, num_per_prompt=2))


def test_a_flipped_loss_takes_on_no_style(monkeypatch, tmp_path):
    monkeypatch.setattr(MODULE, "prior_preservation_loss", flipped)
    with pytest.raises((AssertionError, DbkitError), match=NOT_LEARNT):
        check_style(learning.learn_style(0, tmp_path, num_per_prompt=2))
