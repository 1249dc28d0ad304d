"""Of a real training of the embedded model a step is recommended and judged beside its last one."""

import importlib.util
import sys
from pathlib import Path

from dbkit.best_step import SHARE

spec = importlib.util.spec_from_file_location(
    "recommended", Path(__file__).parents[1] / "benchmarks" / "recommended.py"
)
recommended = importlib.util.module_from_spec(spec)
sys.modules["recommended"] = recommended  # a dataclass looks its module up
spec.loader.exec_module(recommended)


def test_a_step_of_a_real_run_is_recommended_and_keeps_most_of_what_was_gained(tmp_path):
    found = recommended.one_run(0, tmp_path, steps=120, every=40, num_per_prompt=1, num_class_images=4)
    assert found.found.step in (40, 80, 120)
    assert found.kept > SHARE / 2
    assert "| 0 | last |" in recommended.table({0: found})
