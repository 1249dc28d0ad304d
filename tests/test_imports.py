"""Imports run one way, and importing dbkit loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dbkit

PACKAGE = Path(dbkit.__file__).parent

# A module imports only from those before it.
LISTED = """
    errors files embedded settings train_config config workspace draws images captions buckets order augment
    concepts libraries processes zero tokenizer text identifier faces measures doctor sources report dataset edits
    captioners captioning examples tensor_files models sampling class_images encoding cache losses checkpoint copies
    mirror trackers log run_folder best_step charts status watch resume saves rounding in_backward optimizers
    receipts keys families lora_files lora ema attention state keeper counting memory auto machine preview evaluate
    hub planning plan judge train layouts original_config downloads stored_models proof convert extract demo
    saved_models suggestions train_summary forms editor cli
"""
ORDER = LISTED.split()

HEAVY = (
    "torch diffusers transformers accelerate safetensors huggingface_hub numpy PIL yaml tqdm ipywidgets IPython "
    "bitsandbytes torchao pytorch_optimizer tokenizers imagehash scipy cv2 onnxruntime rapidocr pillow_heif peft"
)


def modules():
    return sorted(path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))


def imported(tree):
    """The modules of dbkit that a tree imports, at any depth, but not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "dbkit")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "dbkit"):
            module = node.module or "" if node.level else node.module.partition(".")[2]
            # `from dbkit import draws` names a module, `from dbkit import train` the package's function.
            yield from [module] if module else [alias.name for alias in node.names]
        yield from imported(node)


def test_every_module_has_a_place_in_the_order():
    assert len(ORDER) == len(set(ORDER))
    assert {path.stem for path in modules()} <= set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_imports_only_from_those_before_it(path):
    before = ORDER[: ORDER.index(path.stem)]
    # The command line alone may import the package itself, for its version.
    allowed = {*before, ""} if path.stem == "cli" else set(before)
    assert set(imported(ast.parse(path.read_text(encoding="utf-8")))) <= allowed


def test_imports_are_found_wherever_they_are():
    code = """
if TYPE_CHECKING:
    from dbkit.a import x
if typing.TYPE_CHECKING:
    from dbkit.b import x
from dbkit.c import x
from dbkit import d, e
import dbkit.f
from . import g
from .h import x
import dbkit
import dbkitten, torch
def function():
    with here:
        from dbkit.i import x
"""
    assert sorted(imported(ast.parse(code))) == ["", "c", "d", "e", "f", "g", "h", "i"]


def heavy_after(code):
    """The heavy modules that a fresh interpreter has loaded after the code."""
    report = f"import sys; print([name for name in {HEAVY!r}.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_importing_dbkit_loads_nothing_heavy():
    assert heavy_after("import dbkit") == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["train", "--sed", "1"]])
def test_what_the_command_line_only_says_loads_nothing_heavy(arguments):
    code = f"from dbkit.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass"
    assert heavy_after(code) == "[]"


def test_the_status_of_a_run_loads_what_reads_its_settings_and_nothing_heavy(tmp_path):
    (tmp_path / "settings.yaml").write_text("max_train_steps: 8\n")
    assert heavy_after(f"from dbkit.cli import main\nassert main(['status', {str(tmp_path)!r}]) == 0") == "['yaml']"


def test_a_heavy_module_would_be_noticed():
    assert heavy_after("import dbkit, yaml") == "['yaml']"
