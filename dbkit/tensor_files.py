"""Files of tensors, read and written one tensor at a time: .safetensors, and the pickles of torch (.ckpt, .pt, .bin).

A 4 GB model passes through a few hundred MB of memory. Files of strangers are data: a header or pickle that does not
add up is refused before a byte of it is used, and nothing in a file is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import textwrap
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.errors import DbkitError
from dbkit.files import reads_back_differently

if TYPE_CHECKING:
    import torch

SAFETENSORS = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# No header of a real model comes near; safetensors' own limit is the same.
_LONGEST_HEADER = 100_000_000
# What is mapped into memory is let go of after so many bytes of it were read, for it counts as used.
_MAPPED = 500_000_000
_BLOCK = 1 << 20
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# Types of safetensors that no weights of these models come in, but for quantised ones: F8_E4M3, C64, U16.
_OTHER_TYPES = re.compile(r"F4|F[68]_E\d+M\d+\w*|C64|U(16|32|64)")
_STORAGES = {
    "torch.float64": "DoubleStorage",
    "torch.float32": "FloatStorage",
    "torch.float16": "HalfStorage",
    "torch.bfloat16": "BFloat16Storage",
    "torch.int64": "LongStorage",
    "torch.int32": "IntStorage",
}
# What torch's restricted reader says of a name to import, a class or a call; these operands make or call things.
_CODE = re.compile(r"GLOBAL|Unsupported class|[Rr]educe|[Bb]uild|operand (105|111|130|131|132|146|147)\b")


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file: its shape and type now, its values each time read() is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor], **facts: Any) -> Stored:
        """The tensor that change() makes of this one; facts are its shape or dtype where they differ."""
        return replace(self, read=lambda: change(self.read()), **facts)


def held(tensor: torch.Tensor) -> Stored:
    """A tensor that is in memory anyway."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def open_tensors(path: Path, suffix: str = "") -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors of a file by name, and what else it says: metadata, or what lies beside a pickle's state_dict.

    suffix is for a file whose name lacks its own.
    Raises DbkitError for what is damaged, and for a pickle that holds more than tensors and plain values.
    """
    with _damage_is_a_sentence(path):
        return _open_safetensors(path) if (suffix or path.suffix).lower() == SAFETENSORS else _open_pickle(path)


def read_back(path: Path, suffix: str) -> dict[str, Stored]:
    """The tensors of a file that dbkit wrote, by the libraries' readers. Its name may lack the suffix."""
    if suffix.lower() != SAFETENSORS:
        return _open_pickle(path)[0]
    from safetensors import safe_open

    def load() -> dict[str, torch.Tensor]:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    return _Mapped(load).stored()


class _Mapped:
    """Tensors mapped from a file, which is mapped anew now and then so that little of it stays in memory."""

    def __init__(self, load: Callable[[], dict[str, torch.Tensor]]) -> None:
        self._load, self._tensors, self._seen = load, load(), 0

    def stored(self) -> dict[str, Stored]:
        """The tensors by name."""
        return {
            name: Stored(tuple(tensor.shape), tensor.dtype, lambda name=name: self._read(name))
            for name, tensor in self._tensors.items()
        }

    def _read(self, name: str) -> torch.Tensor:
        if self._seen > _MAPPED:
            self._tensors, self._seen = {}, 0
        self._tensors = self._tensors or self._load()
        self._seen += self._tensors[name].nbytes
        return self._tensors[name]


def _open_pickle(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    import torch

    zipped = zipfile.is_zipfile(path)
    sizes = _member_sizes(path) if zipped else None

    def load() -> dict[str, Any]:
        with _harmless_classes():
            # The older format cannot be mapped, and is read into memory as a whole.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        if not isinstance(loaded, Mapping):
            raise ValueError("it holds no names")
        return dict(loaded)

    def tensors(loaded: dict[str, Any]) -> dict[str, torch.Tensor]:
        found = loaded.get("state_dict", loaded)
        found = {str(name): tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
        _require_sizes(found, sizes)
        return found

    loaded = load()
    others = {name: value for name, value in loaded.items() if isinstance(value, (str, int, float))}
    if not zipped:
        return {name: held(tensor) for name, tensor in tensors(loaded).items()}, others
    return _Mapped(lambda: tensors(load())).stored(), others


def _member_sizes(path: Path) -> Counter[int]:
    """The sizes of the files in a torch zip, which lie there as they are; one that would swell is refused."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its zip is compressed, which torch never does")
    if len({member.filename for member in members}) != len(members):
        raise ValueError("its zip has two files of one name")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("the files in its zip overlap")
    return Counter(member.file_size for member in members)


def _require_sizes(tensors: dict[str, torch.Tensor], sizes: Counter[int] | None) -> None:
    """Raise ValueError where tensors claim more bytes than their file has for them: mapped, torch does not look."""
    storages = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.nbytes > storage.nbytes():
            raise ValueError(f"{name} claims more values than it has")
    if sizes is not None and (wrong := Counter(storages.values()) - sizes):
        raise ValueError(f"it claims a block of {next(iter(wrong))} bytes that is not there")


@contextlib.contextmanager
def _harmless_classes() -> Iterator[None]:
    """Let published checkpoints name the class that their training left in them, by an empty one of ours."""
    import torch

    harmless = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    with getattr(torch.serialization, "safe_globals", contextlib.nullcontext)([harmless]):
        yield


def _open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Read the header and check it by itself: the libraries take the second of two tensors of one name."""
    import torch

    header, start = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are no names and values")
    stored, ends = {}, []
    for name, entry in header.items():
        dtype = getattr(torch, _DTYPES.get(entry["dtype"], ""), None)
        if dtype is None and _OTHER_TYPES.fullmatch(str(entry["dtype"])):
            raise DbkitError(f"{path} has {name[:100]} in {entry['dtype']}; take the file in fp16, bf16 or fp32")
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        if dtype is None or not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
            raise ValueError(f"{name[:100]} has a type, shape or place that cannot be")
        tensor = Stored(shape, dtype, lambda first=first, d=dtype, s=shape: _read_values(path, start + first, s, d))
        if tensor.nbytes != last - first:
            raise ValueError(f"{name[:100]} has not the bytes of its shape")
        stored[name] = tensor
        ends.append((first, last))
    end = 0
    for first, last in sorted(ends):
        if first != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = last
    if start + end != path.stat().st_size:
        raise ValueError(f"it has {path.stat().st_size} bytes instead of {start + end}")
    return stored, metadata


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where the values begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, path.stat().st_size - 8):
            raise ValueError(f"its header would have {length} bytes")
        text = file.read(length)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError("a name is there twice in its header")
        return dict(pairs)

    header = json.loads(text, object_pairs_hook=once)
    if not isinstance(header, dict):
        raise ValueError("its header is no list of tensors")
    return header, 8 + length


def _read_values(path: Path, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    values = torch.empty(shape, dtype=dtype)
    with path.open("rb") as file:
        file.seek(place)
        if file.readinto(bytes_of(values)) != values.nbytes:
            raise DbkitError(f"{path} has become shorter while it was read; copy it again")
    return values


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are numbers; integers are. Several times faster than asking each value."""
    # Of anything that is no number, the extremes are none.
    return not tensor.is_floating_point() or not tensor.numel() or all(end.isfinite() for end in tensor.aminmax())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape are equal bit for bit; several times faster than comparing half floats."""
    import torch

    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor in memory, as they lie there."""
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_safetensors(
    tensors: dict[str, Stored],
    path: Path,
    metadata: dict[str, str],
    seen: Callable[[int], None] = lambda count: None,
    digest: hashlib._Hash | None = None,
) -> None:
    """Write a safetensors file tensor by tensor. `seen` is told the bytes of each.

    With a digest each is read back when it was written, and given to it (DiskError if it differs), and the file is
    brought to the disk.
    """
    codes = {name: code for code, name in _DTYPES.items()}
    # Wide types first, so that every tensor begins where its type may.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        first, end = end, end + tensors[name].nbytes
        dtype = codes[str(tensors[name].dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": tensors[name].shape, "data_offsets": [first, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield bytes_of(tensors[name].read())
            seen(tensors[name].nbytes)

    with path.open("wb") as file, path.open("rb", buffering=0) as reader:
        for data in _batched(parts()):
            file.write(data)
            if digest:
                file.flush()
                if not _reads_back(reader, data, digest):
                    raise reads_back_differently(path)
        if digest:
            os.fsync(file.fileno())


def _batched(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
    """The same bytes in pieces that are worth a call of the system."""
    batch = bytearray()
    for part in parts:
        if batch and len(batch) + len(part) > _BLOCK:
            yield batch
            batch = bytearray()
        if len(part) > _BLOCK:
            yield part
        else:
            batch += part
    if batch:
        yield batch


def _reads_back(reader: io.FileIO, data: bytes | bytearray | memoryview, digest: hashlib._Hash) -> bool:
    """Whether a file goes on with these bytes where it is read; what was read goes into the digest."""
    import numpy as np

    wanted, found = np.frombuffer(data, np.uint8), np.empty(min(len(data), _BLOCK), np.uint8)
    done = 0
    while done < len(data):
        count = reader.readinto(found[: len(data) - done])
        if not count or not np.array_equal(found[:count], wanted[done : done + count]):
            return False
        digest.update(found[:count])
        done += count
    return True


def write_ckpt(
    tensors: dict[str, Stored], path: Path, others: dict[str, str], seen: Callable[[int], None] = lambda count: None
) -> None:
    """Write a pickle tensor by tensor, as torch 1.6 did: AUTOMATIC1111 refuses what newer ones put in the zip."""
    content = {"state_dict": {name: _Place(str(n), tensors[name]) for n, name in enumerate(tensors)}, **others}
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        for number, tensor in enumerate(tensors.values()):
            member = zipfile.ZipInfo(f"archive/data/{number}")
            # torch maps a tensor from where it lies, which is best at a multiple of 64 bytes; the rest is filled.
            start = archive.fp.tell() + _ZIP_ENTRY + len(member.filename) + _ZIP_EXTRA
            gap = -start % 64
            member.extra = struct.pack("<HH", 0x4246, gap) + b"\0" * gap
            with archive.open(member, "w", force_zip64=True) as file:
                file.write(bytes_of(tensor.read()))
            seen(tensor.nbytes)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


# The length of a zip entry's fixed part; of its zip64 field and the head of the field that fills.
_ZIP_ENTRY, _ZIP_EXTRA = 30, 20 + 4


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor in a pickle whose values lie beside it."""

    key: str
    tensor: Stored


class _Block:
    def __init__(self, place: _Place) -> None:
        self.place = place


class _Pickler(pickle.Pickler):
    """Pickles places as torch pickles tensors."""

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        import torch

        if not isinstance(value, _Block):
            return None
        key, tensor = value.place.key, value.place.tensor
        return "storage", getattr(torch, _STORAGES[str(tensor.dtype)]), key, "cpu", math.prod(tensor.shape)

    def reducer_override(self, value: Any) -> Any:
        import torch

        if not isinstance(value, _Place):
            return NotImplemented
        shape = value.tensor.shape
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (_Block(value), 0, shape, strides, False, OrderedDict())


def damage() -> tuple[type[Exception], ...]:
    """What the libraries raise about files that are not whole, or were made to look so."""
    from safetensors import SafetensorError

    of_python = (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, MemoryError)
    return *of_python, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError


@contextlib.contextmanager
def _damage_is_a_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except damage() as error:
        # The restricted reader says GLOBAL, or names the instruction, when it meets more than plain values; its other
        # complaints are about damage. Its own text advises to lift the restriction.
        pickled = isinstance(error, pickle.UnpicklingError)
        if pickled and _CODE.search(str(error)):
            raise DbkitError(
                f"{path} holds more than tensors, which could run code when loaded, so it is refused; look for "
                "a .safetensors file of it"
            ) from error
        line = textwrap.shorten(next(iter(str(error).splitlines()), ""), 200, placeholder=" …")
        reason = "it is no plain pickle of tensors" if pickled else line or repr(error)
        raise DbkitError(f"{path} is damaged or not a checkpoint ({reason}); download or copy it again") from error
