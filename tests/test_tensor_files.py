"""Files of tensors are read and written one tensor at a time; what strangers put in them never runs."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbkit import DbkitError
from dbkit.tensor_files import held, open_tensors, read_back, write_ckpt, write_safetensors

TENSORS = {
    "weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(7).half(),
    "brain": torch.ones(4, 2, 1, 1, dtype=torch.bfloat16),
    "ids": torch.arange(77)[None],
    "scale": torch.tensor(2.5),
    "nothing": torch.zeros(0, 3),
}
STORED = {name: held(tensor) for name, tensor in TENSORS.items()}
CODE = r"{} holds more than tensors, which could run code when loaded, so it is refused; look for a .safetensors file"
DAMAGED = r"{} is damaged or not a checkpoint \(.+\); download or copy it again$"


def assert_tensors(found):
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        values = found[name].read()
        assert found[name].shape == values.shape == expected.shape
        assert found[name].dtype == values.dtype == expected.dtype
        assert torch.equal(values, expected)
        assert found[name].nbytes == expected.nbytes


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_what_is_written_is_read_by_dbkit_and_by_the_libraries(tmp_path, suffix):
    path, sizes = tmp_path / f"made{suffix}", []
    write = write_safetensors if suffix == ".safetensors" else write_ckpt
    write(STORED, path, {"dbkit": "größer"}, sizes.append)
    found, others = open_tensors(path)
    assert_tensors(found)
    assert others == {"dbkit": "größer"}
    assert_tensors(read_back(path, suffix))
    assert sum(sizes) == sum(tensor.nbytes for tensor in TENSORS.values())
    theirs = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
    assert theirs.keys() == TENSORS.keys() and all(torch.equal(theirs[name], TENSORS[name]) for name in TENSORS)


def test_tensors_of_a_written_pickle_lie_where_they_can_be_mapped(tmp_path):
    write_ckpt(STORED, tmp_path / "made.ckpt", {})
    mapped = torch.load(tmp_path / "made.ckpt", mmap=True, weights_only=True)["state_dict"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values() if tensor.numel())


def test_what_the_libraries_write_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    torch.save(TENSORS, tmp_path / "b.bin")
    torch.save({"state_dict": TENSORS, "global_step": 7, "optimizer": [1]}, tmp_path / "c.ckpt")
    torch.save({"state_dict": TENSORS}, tmp_path / "d.ckpt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.bin", "c.ckpt", "d.ckpt"):
        assert_tensors(open_tensors(tmp_path / name)[0])
    assert open_tensors(tmp_path / "c.ckpt")[1] == {"global_step": 7}


def test_views_are_read_as_what_they_show(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"turned": whole.T, "part": whole[1:, :2]}, tmp_path / "views.ckpt")
    found, _ = open_tensors(tmp_path / "views.ckpt")
    write_safetensors(found, tmp_path / "made.safetensors", {})
    written = load_file(tmp_path / "made.safetensors")
    assert torch.equal(written["turned"], whole.T) and torch.equal(written["part"], whole[1:, :2])


def test_the_class_that_published_checkpoints_name_is_no_obstacle(tmp_path):
    # Training by PyTorch Lightning left it in the files of Stable Diffusion 1.4 as a key.
    pickled = tensor_pickle().replace(
        b"}X\x01\x00\x00\x00a",
        b"}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\nK\x01sX\x01\x00\x00\x00a",
    )
    found, _ = open_tensors(write(tmp_path, zipped(pickled)))
    assert torch.equal(found["a"].read(), torch.zeros(8))


# Pickles of strangers.


def write(folder: Path, content: bytes, name: str = "evil.ckpt") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def zipped(pickled: bytes, members=None, compression=zipfile.ZIP_STORED) -> bytes:
    """A torch zip around a pickle, with one block of 32 bytes unless said otherwise."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **(members or {"data/0": bytes(32)})}.items():
            archive.writestr(f"archive/{name}", content)
    return made.getvalue()


def tensor_pickle(claimed=8, size=8, offset=0, stride=1, key=b"0") -> bytes:
    """The pickle of a state dict with one tensor whose block has so many values as claimed."""

    def number(value):
        return b"J" + struct.pack("<i", value)

    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X" + struct.pack("<I", len(key)) + key + b"X\x03\x00\x00\x00cpu" + number(claimed) + b"tQ"
        b"" + number(offset) + number(size) + b"\x85" + number(stride) + b"\x85\x89ccollections\nOrderedDict\n)RtRs."
    )


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(folder: str) -> dict[str, bytes]:
    """Pickles that make a folder named `ran` when they are loaded without care."""
    name = f"X{struct.pack('<I', len(folder)).decode('latin1')}{folder}".encode("latin1")
    return {
        "reduce": pickle.dumps({"state_dict": {}, "x": Call(os.mkdir, folder)}, 2),
        "reduce by eval": pickle.dumps(Call(eval, f"__import__('os').mkdir({folder!r})"), 2),
        "global": b"\x80\x02}X\x01\x00\x00\x00acos\nsystem\ns.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(folder)]) + folder.encode() + b"\x85R.",
        "inst": b"(" + b"S'" + folder.encode() + b"'\nios\nmkdir\n.",
        "obj": b"\x80\x02(cos\nmkdir\n" + name + b"o.",
        "newobj": b"\x80\x02csubprocess\nPopen\n(](X\x05\x00\x00\x00mkdir" + name + b"et\x81.",
        "build": b"\x80\x02ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cos\nmkdir\nsb" + name + b"b.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(ctorch\nFloatStorage\nX\x08\x00\x00\x00__init__tR.",
        "persistent": b"\x80\x02(X\x07\x00\x00\x00storagecos\nmkdir\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        "extension": b"\x80\x02\x82\x01.",
        "torch": b"\x80\x02ctorch.hub\nload\n(X\x01\x00\x00\x00atR.",
    }


@pytest.mark.parametrize("kind", payloads("ran"))
@pytest.mark.parametrize("form", ["zip", "plain"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, monkeypatch, kind, form):
    pickled = payloads("ran")[kind]
    path = write(tmp_path, zipped(pickled) if form == "zip" else pickled)
    # Of opcodes that no torch writes, the reader does not even ask what they are for.
    sentence = DAMAGED if kind in ("stack global", "inst") else CODE
    with pytest.raises(DbkitError, match=sentence.format("evil.ckpt")):
        open_tensors(path)
    assert [left.name for left in tmp_path.iterdir()] == ["evil.ckpt"]


@pytest.mark.parametrize("kind", ["reduce", "reduce by eval", "stack global", "inst", "obj"])
def test_the_payloads_of_these_tests_would_run(tmp_path, kind):
    pickle.loads(payloads("ran")[kind])
    assert (tmp_path / "ran").is_dir()


def test_a_zip_in_a_zip_is_not_looked_into(tmp_path):
    inner = zipped(payloads("ran")["reduce"])
    # As the pickle of the outer one, and as one more member.
    with pytest.raises(DbkitError, match=DAMAGED.format("evil.ckpt")):
        open_tensors(write(tmp_path, zipped(inner)))
    found, _ = open_tensors(write(tmp_path, zipped(tensor_pickle(), {"data/0": bytes(32), "inner.zip": inner})))
    assert list(found) == ["a"] and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"claimed": 20, "size": 20},
        {"claimed": 4, "size": 4},
        {"claimed": 2**30, "size": 2**30},
        {"size": 80},
        {"size": -1},
        {"offset": 4},
        {"offset": -4},
        {"stride": 100},
        {"stride": -1},
        {"size": 2**30, "stride": 0},
        {"key": b"7"},
        {"key": b"../../../../etc/passwd"},
    ],
    ids=str,
)
def test_a_pickle_whose_sizes_do_not_add_up_is_refused(tmp_path, changes):
    assert open_tensors(write(tmp_path, zipped(tensor_pickle())))[0]["a"].shape == (8,)
    with pytest.raises(DbkitError, match=DAMAGED.format("evil.ckpt")):
        open_tensors(write(tmp_path, zipped(tensor_pickle(**changes))))


def test_a_zip_that_swells_is_refused(tmp_path):
    bomb = zipped(tensor_pickle(), {"data/0": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10**5
    with pytest.raises(DbkitError, match=r"\(its zip is compressed, which torch never does\)"):
        open_tensors(write(tmp_path, bomb))


def test_a_zip_with_two_files_of_one_name_is_refused(tmp_path):
    path = write(tmp_path, zipped(tensor_pickle()))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", bytes(32))
    with pytest.raises(DbkitError, match=r"its zip has two files of one name"):
        open_tensors(path)


@pytest.mark.parametrize(
    "pickled",
    [b"\x80\x02" + b"]" * 100000 + b"a" * 99999 + b".", b"\x80\x02Nr\xff\xff\xff\x7f.", b"\x80\x02]q\x00h\x00a."],
    ids=["deep", "far memo", "itself"],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, pickled):
    with pytest.raises(DbkitError, match=DAMAGED.format("evil.ckpt")):
        open_tensors(write(tmp_path, zipped(pickled)))


# Headers of strangers.


def safetensors(header: str | bytes | dict, values: int = 32, length: int | None = None) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(values)


def entry(first=0, last=32, shape=(8,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


TWICE = '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (safetensors({"a": entry()}, length=2**62), "its header would have 4611686018427387904 bytes"),
        (safetensors({"a": entry()}, length=200_000_000), "its header would have 200000000 bytes"),
        (safetensors({"a": entry()}, length=2), "Expecting property name|Unterminated|delimiter"),
        (safetensors("[" * 100_000), "recursion"),
        (safetensors(b"\xff\xfe\xfd"), "utf"),
        (safetensors("[1, 2]"), "its header is no list of tensors"),
        (safetensors(TWICE), "a name is there twice in its header"),
        (safetensors({"a": entry(0, 32), "b": entry(16, 48)}, 48), "its tensors overlap or leave gaps"),
        (safetensors({"a": entry(0, 32), "b": entry(0, 32)}), "its tensors overlap or leave gaps"),
        (safetensors({"a": entry(0, 16, (4,)), "b": entry(20, 36, (4,))}, 36), "its tensors overlap or leave gaps"),
        (safetensors({"a": entry(-32, 0)}), "a has a type, shape or place that cannot be"),
        (safetensors({"a": entry(shape=(-8,))}), "a has a type, shape or place that cannot be"),
        (safetensors({"a": entry(shape=(2**62, 4))}), "a has not the bytes of its shape"),
        (safetensors({"a": entry(shape=(True, 8))}), "a has a type, shape or place that cannot be"),
        (safetensors({"a": entry(dtype="F7")}), "a has a type, shape or place that cannot be"),
        (safetensors({"a": entry()}, 31), "bytes instead of"),
        (safetensors({"a": entry()}, 40), "bytes instead of"),
        (safetensors({"a": {"dtype": "F32"}}), "shape"),
        (safetensors({"a": 1}), "subscriptable"),
        (safetensors({"__metadata__": 1}, 0), "its metadata are no names and values"),
        (b"\x07", "bytes"),
    ],
    ids=range(21),
)
def test_a_safetensors_file_that_does_not_add_up_is_refused(tmp_path, content, reason):
    good = write(tmp_path, safetensors({"a": entry()}), "good.safetensors")
    assert torch.equal(open_tensors(good)[0]["a"].read(), torch.zeros(8))
    path = write(tmp_path, content, "evil.safetensors")
    with pytest.raises(DbkitError, match=DAMAGED.format("evil.safetensors")) as caught:
        open_tensors(path)
    assert any(word in str(caught.value) for word in reason.split("|")) and "\n" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_said(tmp_path):
    path = write(tmp_path, safetensors({"a": entry()}), "good.safetensors")
    found, _ = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DbkitError, match=r"good\.safetensors has become shorter while it was read; copy it again"):
        found["a"].read()
