"""Between two lines of its log a training waits for no number from the device, so the CPU keeps ahead of a GPU."""

import contextlib
import sys

import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbkit import TrainConfig, train
from dbkit.cache import Latents, Pool
from dbkit.models import Models, load_models
from dbkit.order import Order
from dbkit.state import State
from dbkit.train import train_step

# The package's attribute `train` is the function; the module has its name.
MODULE = sys.modules[train.__module__]
# The first and the last step have lines in the log.
FIRST, LAST = 3, 7


class Waits(TorchDispatchMode):
    """Lists the operations whose result the CPU would wait for if their tensors were a GPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Numbers for Python, and shapes that depend on numbers. Indexing has one of those where a mask is the index.
        masks = "index" not in str(function) or any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags) and masks:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Lists the methods that hand a tensor's numbers out as they lie on the CPU, without any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def listed(found: list[str]):
    """Put into `found` what would be waited for in the block."""
    with Waits() as waits, Reads() as reads:
        yield
    found += waits.seen + reads.seen


@contextlib.contextmanager
def between_lines(monkeypatch, watched, prepare=lambda state: None):
    """Let the block's training run under watched() from the beginning of step FIRST to that of step LAST."""
    take, stack = MODULE.train_step, contextlib.ExitStack()

    def noted(state, pools, order, config, step, learning_rate):
        if step == 1:
            prepare(state)
        if step == FIRST:
            stack.enter_context(watched())
        if step == LAST:
            stack.close()
        return take(state, pools, order, config, step, learning_rate)

    monkeypatch.setattr(MODULE, "train_step", noted)
    with stack:
        yield


MIXED = {"use_aspect_ratio_bucket": True, "gradient_accumulation_steps": 2, "train_text_encoder": True}
CASES = {
    "plain": {},
    "prior preservation": {"with": ("prior",), "train_batch_size": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "min-SNR, offset noise, perturbation, dropout, Huber": {
        "min_snr_gamma": 5.0,
        "noise_offset": 0.1,
        "input_perturbation": 0.1,
        "caption_dropout": 0.5,
        "loss_type": "huber",
        "pad_tokens": False,
    },
    "v prediction": {"with": ("v_model",), "min_snr_gamma": 5.0},
    "masks, inpainting": {"with": ("masks", "inpainting_model")},
    "averages, text encoder": {"use_ema": True, "train_text_encoder": True, "clip_skip": 2},
    "LoRA": {"adapter": "lora", "lora_rank": 2, "train_text_encoder": True},
    "buckets, concepts, tags": {"with": ("mixed",), **MIXED},
    "gradient checkpointing, bf16": {"gradient_checkpointing": True, "mixed_precision": "bf16"},
    "small": {"memory": "small"},
    "tiny": {"memory": "tiny", "train_text_encoder": True},
    "8-bit": {"use_8bit_adam": True},
}


@pytest.fixture
def masks(photos) -> dict:
    (photos / "masks").mkdir()
    Image.new("L", (96, 80), 128).save(photos / "masks" / "teal.png")
    return {"masked_loss": True}


@pytest.fixture
def of_case(settings, request):
    """The settings of a case, those of fixtures among them."""

    def made(case: dict) -> dict:
        given = {**settings, "max_train_steps": LAST, "log_interval": 100, "save_every_n_minutes": None}
        for name in case.get("with", ()):
            value = request.getfixturevalue(name)
            given |= value if isinstance(value, dict) else {"pretrained_model_name_or_path": str(value)}
        return {**given, **{name: value for name, value in case.items() if name != "with"}}

    return made


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_step_waits_for_the_device(case, of_case, monkeypatch):
    found: list[str] = []
    with between_lines(monkeypatch, lambda: listed(found)):
        train(**of_case(case))
    assert found == []


@pytest.mark.parametrize(("changes", "waits"), [({}, 0), ({"use_8bit_adam": True}, 1)], ids=["fused", "8-bit"])
def test_with_the_loss_scale_of_fp16_a_fused_optimizer_waits_for_nothing_and_others_once_a_step(
    changes, waits, of_case, monkeypatch
):
    """Whether gradients overflowed decides if the optimizer steps. Only a fused one is told on the device."""

    def prepare(state: State) -> None:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    found: list[str] = []
    with between_lines(monkeypatch, lambda: listed(found), prepare):
        train(**of_case(changes))
    assert found == ["aten._local_scalar_dense.default"] * waits * (LAST - FIRST)


# Ways to wait for numbers, and under which name each is listed.
WAYS = {
    lambda losses: losses[0].item(): "aten._local_scalar_dense.default",
    lambda losses: bool(losses[0] > 0): "aten._local_scalar_dense.default",
    lambda losses: losses[losses > 0]: "aten.index.Tensor",
    lambda losses: losses.nonzero(): "aten.nonzero.default",
    lambda losses: torch.equal(losses, losses): "aten.equal.default",
    lambda losses: losses.tolist(): "tolist",
    lambda losses: losses.cpu(): "cpu",
    lambda losses: losses.numpy(): "numpy",
}


def test_a_step_that_waits_is_noticed(of_case, monkeypatch):
    add, found = MODULE.Log.add, []

    def curious(log, step, losses, grad_norm, learning_rate):
        for way in WAYS:
            way(losses)
        add(log, step, losses, grad_norm, learning_rate)

    monkeypatch.setattr(MODULE.Log, "add", curious)
    with between_lines(monkeypatch, lambda: listed(found)):
        train(**of_case({}))
    assert sorted(found) == sorted([*WAYS.values()] * (LAST - FIRST))


class Crossings(TorchDispatchMode):
    """Lists the operations with tensors on both sides, and whether the CPU goes on meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs, made)) if isinstance(value, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.seen.append((str(function), bool(kwargs.get("non_blocking"))))
        return made


def state_on_meta(model, text_is_trained: bool) -> State:
    """A state on torch's meta device, which has no numbers: whoever asks for one, or copies one from there, fails."""
    models = load_models(model)
    trained = {"unet": models.unet} | ({"text_encoder": models.text_encoder} if text_is_trained else {})
    for module in trained.values():
        module.requires_grad_(True).train().to("meta")
    models.noise_scheduler.alphas_cumprod = models.noise_scheduler.alphas_cumprod.to("meta")
    groups = [{"params": list(module.parameters()), "factor": 1.0} for module in trained.values()]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return State(models, models, trained, torch.optim.SGD(groups, lr=1e-4), scaler, None, torch.float32)


def pools_on_meta(models: Models, text_is_trained: bool) -> list[Pool]:
    """Two pictures of two shapes, and as many class images, each with a view of its own."""
    latents = [Latents(*torch.empty(2, 2, 4, 8, width, device="meta")) for width in (8, 16)]
    width = models.text_encoder.config.hidden_size
    prompts = torch.empty(2, 77, width, device="meta")
    if text_is_trained:
        prompts = torch.empty(2, 77, dtype=torch.long, device="meta")
    places = [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]
    return [Pool(role, latents, places, prompts, [[0], [1]]) for role in ("instance", "class")]


@pytest.mark.parametrize("text_is_trained", [False, True])
def test_what_goes_to_the_device_in_a_step_is_not_waited_for_and_nothing_comes_back(model, settings, text_is_trained):
    state = state_on_meta(model, text_is_trained)
    pools = pools_on_meta(state.models, text_is_trained)
    kinds = ((0, (64, 64)), (0, (128, 64)))
    config = TrainConfig(**{**settings, "gradient_accumulation_steps": 2, "min_snr_gamma": 5.0})
    with Crossings() as crossings:
        losses, grad_norm = train_step(state, pools, Order(0, 2, kinds, kinds), config, 1, 1e-4)
    assert losses.is_meta and grad_norm.is_meta
    # The random numbers, and the rows of tables, for each of two passes.
    assert crossings.seen == [("aten._to_copy.default", True)] * 4


def test_on_that_device_a_step_that_waits_is_noticed():
    with Crossings() as crossings:
        torch.ones(3).to("meta")
        torch.empty(4, device="meta")[torch.zeros(2, dtype=torch.long)]
    assert [waits for _, waits in crossings.seen] == [False, False]
    for read in (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read(torch.empty(1, device="meta"))


@contextlib.contextmanager
def strict():
    """Let CUDA raise where the CPU waits for it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which raises where it is waited for")


@on_a_gpu
@pytest.mark.parametrize("case", [*CASES.values(), {"mixed_precision": "fp16"}], ids=[*CASES, "fp16"])
def test_on_a_gpu_no_step_waits(case, of_case, monkeypatch):
    with between_lines(monkeypatch, strict):
        train(**{**of_case(case), "device": "cuda"})


@on_a_gpu
def test_on_a_gpu_a_step_that_waits_is_an_error():
    with strict(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()
