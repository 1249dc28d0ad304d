"""What follows the memory of torch's meta tensors: a ledger of storages, and arithmetic as a GPU would do it."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What a storage is entered as if nothing else is said of it, and what autocast makes of weights.
ACTIVATIONS, COPIES = "activations", "16-bit copies of weights"


def make_ledger() -> Any:
    """A TorchDispatchMode that follows every storage made inside it. torch is imported here, so the class is, too."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Ledger(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive: dict[int, weakref.ref] = {}
            self.entries: dict[int, tuple[str, int]] = {}
            self.held: Counter[str] = Counter()
            self.total = self.most = 0
            self.moment: dict[str, int] = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for value in tree_leaves(made):
                if isinstance(value, torch.Tensor):
                    self.see(value)
            return made

        def see(self, tensor: torch.Tensor, kind: str = ACTIVATIONS) -> None:
            """Enter the storage of a tensor, unless it is known."""
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.alive:
                self.alive[key] = weakref.ref(storage, functools.partial(self._forget, key))
                # CUDA's allocator gives whole blocks of 512 bytes.
                self._add(key, kind, -(-storage.nbytes() // 512) * 512)

        def book(self, tensor: torch.Tensor, kind: str) -> None:
            """Enter the storage of a tensor as something else than it was entered as."""
            key = tensor.untyped_storage()._cdata
            if key in self.entries:
                self._add(key, kind, self._take(key))
            else:
                self.see(tensor, kind)

        def _add(self, key: int, kind: str, count: int) -> None:
            self.entries[key] = (kind, count)
            self.held[kind] += count
            self.total += count
            if self.total > self.most:
                self.most, self.moment = self.total, dict(self.held)

        def _take(self, key: int) -> int:
            kind, count = self.entries.pop(key)
            self.held[kind] -= count
            self.total -= count
            return count

        def _forget(self, key: int, _: weakref.ref) -> None:
            del self.alive[key]
            self._take(key)

        def next_moment(self) -> dict[str, int]:
            """The most that was held since the last call, by kind."""
            moment, self.most, self.moment = self.moment, self.total, dict(self.held)
            return moment

    return Ledger()


def make_arithmetic(ledger: Any, dtype: torch.dtype, kind: str) -> Any:
    """A TorchFunctionMode in autocast's place, which also attends as the fused kernels do: they keep no scores."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_map

    low = {functional.linear, functional.conv2d, torch.matmul, torch.bmm, torch.baddbmm}
    # On a GPU autocast computes these in fp32; on a CPU it leaves them as they come.
    full = {functional.group_norm, functional.layer_norm, functional.softmax} if kind != "cpu" else set()

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(context, query, key, value):
            out = torch.empty_like(query)
            sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
            context.save_for_backward(query, key, value, out, sums)
            return out

        @staticmethod
        def backward(context, gradient):
            query, key, value, _, sums = context.saved_tensors
            # Fused kernels sum up the query's gradient in fp32.
            summed = query.new_empty(query.shape, dtype=torch.float32), torch.empty_like(sums)
            return summed[0].to(query.dtype), torch.empty_like(key), torch.empty_like(value)

    class Arithmetic(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.copies: dict[int, torch.Tensor] | None = {}

        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is functional.scaled_dot_product_attention:
                names = ("query", "key", "value")
                given = {**dict(zip(names, args)), **{name: kwargs[name] for name in names if name in kwargs}}
                return Attention.apply(*(self.lower(given[name]) for name in names))
            if function in low:
                args, kwargs = tree_map(self.lower, (args, kwargs))
            elif function in full:
                args, kwargs = tree_map(self.raise_, (args, kwargs))
            return function(*args, **kwargs)

        def lower(self, value):
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or dtype == torch.float32:
                return value
            # Autocast keeps its copies of trained weights for as long as its block lasts.
            keeps = self.copies is not None and value.is_leaf and value.requires_grad
            if keeps and id(value) in self.copies:
                return self.copies[id(value)]
            copy = value.to(dtype)
            if isinstance(value, torch.nn.Parameter):
                ledger.book(copy, COPIES)
            if keeps:
                self.copies[id(value)] = copy
            return copy

        def raise_(self, value):
            is_low = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.float() if is_low and dtype != torch.float32 else value

    return Arithmetic()


def run_backward(loss: torch.Tensor) -> None:
    """loss.backward() inside a TorchFunctionMode: torch's own leaves the mode, also for what checkpoints recompute."""
    import torch

    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
