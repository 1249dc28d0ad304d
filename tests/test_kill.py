"""A training that is killed at random moments and started again is the one that would have been, bit for bit.

`make soak` kills 60 times, CI 8 times. What was lost and found is in the table that is printed at the end.
"""

import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from conftest import draw_photo
from killable import Killable
from test_train import assert_equal, log_of, state_of

from dbkit.checkpoint import find_fault, newest_valid, read_manifest
from dbkit.run_folder import FIGURES

KILLS = int(os.environ.get("DBKIT_KILLS", "8"))
SEED = int(os.environ.get("DBKIT_SEED", "0"))
STEPS, EVERY = 10, 3

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process is forked and killed by a signal")


@pytest.fixture
def program(tmp_path):
    program = Killable(tmp_path / "said.txt")
    yield program
    program.close()


@pytest.fixture
def case(settings, smaller_model, photos, tmp_path) -> dict:
    """Nearly every option that has a state: averages, a text encoder that rests, accumulation, variants, previews."""
    draw_photo(photos / "wide.png", (160, 80)).with_suffix(".txt").write_text("a wide thing")
    return {
        **settings,
        "pretrained_model_name_or_path": str(smaller_model),
        "resolution": 32,
        "use_aspect_ratio_bucket": True,
        "hflip": True,
        "gradient_accumulation_steps": 2,
        "train_text_encoder": True,
        "stop_text_encoder_training": 5,
        "use_ema": True,
        "max_train_steps": STEPS,
        "save_model_every_n_steps": EVERY,
        "save_every_n_minutes": 0.01,
        "checkpoints_total_limit": 2,
        "auto_test_model": True,
        "judge_steps": True,
        "log_interval": 1,
        "local_dir": tmp_path / "local",
    }


def pictures_of(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in (run / "previews").rglob("*.png")}


def states_of(*folders: Path) -> dict[int, str]:
    """What the newest valid state of each folder holds: the hash of its U-Net, by step."""
    found = (newest_valid(folder / "resume")[0] for folder in folders)
    return {state.step: read_manifest(state.folder)["files"]["unet.safetensors"]["sha256"] for state in found if state}


def test_a_killed_training_is_the_one_that_would_have_been(program, case, tmp_path, capsys):
    # The straight run saves after every step, so that each state that is found later can be looked up.
    straight = {**case, "output_dir": tmp_path / "straight", "local_dir": tmp_path / "apart"}
    expected: dict[int, str] = {}
    for step in range(1, STEPS + 1):
        assert program.train({**straight, "max_train_steps": step})["ended"] == 0, (tmp_path / "said.txt").read_text()
        expected |= states_of(straight["output_dir"])
    assert sorted(expected) == list(range(1, STEPS + 1))
    shutil.rmtree(straight["output_dir"])
    shutil.rmtree(straight["local_dir"])
    whole = program.train({**straight, "save_every_n_minutes": None})
    assert whole["ended"] == 0 and states_of(straight["output_dir"]) == {STEPS: expected[STEPS]}

    draw, kills, runs, lost = random.Random(SEED), 0, 0, []
    while kills < KILLS:
        runs += 1
        home = tmp_path / f"run{runs}"
        local = case["local_dir"] / home.name
        while True:
            by_event = {"event": draw.randrange(1, whole["events"])}
            kill = by_event if kills % 2 else {"seconds": draw.uniform(0, whole["seconds"])}
            ended = program.train({**case, "output_dir": home}, **(kill if kills < KILLS else {}))["ended"]
            said = (tmp_path / "said.txt").read_text()
            assert ended in (0, -9), said
            # Whatever is taken for whole is what an undisturbed run had after that step.
            found = states_of(local, home)
            assert found.items() <= expected.items(), (kill, said)
            if ended == 0:
                break
            kills += 1
            logged = max((line["step"] for line in log_of(local)), default=0) if (local / "log.jsonl").exists() else 0
            lost.append(logged - max(found, default=0))
        assert_equal(state_of(home), state_of(straight["output_dir"]))
        assert pictures_of(home) == pictures_of(straight["output_dir"])
        assert (home / FIGURES).read_text() == (straight["output_dir"] / FIGURES).read_text()
        assert find_fault(home / "model", STEPS) is None
        lines, right = (
            [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in log_of(folder)]
            for folder in (home, straight["output_dir"])
        )
        assert lines == right
        shutil.rmtree(home)
        shutil.rmtree(local)
    # A kill after the last step of an interval, before its save is done, loses all of it.
    assert max(lost) <= EVERY
    with capsys.disabled():
        print(f"\n{kills} kills in {runs} runs of {STEPS} steps, saved every {EVERY}: lost {sorted(lost)} steps")
