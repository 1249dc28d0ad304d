"""A run goes on only from a state that is its own."""

import json
import shutil

import pytest

from dbkit import DbkitError, train
from dbkit.checkpoint import manifest_text
from dbkit.resume import identity_of, newest_state
from dbkit.settings import replace


def test_a_new_run_has_no_state(tmp_path):
    assert newest_state(tmp_path / "run") is None


def test_a_finished_model_without_its_state_is_not_replaced(config):
    model = train(config)
    shutil.rmtree(config.output_dir / "resume")
    before = (model / "manifest.json").read_bytes()
    with pytest.raises(DbkitError, match="holds a finished model and no state to go on from"):
        train(config, max_train_steps=3)
    assert (model / "manifest.json").read_bytes() == before


def test_a_run_goes_on_beside_another_that_asked_for_more_of_the_same_class_images(settings, tmp_path):
    prior = {**settings, "with_prior_preservation": True, "class_prompt": "photo of a thing", "num_class_images": 1}
    train(**prior)
    train(**{**prior, "num_class_images": 2, "output_dir": tmp_path / "other"})
    assert train(**{**prior, "max_train_steps": 3}) == settings["output_dir"] / "model"


def test_a_setting_that_is_newer_than_the_state_is_as_if_it_had_its_default(config):
    train(config)
    (path,) = config.output_dir.glob("resume/*/manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["facts"]["settings"]["use_ema"]
    path.write_text(manifest_text(manifest["step"], manifest["facts"], manifest["files"]), encoding="utf-8")
    with pytest.raises(DbkitError, match="do not continue: use_ema was False and is True"):
        train(config, max_train_steps=3, use_ema=True)
    train(config, max_train_steps=3)


def test_a_folder_of_pictures_is_not_taken_for_a_run(settings, photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "own")
    with pytest.raises(DbkitError, match="is a folder of pictures and no run; choose another output_dir"):
        train(**{**settings, "output_dir": own})


def test_both_names_of_8bit_adam_are_one_identity_and_its_libraries_are_two(config):
    old, new = replace(config, use_8bit_adam=True), replace(config, optimizer="adamw8bit")
    assert identity_of(old, "torchao", []) == identity_of(new, "torchao", [])
    assert identity_of(new, "torchao", []) != identity_of(new, "bitsandbytes", [])
    assert identity_of(new, "torchao", []) != identity_of(config, "torchao", [])


def test_starting_over_leaves_a_folder_that_is_no_run_where_it_is(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.doc").touch()
    train(**settings, start_over=True)
    assert (tmp_path / "run" / "thesis.doc").exists()


def test_starting_over_is_not_kept_in_the_settings(settings):
    train(**settings, start_over=True)
    assert "start_over: false" in (settings["output_dir"] / "settings.yaml").read_text(encoding="utf-8")
