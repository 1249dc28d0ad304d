"""Two processes compute what one does with twice the batch, resume exactly, stop together, may share the weights."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from several_processes import finish, launch, plain
from test_train import assert_equal, distance, log_of, state_of

from dbkit import DbkitError, TrainConfig, processes, train
from dbkit.checkpoint import find_fault
from dbkit.cli import main
from dbkit.models import read_weights

CPU = torch.device("cpu")
# accelerate's files, as the documents offer them.
SAMPLES = Path(__file__).parents[1] / "docs" / "accelerate"
# So large an epsilon makes the steps proportional to the gradients, and comparable.
COMMON = {"adam_epsilon": 1.0, "learning_rate": 1e-2, "log_interval": 1, "max_train_steps": 3}
CASES = {
    "prior": {"train_batch_size": 1},
    "mixed": {"train_batch_size": 1, "gradient_accumulation_steps": 2},
    "text encoder": {"train_text_encoder": True, "stop_text_encoder_training": 2, "use_ema": True, "scale_lr": True},
    "lora": {"adapter": "lora"},
}


@pytest.fixture
def cases(settings, prior, mixed) -> dict[str, dict]:
    extra = {"prior": prior, "mixed": mixed}
    return {name: {**settings, **COMMON, **extra.get(name, {}), **case} for name, case in CASES.items()}


def weights_of(run: Path) -> dict:
    return {name: value for name, value in state_of(run).items() if name.startswith(("unet/", "text_encoder/"))}


def train_in_two(jobs: list[dict], **environment: str) -> str:
    """Train each of these settings in two processes, and return what they said."""
    return finish(launch("train", json.dumps([plain(job) for job in jobs]), **environment))


def train_straight_and_again(case: dict, folder: Path, **environment: str) -> Path:
    """A run in two processes, which equals another one that was resumed after its first step."""
    straight, again = folder / "straight", folder / "again"
    resumed = [{**case, "output_dir": again, "max_train_steps": steps} for steps in (1, 3)]
    train_in_two([{**case, "output_dir": straight}, *resumed], **environment)
    assert_equal(state_of(straight), state_of(again))
    return straight


def assert_close_to_one_process(run: Path, settings: dict) -> None:
    """The run equals one process with twice the batch."""
    alone = run.with_name(f"{run.name} alone")
    train(**{**settings, "train_batch_size": 2 * settings.get("train_batch_size", 1), "output_dir": alone})
    for one, two in zip(log_of(alone), log_of(run), strict=True):
        assert one.pop("seconds_per_step") and two.pop("seconds_per_step")
        assert one == pytest.approx(two, rel=5e-3)
    one, two = weights_of(alone), weights_of(run)
    assert one.keys() == two.keys()
    model = Path(settings["pretrained_model_name_or_path"])
    base = {f"{part}/{name}": t for part in ("unet", "text_encoder") for name, t in read_weights(model, part).items()}
    moved = distance(one, {name: base.get(name, torch.zeros(())) for name in one})
    assert distance(one, two) < 1e-3 * moved


def test_two_processes_equal_one_with_twice_the_batch_and_resume_exactly(cases, tmp_path):
    jobs = [{**case, "output_dir": tmp_path / name} for name, case in cases.items()]
    again = tmp_path / "again"
    jobs += [{**cases["text encoder"], "output_dir": again, "max_train_steps": steps} for steps in (1, 3)]
    said = train_in_two(jobs)
    assert_equal(state_of(tmp_path / "text encoder"), state_of(again))
    for name, case in cases.items():
        assert_close_to_one_process(tmp_path / name, case)
        assert find_fault(tmp_path / name / "model", step=3) is None
    # Only one of them speaks.
    assert said.count("3 of 3 steps are done") == len(cases) + 1


def test_another_number_of_processes_does_not_continue_a_run(config, tmp_path):
    train_in_two([{**vars(config), "hub_token": None}])
    with pytest.raises(DbkitError, match=r"processes was 2 and is 1; .* \(torchrun --nproc_per_node 2 starts 2\)"):
        train(config, max_train_steps=3)


def test_sharded_training_equals_one_process_and_resumes_exactly(settings, tmp_path):
    case = {**settings, **COMMON, "train_text_encoder": True, "auto_test_model": True, "judge_steps": True}
    run = train_straight_and_again(case, tmp_path, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert_close_to_one_process(run, {**case, "auto_test_model": False})
    assert (run / "previews" / "step_000003.png").is_file()


def test_deepspeed_equals_one_process_and_resumes_exactly(settings, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed; it is built for a machine's torch and CUDA")
    case = {**settings, **COMMON, "train_text_encoder": True, "gradient_accumulation_steps": 2}
    zero2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
    zero2 |= {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    assert_close_to_one_process(train_straight_and_again(case, tmp_path, **zero2), case)


@pytest.mark.parametrize(
    ("changes", "environment", "sentence"),
    [
        (
            {"use_ema": True},
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            "use_ema does not go with FSDP or DeepSpeed; leave it off, or launch without them",
        ),
        (
            {"memory": "tiny"},
            {},
            "memory tiny trains in one process; choose memory small, or start dbkit without a launcher",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_said_before_a_model_is_loaded(settings, changes, environment, sentence):
    job = plain({**settings, **changes, "pretrained_model_name_or_path": "owner/name"})
    started = launch("train", json.dumps([job]), **environment)
    said, _ = started.communicate()
    assert started.returncode != 0
    assert sentence in said


def test_a_launcher_that_is_told_to_stop_leaves_a_whole_state(settings):
    run = settings["output_dir"]
    started = launch("train", json.dumps([plain({**settings, "max_train_steps": 10_000, "log_interval": 1})]))
    # The file is there before the first step; a line in it comes with that.
    while started.poll() is None and not ((run / "log.jsonl").exists() and log_of(run)):
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate()
    assert (run / "resume").is_dir(), said
    (state,) = (run / "resume").iterdir()
    step = int(state.name.removeprefix("step_"))
    assert find_fault(state, step=step) is None, said
    assert log_of(run)[-1]["step"] == step < 10_000


def test_an_error_of_the_main_process_ends_all(settings):
    started = launch("train", json.dumps([plain({**settings, "instance_data_dir": "nowhere"})]))
    said, _ = started.communicate()
    assert started.returncode != 0
    assert said.count("DbkitError: instance_data_dir nowhere is not a folder") == 1


def flags_of(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def test_the_command_says_its_result_and_its_mistakes_once(settings):
    said = finish(launch("command", "train", *flags_of(settings)))
    assert said.splitlines().count(str(settings["output_dir"] / "model")) == 1
    for mistakes in (["--seed", "one"], ["--max_train_steps", "1", "--seed", "1"]):
        started = launch("command", "train", *flags_of(settings), *mistakes)
        said, _ = started.communicate()
        assert started.returncode != 0
        assert said.count("dbkit: ") == 1, said


def test_a_mistake_that_only_another_process_makes_is_said_too(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert main(["train"]) == 2 and waited
    assert capsys.readouterr().err == "dbkit: pretrained_model_name_or_path is missing; give it a value\n"


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("two_gpus", {}),
        ("two_machines", {}),
        ("fsdp", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}),
        ("deepspeed", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    ],
)
def test_accelerate_makes_of_the_sample_files_what_dbkit_reads(name, environment):
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(SAMPLES / f"{name}.yaml"))
    assert settings.mixed_precision == "no"
    fsdp, deepspeed = (getattr(settings, f"{kind}_config", None) or {} for kind in ("fsdp", "deepspeed"))
    found = {f"ACCELERATE_USE_{settings.distributed_type.value}": "true"} if fsdp or deepspeed else {}
    found |= {key.upper(): str(value).lower() for key, value in fsdp.items()}
    found |= {f"ACCELERATE_DEEPSPEED_{key.upper()}": str(value) for key, value in deepspeed.items()}
    assert environment.items() <= found.items()


def test_accelerate_launch_trains_by_the_sample_files(settings, tmp_path):
    logs = []
    for name in ("two_gpus", "fsdp"):
        run = tmp_path / name
        flags = flags_of({**settings, "output_dir": run, "log_interval": 1})
        finish(launch("command", "train", *flags, config_file=SAMPLES / f"{name}.yaml"))
        assert find_fault(run / "model", step=2) is None
        manifest = json.loads((run / "model" / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["facts"]["settings"]["processes"] == 2
        logs.append([line["loss"] for line in log_of(run)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-3) and len(logs[0]) == 2


def test_a_flag_without_a_launcher_is_said_and_leaves_nothing_behind(settings):
    with pytest.raises(DbkitError, match="process 0 of several, and RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        train(TrainConfig(**settings, local_rank=0))
    assert "LOCAL_RANK" not in os.environ
    train(**settings)


def test_in_one_process_nothing_is_exchanged():
    tensor = torch.ones(3)
    assert (processes.world(), processes.rank()) == (1, 0)
    assert processes.start(CPU) == CPU
    assert processes.on_main(max, 2, 3) == 3
    assert processes.any_of(True) and not processes.any_of(False)
    assert torch.equal(processes.mean(tensor), tensor)
    assert processes.whole({"a": {"b": tensor}, "c": 1})["a"]["b"] is tensor
