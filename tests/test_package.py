"""What installing dbkit brings: lower bounds only, and the sample pictures."""

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dbkit

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("dbkit-*.whl"))


def test_the_wheel_carries_the_embedded_model_the_sample_pictures_and_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "dbkit/py.typed" in names  # or type checkers see no types of a package that is installed
    for path in [*(ROOT / "dbkit").glob("*.py")]:
        assert f"dbkit/{path.name}" in names
    for path in (ROOT / "dbkit" / "assets").rglob("*.*"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "data_templates").rglob("*.*"):
        assert f"dbkit/data_templates/{path.relative_to(ROOT / 'data_templates').as_posix()}" in names


@pytest.fixture(scope="module")
def requirements(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        return re.findall(r"^Requires-Dist: (.*)$", archive.read(name).decode(), re.MULTILINE)


def test_requirements_are_lower_bounds_so_that_nothing_installed_is_replaced(requirements):
    assert len(requirements) > 5
    assert all(re.fullmatch(r"[\w.-]+>=[\d.]+( ?; extra == .*)?", requirement) for requirement in requirements)
    assert not any("xformers" in requirement for requirement in requirements)


def test_on_colab_an_install_brings_imagehash_and_replaces_nothing(requirements):
    listed = (ROOT / "tests" / "colab_packages.txt").read_text(encoding="utf-8").splitlines()
    there = dict(line.split("==") for line in listed if not line.startswith("#"))
    there = {canonicalize_name(name): version for name, version in there.items()}
    # Whatever extra is asked for; a package that comes along must be content with what is there as well.
    wanted = [Requirement(text) for text in requirements if "extra == 'test'" not in text.replace('"', "'")]
    wanted += [Requirement(text) for text in metadata.requires("ImageHash")]
    assert {one.name for one in wanted if not one.marker and canonicalize_name(one.name) not in there} == {"ImageHash"}
    found = [(one, there[name]) for one in wanted if (name := canonicalize_name(one.name)) in there]
    assert len(found) > 12 and [one for one, version in found if version not in one.specifier] == []


def test_one_version_everywhere():
    assert metadata.version("dbkit") == dbkit.__version__
    for name in ("setup.py", "README.md", "CHANGELOG.md"):
        assert dbkit.__version__ in (ROOT / name).read_text(encoding="utf-8")


def test_the_notice_and_the_licence_are_there():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "data_templates" in (ROOT / "NOTICE").read_text(encoding="utf-8")
