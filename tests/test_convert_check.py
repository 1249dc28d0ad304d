"""The check of conversions, on narrow models: it passes on what dbkit writes, and fails on what differs."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbkit import convert, keys
from dbkit.models import WEIGHTS

spec = importlib.util.spec_from_file_location("convert_check", Path(__file__).parents[1] / "benchmarks" / "convert.py")
check = importlib.util.module_from_spec(spec)
# Where dataclasses look for the module of a class.
sys.modules[spec.name] = check
spec.loader.exec_module(check)


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", "--width", "small", *map(str, arguments)])
    check.main()


def faults(result) -> list[str]:
    return [name for name, (passed, _) in result.checks.items() if passed is False]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The check's own narrow model, of Stable Diffusion 2 that predicts v. Do not change it."""
    folder = tmp_path_factory.mktemp("models") / "narrow"
    check.make_model(folder, "sd2-v", "small", torch.float16)
    return folder


@pytest.fixture(scope="module")
def file(source, tmp_path_factory) -> Path:
    """It as an original file. Do not change it."""
    return convert(source, tmp_path_factory.mktemp("files") / "narrow.safetensors")


def passed(figures: Path) -> dict[str, dict[str, bool]]:
    """Which checks of each model passed. The lists of names, which are not beside every checkout, count as passed."""
    return {
        model["model"]: {
            name: found["passed"] or (found["passed"] is None and name.startswith("names"))
            for name, found in model["checks"].items()
        }
        for model in json.loads(figures.read_text())["models"]
    }


def test_a_narrow_model_of_stable_diffusion_2_passes(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--family", "sd2-v", "--folder", tmp_path, "--json", tmp_path / "figures.json")
    checks = passed(tmp_path / "figures.json")
    assert list(checks) == ["sd2-v fp16"]
    assert all(len(found) == 8 and all(found.values()) for found in checks.values()), checks
    assert "| text encoding, U-Net, VAE by diffusers' from_single_file |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("dbkit-")] == []


def test_stable_diffusion_1_passes_and_a_check_that_fails_is_the_exit_status(monkeypatch, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nfrom safetensors.torch import save_file\n"
        f"save_file({{'{keys.PREFIXES['unet']}out.2.bias': torch.zeros(4).half()}}, sys.argv[4])\n"
    )
    with pytest.raises(SystemExit, match="a check failed"):
        run(monkeypatch, "--family", "sd1", "--json", tmp_path / "figures.json", "--diffusers-script", script)
    (checks,) = passed(tmp_path / "figures.json").values()
    assert len(checks) == 8 and [name for name, good in checks.items() if not good] == [
        "the tensors of diffusers' script"
    ]
    assert "| the tensors of diffusers' script | **FAILED**: model.diffusion_model.out.2.bias differs |" in (
        capsys.readouterr().out
    )


def test_a_value_or_setting_that_comes_back_different_is_found(source, tmp_path):
    back = shutil.copytree(source, tmp_path / "back")
    result = check.Result("same")
    check.check_folder(result, source, back, ".safetensors")
    assert not faults(result)
    path = back / "vae" / WEIGHTS["vae"]
    tensors = load_file(path)
    # As numbers the two zeros are the same.
    tensors["quant_conv.bias"][0] = 0.0
    save_file(tensors, source_with_zero := tmp_path / "zero.safetensors")
    tensors["quant_conv.bias"][0] = -0.0
    save_file(tensors, path)
    assert check.differences(check.tensors_of(source_with_zero), check.tensors_of(path)) == ["quant_conv.bias differs"]
    settings = back / "unet" / "config.json"
    settings.write_text(settings.read_text().replace("96", "64"))
    result = check.Result("different")
    check.check_folder(result, source, back, ".safetensors")
    assert len(faults(result)) == 2


def test_names_that_lack_or_are_unknown_are_found(file, tmp_path):
    if not check.LISTS.is_dir():
        pytest.skip("the lists of names are not beside the checkout")
    tensors = load_file(file)
    tensors["model.diffusion_model.stranger"] = tensors.pop("model.diffusion_model.out.2.bias")
    save_file(tensors, tmp_path / "changed.safetensors")
    result = check.Result("changed")
    check.check_names(result, tmp_path / "changed.safetensors", "sd2-v", "small", torch.float16)
    ((passed, words),) = result.checks.values()
    assert passed is False
    assert words == "lacks model.diffusion_model.out.2.bias; has model.diffusion_model.stranger"


def test_tensors_that_change_places_are_found_by_what_diffusers_computes(source, file, tmp_path):
    tensors = load_file(file)
    for one, other in (
        [f"{keys.PREFIXES['unet']}middle_block.{n}.in_layers.0.bias" for n in (0, 2)],
        [f"{keys.PREFIXES['vae']}decoder.mid.attn_1.{name}.bias" for name in "qv"],
        [f"{keys.OPEN_CLIP}transformer.resblocks.{n}.ln_1.weight" for n in (3, 4)],
    ):
        tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, tmp_path / "changed.safetensors")
    result = check.Result("changed")
    check.check_diffusers(result, source, tmp_path / "changed.safetensors", "sd2-v", torch.float16)
    passed, words = result.checks["text encoding, U-Net, VAE by diffusers' from_single_file"]
    assert passed is False and words.count(" differs") == 6
    assert all(f"{part} computes something else" in words for part in WEIGHTS)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
def test_memory_and_time_are_those_of_another_process(source, tmp_path):
    found = check.measured(check.by_dbkit, str(source), str(tmp_path / "made.safetensors"), None)
    assert (tmp_path / "made.safetensors").is_file()
    assert found["peak"] > found["own"] > 1e8 and found["seconds"] > 0 and found["cpu"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
def test_a_conversion_that_fails_ends_the_check(tmp_path):
    with pytest.raises(RuntimeError, match=r"by_dbkit failed: (.|\n)*there is no file or folder"):
        check.measured(check.by_dbkit, str(tmp_path / "none"), str(tmp_path / "made"), None)


def test_more_memory_than_the_bound_is_found():
    result = check.Result("large", bytes_of_parts={"unet": 2 * 10**9, "vae": 10**8})
    result.runs["folder → .safetensors", "dbkit"] = [{"peak": 3.3e9}]
    check.check_memory(result)
    assert not faults(result)
    result.runs[".ckpt → folder", "dbkit"] = [{"peak": 3.5e9}]
    # Theirs is not bounded.
    result.runs[".safetensors → folder", "diffusers"] = [{"peak": 9e9}]
    check.check_memory(result)
    assert result.checks["peak memory of dbkit's conversions"] == (False, "3.50 GB, and the bound is 3.40 GB")
