"""Every combination of prediction, weighting, prior, batch, accumulation and processes against a slow reference.

The combinations are where trainers go wrong: each feature alone is right in all of them.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import draw_photo, with_smaller_unet
from reference import Reference
from several_processes import finish, launch

from dbkit import TrainConfig, processes
from dbkit.planning import make_plan
from dbkit.settings import replace
from dbkit.state import make_state
from dbkit.train import _load, _make_pools, train_step

CPU = torch.device("cpu")
Combination = tuple[float | None, float | None, int, int]
GAMMA = 5.0
SAMPLES = (1, 2, 3, 4, 6, 12)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the noise of a sample and its target are, and so what has to be prepared anew."""

    kind: str
    zero_terminal_snr: bool
    noise_offset: float


OBJECTIVES = [
    Objective(kind, zero, offset)
    for kind, zero, offset in itertools.product(("model", "v_model"), (False, True), (0.0, 0.1))
    # A model that predicts noise learns nothing where the input is noise alone: dbkit refuses it.
    if kind == "v_model" or not zero
]
WEIGHTINGS = list(itertools.product((None, 0.3, 1.0), (None, GAMMA)))
SHAPES = list(itertools.product((1, 3), (1, 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    for colour in ("crimson", "gold", "teal"):
        draw_photo(folder / "photos" / f"{colour}.png", colour=colour)
    for colour in ("navy", "olive"):
        draw_photo(folder / "class" / f"{colour}.png", colour=colour)
    return folder


@pytest.fixture(scope="module")
def bases(model, v_model, folder) -> dict[str, Path]:
    """The models of the tests with a still smaller U-Net, for thousands of passes."""
    bases = {"model": model, "v_model": v_model}
    return {name: with_smaller_unet(base, folder / name) for name, base in bases.items()}


def make_config(folder: Path, model: Path, objective: Objective, **changes) -> TrainConfig:
    settings = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": folder / "photos",
        "instance_prompt": "photo of zwx thing",
        "with_prior_preservation": True,
        "class_prompt": "photo of a thing",
        "class_data_dir": folder / "class",
        "num_class_images": 2,
        "output_dir": folder / "run",
        "resolution": 64,
        "max_train_steps": 1,
        # Samples 0 of both roles lie where min-SNR weighs: timesteps 14 and 108.
        "seed": 86,
        "device": "cpu",
        "noise_offset": objective.noise_offset,
        "rescale_zero_terminal_snr": objective.zero_terminal_snr,
    }
    return TrainConfig(**{**settings, **changes})


class Expected:
    """Losses and gradient norms of steps of so many samples, by the reference, from each sample's loss and gradient."""

    def __init__(self, config: TrainConfig):
        reference = Reference(replace(config, min_snr_gamma=GAMMA))
        parameters = list(reference.unet.parameters())
        self.losses: dict[str, list[tuple[float, float]]] = {"instance": [], "class": []}
        # Sums over the samples so far, without and with the weights of min-SNR.
        sums = {role: torch.zeros(2, sum(p.numel() for p in parameters)) for role in self.losses}
        self.gradients = {}
        for sample in range(max(SAMPLES)):
            for role, losses in self.losses.items():
                loss, weight = reference.loss(role, sample)
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
                losses.append((loss.item(), weight))
                sums[role] += torch.tensor([[1.0], [weight]]) * gradient
            if sample + 1 in SAMPLES:
                count = sample + 1
                for prior, gamma in WEIGHTINGS:
                    row = 1 if gamma else 0
                    total = (sums["instance"][row] + (prior or 0) * sums["class"][row]) / count
                    self.gradients[count, prior, gamma] = total.norm().item()

    def __call__(self, count: int, prior: float | None, gamma: float | None) -> list[float]:
        """Loss, instance loss, class loss and gradient norm of a step of so many samples."""

        def mean(role: str) -> float:
            return sum(loss * (weight if gamma else 1) for loss, weight in self.losses[role][:count]) / count

        instance_loss, class_loss = mean("instance"), mean("class") if prior else 0.0
        return [
            instance_loss + (prior or 0) * class_loss,
            instance_loss,
            class_loss,
            self.gradients[count, prior, gamma],
        ]


def measured(config: TrainConfig, made: dict) -> list[float]:
    """The same of dbkit's own step, on state and pools that are made once for an objective."""
    key = config.with_prior_preservation
    if key not in made:
        plan = make_plan(config, config.output_dir, CPU)
        models = _load(config)
        state = make_state(config, models, CPU, torch.float32, plan.optimizer_library)
        made[key] = state, _make_pools(config, models, plan, CPU), plan.order
    state, pools, order = made[key]
    per_step = config.train_batch_size * config.gradient_accumulation_steps * processes.world()
    # At a rate of zero the weights stay as they are for the next combination.
    losses, grad_norm = train_step(state, pools, dataclasses.replace(order, per_step=per_step), config, 1, 0.0)
    return [*losses.tolist(), grad_norm.item()]


def combinations(folder: Path, model: Path, objective: Objective) -> Iterator[tuple[Combination, TrainConfig]]:
    """Every (prior_loss_weight, min_snr_gamma, train_batch_size, gradient_accumulation_steps), and its settings."""
    for (prior, gamma), (batch, passes) in itertools.product(WEIGHTINGS, SHAPES):
        without = {"with_prior_preservation": False, "class_prompt": None, "class_data_dir": None}
        yield (
            (prior, gamma, batch, passes),
            make_config(
                folder,
                model,
                objective,
                min_snr_gamma=gamma,
                train_batch_size=batch,
                gradient_accumulation_steps=passes,
                **({"prior_loss_weight": prior} if prior else without),
            ),
        )


def measure_all(folder: Path, model: Path, v_model: Path) -> None:
    """In each of several processes: measure every objective, and write down what the main process found."""
    processes.start(CPU)
    found = []
    for objective in OBJECTIVES:
        made: dict = {}
        base = {"model": model, "v_model": v_model}[objective.kind]
        found.append([measured(config, made) for _, config in combinations(folder, base, objective)])
    if processes.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def in_two_processes(folder, bases) -> list[list[list[float]]]:
    finish(launch("objectives", str(folder), str(bases["model"]), str(bases["v_model"])))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_combination_equals_a_slow_reference(folder, bases, objective, in_two_processes):
    model = bases[objective.kind]
    expected, made = Expected(make_config(folder, model, objective)), {}
    seen = set()
    for number, (combination, config) in enumerate(combinations(folder, model, objective)):
        prior, gamma, batch, passes = combination
        by_processes = {1: measured(config, made), 2: in_two_processes[OBJECTIVES.index(objective)][number]}
        for count, found in by_processes.items():
            wanted = expected(batch * passes * count, prior, gamma)
            assert found[:3] == pytest.approx(wanted[:3], rel=1e-4), (objective, combination, count)
            # The norm is a sum over many numbers in another order.
            assert found[3] == pytest.approx(wanted[3], rel=1e-3), (objective, combination, count)
        seen.add(round(found[0], 5))
    # Were a weighting without effect, these would be fewer.
    assert len(seen) == len(WEIGHTINGS) * len({batch * passes for batch, passes in SHAPES})
