"""Devices and arithmetic are chosen by what is there; the libraries are quiet only while dbkit speaks for them."""

import pytest
import torch

from dbkit import DbkitError
from dbkit.config import TrainConfig
from dbkit.libraries import choose_device, choose_dtype, hub_options, loading, quiet
from dbkit.memory import read_configs
from dbkit.models import load_models
from dbkit.tokenizer import model_tokenizer

CPU = torch.device("cpu")


def test_auto_is_the_best_device_there_is():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == expected
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("name", "there", "hint"),
    [
        ("cuda", torch.cuda.is_available(), "on Colab choose Runtime, Change runtime type, GPU"),
        ("mps", torch.backends.mps.is_available(), "choose auto or cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, there, hint):
    if there:
        pytest.skip(f"this machine has {name}")
    with pytest.raises(DbkitError, match=f"device is {name}, and this machine has none; {hint}"):
        choose_device(name)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("no", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_cpu_computes_in_fp32_unless_asked(precision, dtype):
    assert choose_dtype(precision, CPU) == dtype


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(DbkitError, match="mixed_precision is fp16, which needs a GPU; choose auto, no or bf16"):
        choose_dtype("fp16", CPU)


def test_libraries_speak_as_before_once_a_model_is_loaded(model):
    import diffusers.utils.logging
    import transformers.utils.logging

    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    with quiet():
        assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs] == [(40, False)] * 2
        load_models(model)
    assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs] == before


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch):
    def unreachable(*_):
        raise OSError("name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(DbkitError, match="owner/name is not on this machine and Hugging Face cannot be reached"):
        hub_options("owner/name")


def test_a_model_that_is_not_here_is_named_where_the_hub_may_not_be_asked(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for load in (
        load_models,
        model_tokenizer,
        lambda name: read_configs(TrainConfig(name, "photos", instance_prompt="zwx")),
    ):
        with pytest.raises(DbkitError) as refused:
            load("owner/name")
        assert str(refused.value) == (
            "the model owner/name is not on this machine and Hugging Face cannot be reached (HF_HUB_OFFLINE is set); "
            "unset that, or give the folder of a model"
        )


def test_a_library_that_a_model_needs_and_that_is_missing_is_said():
    sentence = r"the model some/one .* not here \(it requires Torchvision\); install it"
    with pytest.raises(DbkitError, match=sentence), loading("some/one"):
        raise ImportError("\nit requires\nTorchvision")
