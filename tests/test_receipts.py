"""A file tells what user interfaces and its maker want to know, and nothing of the machine it was made on."""

import base64
import io
import json

import numpy as np
from PIL import Image
from safetensors import safe_open

from dbkit import convert, train
from dbkit.receipts import RECEIPT, architecture, run_receipt


def metadata_of(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def test_a_trained_model_carries_the_receipt_of_its_run(settings, tmp_path):
    model = train(**settings)
    found = metadata_of(convert(model, tmp_path / "dog.safetensors"))
    receipt = json.loads(found[RECEIPT])
    assert receipt == run_receipt(model)
    assert receipt["steps"] == 2 and receipt["settings"]["instance_prompt"] == "photo of zwx thing"
    assert receipt["settings"]["optimizer"] == "adamw" and receipt["settings"]["seed"] == 0
    # Base model and data by what they hold.
    assert len(receipt["pretrained_model_name_or_path"]) == 64 and receipt["instance images or captions"]
    assert found["modelspec.title"] == "dog" and found["modelspec.trigger_phrase"] == "photo of zwx thing"
    assert found["modelspec.resolution"] == "64x64" and found["modelspec.prediction_type"] == "epsilon"
    assert found["modelspec.architecture"] == "stable-diffusion-v1" and found["modelspec.sai_model_spec"] == "1.0.0"
    assert all(isinstance(value, str) and str(tmp_path) not in value for value in found.values())
    assert settings["pretrained_model_name_or_path"] not in "".join(found.values())


def test_a_model_of_no_run_has_no_receipt(model, sd2_v_model, tmp_path):
    assert run_receipt(model) is None
    found = metadata_of(convert(sd2_v_model, tmp_path / "v.safetensors"))
    assert RECEIPT not in found and "modelspec.trigger_phrase" not in found
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert found["modelspec.prediction_type"] == "v" and found["modelspec.resolution"] == "64x64"


def test_architectures_have_the_names_of_the_standard():
    assert architecture(False, False) == "stable-diffusion-v1"
    assert architecture(True, False) == "stable-diffusion-v2-512"
    assert architecture(True, True) == "stable-diffusion-v2-768-v"
    assert architecture(False, False, inpaints=True) == "stable-diffusion-v1-inpainting"


def test_the_first_preview_of_its_step_is_the_thumbnail(settings, tmp_path):
    model = train(**{**settings, "auto_test_model": True, "test_num_per_prompt": 2})
    found = metadata_of(convert(model, tmp_path / "dog.safetensors", license="creativeml-openrail-m"))
    assert found["modelspec.license"] == "creativeml-openrail-m"
    kind, _, encoded = found["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), dtype=float)
    pictures = sorted((settings["output_dir"] / "previews" / "step_000002").glob("01-*.png"))
    differences = [np.abs(shown - np.asarray(Image.open(path), dtype=float)).mean() for path in pictures]
    # Noise of an untrained model does not suit JPEG.
    assert differences[0] < 30 and differences[0] * 2 < min(differences[1:])
