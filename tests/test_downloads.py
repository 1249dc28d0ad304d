"""Sources that lie elsewhere: real servers on this machine, whole, slow, wrong or cut off in the middle."""

import hashlib
import os
import re
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_stand_in import Repository, serve
from safetensors.torch import load_file

from dbkit import ConvertConfig, DbkitError, convert, open_workspace
from dbkit.downloads import Address, OnHub, fetch, find

SUFFIXES = (".safetensors", ".ckpt")
TOKEN = "hf_reads"
CONTENT = bytes(range(256)) * 4096


class Server:
    """A server of one file: how it answers, and what it was asked for."""

    def __init__(self):
        self.url = ""
        self.content, self.status, self.ranges, self.cut, self.shift = CONTENT, 200, True, None, 0
        # Whether the length is said, or what arrives comes in chunks; where a range ends; whether If-Range is heeded.
        self.length, self.chunked, self.end, self.careless = True, False, None, False
        self.headers = {"ETag": '"one"', "Content-Type": "application/octet-stream"}
        self.asked = []


class _Handler(BaseHTTPRequestHandler):
    server_state: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        state = self.server_state
        asked = self.headers.get("Range")
        state.asked.append(asked)
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/elsewhere/small.safetensors?signature=hush")
            self.end_headers()
            return
        start, status = 0, state.status
        known = self.headers.get("If-Range") in (None, state.headers.get("ETag"))
        if asked and state.ranges and (known or state.careless):
            start, status = int(asked.removeprefix("bytes=").rstrip("-")) + state.shift, 206
        if start and start >= len(state.content):
            status = 416
        body = state.content[start : state.end]
        self.send_response(status)
        for name, value in state.headers.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(state.content)}")
        if state.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        elif state.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if state.cut is None else body[: state.cut])


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Server()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": state}))
    listening.daemon_threads = True
    state.url = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield state
    listening.shutdown()
    listening.server_close()
    thread.join()


def download(url, sha256=None):
    return fetch(find(url, SUFFIXES), SUFFIXES, sha256)


def in_cache(tmp_path):
    """The names of the files in dbkit's cache, without locks."""
    return sorted(path.name for path in (tmp_path / "hf").rglob("*") if path.is_file() and path.suffix != ".lock")


# Where a source is.


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("owner/name", OnHub("owner/name")),
        ("owner/name/small.safetensors", OnHub("owner/name", "small.safetensors")),
        ("owner/name/some/file.CKPT", OnHub("owner/name", "some/file.CKPT")),
        ("https://huggingface.co/owner/name", OnHub("owner/name")),
        ("https://huggingface.co/owner/name/tree/fp16", OnHub("owner/name", None, "fp16")),
        ("https://huggingface.co/owner/name/blob/main/a/b.ckpt", OnHub("owner/name", "a/b.ckpt", "main")),
        (
            "https://hf.co/owner/name/resolve/refs%2Fpr%2F1/a%20b.safetensors?download=true",
            OnHub("owner/name", "a b.safetensors", "refs/pr/1"),
        ),
        ("https://example.com/owner/name", Address("https://example.com/owner/name")),
        ("https://civitai.com/api/download/models/1?a=b", Address("https://civitai.com/api/download/models/1?a=b")),
    ],
)
def test_a_source_that_is_not_here_is_an_id_or_an_address(source, place):
    assert find(source, SUFFIXES) == place


@pytest.mark.parametrize(
    "source", ["nowhere", "models/small.safetensors", "models/sd15", "./a/b", "a/b/c", "a/b/c.txt", "/a/b", "ä/b"]
)
def test_what_is_neither_a_path_nor_an_id_is_said(source):
    with pytest.raises(DbkitError, match=rf"there is no file or folder {re.escape(str(Path(source)))}; check the path"):
        find(source, SUFFIXES)


def test_a_path_that_exists_goes_before_an_id(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "small.ckpt").touch()
    assert find("owner/name", SUFFIXES) == Path("owner/name")
    assert find("owner/name/small.ckpt", SUFFIXES) == Path("owner/name/small.ckpt")


@pytest.mark.parametrize(
    "source", ["https://", "http://ada:secret@example.com/a.ckpt", "http://a:secret/x", "https://[secret/a"]
)
def test_an_address_that_is_none_is_said_without_its_secrets(source):
    with pytest.raises(DbkitError, match="the address needs a host, and no name or password") as raised:
        find(source, SUFFIXES)
    assert "secret" not in str(raised.value)


def test_a_page_of_another_file_is_said():
    with pytest.raises(DbkitError, match=r"owner/name/notes\.txt ends in none of \.safetensors, \.ckpt; choose"):
        find("https://huggingface.co/owner/name/blob/main/notes.txt", SUFFIXES)


def test_settings_keep_addresses_and_anchor_paths():
    workspace = open_workspace()
    url = "https://example.com/" + "a" * 300 + ".safetensors"
    for source in (url, "owner/name", "tiny-sd", "/a/b.ckpt"):
        assert workspace.anchor(ConvertConfig(source, "made")).source == source
    (workspace.path / "models" / "small.ckpt").touch()
    assert workspace.anchor(ConvertConfig("models/small.ckpt", "made")).source == str(
        workspace.path / "models" / "small.ckpt"
    )


# Addresses.


def test_a_file_at_an_address_is_converted_and_kept(server, model, tmp_path, capsys):
    server.content = convert(model, tmp_path / "small.safetensors").read_bytes()
    url = f"{server.url}/files/small.safetensors?token=hush"
    made = convert(url, tmp_path / "made")
    assert (made / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert len(server.asked) == 1 and in_cache(tmp_path) == ["small.safetensors"]
    convert(url, tmp_path / "again", sha256=hashlib.sha256(server.content).hexdigest().upper())
    assert len(server.asked) == 1
    assert "small.safetensors was downloaded before; delete it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ('attachment; filename="My Model v2.safetensors"', "My Model v2.safetensors"),
        ('attachment; filename="../../../x.safetensors"', "x.safetensors"),
        (r'attachment; filename="..\\..\\x.CKPT"', "x.ckpt"),
        ("attachment; filename=/etc/x.ckpt", "x.ckpt"),
        ("attachment; filename*=UTF-8''b%C3%A4r%2F..%2F..%2Fy.ckpt", "y.ckpt"),
        ('attachment; filename="con.ckpt"', "con-.ckpt"),
        ('attachment; filename=".ckpt"', "small.safetensors"),
        (f'attachment; filename="{"a" * 300}.ckpt"', "a" * 80 + ".ckpt"),
        (f"attachment; filename*=UTF-8''{'%F0%9F%90%95' * 300}.ckpt", "🐕" * 50 + ".ckpt"),
    ],
)
def test_the_name_is_what_the_server_says_and_lies_in_the_cache(server, tmp_path, said, name):
    server.headers["Content-Disposition"] = said
    path = download(f"{server.url}/moved/1?type=Model")
    assert path.name == name and path.read_bytes() == CONTENT
    assert path.resolve().parent.parent == (tmp_path / "hf" / "dbkit").resolve()
    assert in_cache(tmp_path) == [name]


def test_without_a_name_from_the_server_it_is_that_of_the_address(server, tmp_path):
    assert download(f"{server.url}/moved/1").name == "small.safetensors"
    assert download(f"{server.url}/a%20b.ckpt#top").name == "a b.ckpt"


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.cut = 300_000
    url = f"{server.url}/small.ckpt"
    with pytest.raises(
        DbkitError, match=r"small\.ckpt stopped at 300000 bytes of 1\.0 MB \(.+\); run the same command"
    ):
        download(url)
    server.cut = None
    path = download(url)
    assert server.asked == [None, "bytes=300000-"]
    assert path.read_bytes() == CONTENT and in_cache(tmp_path) == ["small.ckpt"]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.cut, server.ranges = 300_000, False
    url = f"{server.url}/small.ckpt"
    with pytest.raises(DbkitError, match="stopped at 300000 bytes"):
        download(url)
    server.cut = None
    assert download(url).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]


def test_a_file_that_changed_meanwhile_starts_over(server, tmp_path):
    server.cut = 300_000
    url = f"{server.url}/small.ckpt"
    with pytest.raises(DbkitError, match="stopped at"):
        download(url)
    server.cut, server.content = None, CONTENT[::-1]
    server.headers["ETag"] = '"two"'
    assert download(url).read_bytes() == CONTENT[::-1]


def test_without_a_validator_nothing_is_joined(server, tmp_path):
    del server.headers["ETag"]
    server.cut = 300_000
    url = f"{server.url}/small.ckpt"
    with pytest.raises(DbkitError, match="stopped at"):
        download(url)
    server.cut, server.content = None, CONTENT[::-1]
    assert download(url).read_bytes() == CONTENT[::-1]
    assert server.asked == [None, None]


def test_a_rest_that_the_server_does_not_know_is_dropped(server, tmp_path):
    server.cut = 300_000
    url = f"{server.url}/small.ckpt"
    with pytest.raises(DbkitError, match="stopped at"):
        download(url)
    server.cut, server.content = None, CONTENT[:1000]
    assert download(url).read_bytes() == CONTENT[:1000]


def test_other_bytes_than_those_asked_for_are_not_joined(server, tmp_path):
    server.cut = 300_000
    url = f"{server.url}/small.ckpt"
    with pytest.raises(DbkitError, match="stopped at"):
        download(url)
    server.cut, server.shift = None, 5
    with pytest.raises(DbkitError, match=r"stopped at 0 bytes of .* \(it gives other bytes than it was asked for\)"):
        download(url)
    assert download(url).read_bytes() == CONTENT


def test_a_part_of_another_file_is_not_joined(server, tmp_path):
    url = f"{server.url}/small.ckpt"
    for changes in ({"ETag": '"two"'}, {}):
        server.cut, server.careless = 300_000, True
        with pytest.raises(DbkitError, match="stopped at 300000 bytes"):
            download(url)
        server.cut, server.content = None, CONTENT[::-1] if changes else CONTENT[::-1] + b"more"
        server.headers |= changes
        with pytest.raises(
            DbkitError, match=r"stopped at 0 bytes of .* \(it gives other bytes than it was asked for\)"
        ):
            download(url)
        path = download(url)
        assert path.read_bytes() == server.content
        path.unlink()
        server.content = CONTENT


def test_a_server_that_gives_less_than_the_rest_is_asked_again(server, tmp_path):
    url = f"{server.url}/small.ckpt"
    server.cut = 300_000
    with pytest.raises(DbkitError, match="stopped at 300000 bytes"):
        download(url)
    server.cut, server.end = None, 400_000
    with pytest.raises(DbkitError, match=r"stopped at 400000 bytes of 1\.0 MB"):
        download(url)
    server.end = None
    assert download(url).read_bytes() == CONTENT


def test_a_server_that_does_not_say_how_much_it_gives_needs_a_sum(server, tmp_path):
    server.length = False
    url = f"{server.url}/small.ckpt?token=hush"
    with pytest.raises(DbkitError, match=r"small\.ckpt does not say how large its file is, so .*; download .* sha256$"):
        download(url)
    assert in_cache(tmp_path) == []
    server.cut = 300_000
    wanted = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DbkitError, match="is not the file that was stated"):
        download(url, wanted)
    server.cut = None
    assert download(url, wanted).read_bytes() == CONTENT


def test_chunks_are_whole_or_refused(server, tmp_path):
    server.chunked, server.cut = True, 300_000
    with pytest.raises(DbkitError, match=r"small\.ckpt cannot be downloaded \(.+\); check the connection"):
        download(f"{server.url}/small.ckpt")
    assert "small.ckpt" not in in_cache(tmp_path)
    server.cut = None
    assert download(f"{server.url}/small.ckpt").read_bytes() == CONTENT


def test_a_packed_file_is_refused(server, tmp_path):
    server.headers["Content-Encoding"] = "gzip"
    with pytest.raises(DbkitError, match=r"small\.ckpt gives its file packed \(gzip\), which it was not asked to"):
        download(f"{server.url}/small.ckpt")
    assert in_cache(tmp_path) == []


@pytest.mark.parametrize("chunked", [True, False])
def test_an_empty_file_is_refused(server, tmp_path, chunked):
    server.chunked, server.content = chunked, b""
    server.status = 200
    with pytest.raises(DbkitError, match=r"small\.ckpt gives an empty file; download it in a browser"):
        download(f"{server.url}/small.ckpt")
    assert not any("small.ckpt" in name or name == "partial" for name in in_cache(tmp_path))


def test_a_whole_file_that_was_not_checked_yet_is_not_downloaded_again(server, tmp_path, monkeypatch):
    url = f"{server.url}/small.ckpt"

    def stopped(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dbkit.downloads.sync", stopped)
        with pytest.raises(KeyboardInterrupt):
            download(url)
    assert download(url).read_bytes() == CONTENT and len(server.asked) == 1


def test_wrong_bytes_are_said_and_deleted(server, tmp_path):
    url, wanted = f"{server.url}/small.ckpt", hashlib.sha256(CONTENT).hexdigest()
    server.content = CONTENT[::-1]
    with pytest.raises(
        DbkitError, match=rf"what arrived of .*small\.ckpt is not .* and not {wanted}; it is deleted, run"
    ):
        download(url, wanted)
    assert "small.ckpt" not in in_cache(tmp_path) and "partial" not in in_cache(tmp_path)
    server.content = CONTENT
    assert download(url, wanted.upper()).read_bytes() == CONTENT


def test_a_file_of_the_cache_that_does_not_fit_a_sum_is_named_and_stays(server):
    """The sum may be mistyped, and gigabytes were downloaded."""
    url, wanted = f"{server.url}/small.ckpt", hashlib.sha256(CONTENT).hexdigest()
    kept = download(url, wanted)
    with pytest.raises(DbkitError, match=r"small\.ckpt is not the file that sha256 names, for its own is"):
        download(url, wanted.replace(wanted[0], "0" if wanted[0] != "0" else "1"))
    kept.write_bytes(b"damaged")
    with pytest.raises(DbkitError, match="is not the file that sha256 names"):
        download(url, wanted)
    kept.unlink()
    assert download(url, wanted).read_bytes() == CONTENT


def test_a_file_of_the_user_is_compared_and_stays(tmp_path):
    path = tmp_path / "mine.ckpt"
    path.write_bytes(CONTENT)
    assert fetch(path, SUFFIXES, hashlib.sha256(CONTENT).hexdigest()) == path
    with pytest.raises(
        DbkitError, match=r"mine\.ckpt is not the file that sha256 names, for its own is .{64}; compare"
    ):
        convert(path, tmp_path / "made", sha256="0" * 64)
    assert path.read_bytes() == CONTENT


def test_a_sha256_is_whole_and_of_a_file(model, tmp_path):
    with pytest.raises(DbkitError, match="sha256 is 'abc'; write its 64 digits, which are 0 to 9 and a to f"):
        ConvertConfig("a.ckpt", "b", sha256="abc")
    with pytest.raises(DbkitError, match=r"sha256 is that of one file, and .* is a folder; leave it out"):
        convert(model, tmp_path / "made.safetensors", sha256="0" * 64)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"headers": {"Content-Type": "text/html; charset=utf-8"}},
            "gives a web page and no file, .*login.*; download it",
        ),
        ({"status": 401}, "wants a login, or refuses programs .*401.*; download it in a browser and give the path"),
        ({"status": 403}, "wants a login, or refuses programs .*403"),
        ({"status": 404}, "there is no file at .*404.*; copy its address again"),
        ({"status": 503}, "cannot be downloaded .*503.*; check the connection and run"),
        (
            {"headers": {"Content-Disposition": "attachment; filename=a.zip"}},
            "gives 'a.zip', which ends in none of .saf",
        ),
    ],
)
def test_what_is_no_file_is_one_sentence(server, tmp_path, change, expected):
    vars(server).update(change)
    with pytest.raises(DbkitError, match=f"127.0.0.1:[0-9]+/file {expected}|{expected}") as raised:
        download(f"{server.url}/file?token=hush")
    assert "hush" not in str(raised.value) and "\n" not in str(raised.value)
    assert in_cache(tmp_path) == []


def test_a_server_that_is_not_there_is_said(server, tmp_path):
    with pytest.raises(DbkitError, match=r"127\.0\.0\.1:9/a\.ckpt cannot be downloaded \(.+\); check the connection"):
        download("http://127.0.0.1:9/a.ckpt?token=hush")


def test_nothing_is_kept_on_google_drive(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr("dbkit.workspace._DRIVE", tmp_path / "drive")
    monkeypatch.setattr("dbkit.workspace._DISK", tmp_path / "disk")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "drive" / "MyDrive" / "hf"))
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    assert download(f"{server.url}/small.ckpt").is_relative_to(tmp_path / "disk")
    assert list((tmp_path / "drive" / "MyDrive").iterdir()) == []


def test_space_is_checked_before_a_byte_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setattr("dbkit.files.free_space", lambda folder: 1000)
    with pytest.raises(DbkitError, match=r"downloading .*small\.ckpt needs 1\.0 MB in .* and 1000 bytes are free"):
        download(f"{server.url}/small.ckpt")
    assert "partial" not in in_cache(tmp_path)


def test_the_destination_is_looked_at_before_the_download(server, tmp_path):
    with pytest.raises(DbkitError, match="the source is a file, so the destination is a folder"):
        convert(f"{server.url}/small.ckpt", tmp_path / "made.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(DbkitError, match="exists; choose another name"):
        convert(f"{server.url}/small.ckpt", tmp_path / "full")
    with pytest.raises(DbkitError, match=r"owner/name is a folder, so the destination is a file"):
        convert("owner/name", tmp_path / "made")
    assert server.asked == []


def test_a_vae_may_lie_at_an_address(server, model, tmp_path):
    server.content = (model / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    url = f"{server.url}/vae.safetensors"
    made = convert(model, tmp_path / "made.safetensors", pretrained_vae_name_or_path=url)
    tensors, own = load_file(made), load_file(convert(model, tmp_path / "own.safetensors"))
    assert tensors.keys() == own.keys() and all(torch.equal(tensors[name], own[name]) for name in own)
    assert server.asked == [None]


# The Hub.


@pytest.fixture
def hub(model, tmp_path):
    """A stand-in of the Hub with the small model as a folder and as a file, among files that no conversion reads."""
    with serve() as hub:
        files = {p.relative_to(model).as_posix(): p.read_bytes() for p in model.rglob("*") if p.is_file()}
        unread = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "README.md"]
        unread += ["unet/diffusion_pytorch_model.non_ema.safetensors", "text_encoder/flax_model.msgpack"]
        unread += ["vae/openvino_model.bin", "safety_checker/model.safetensors", "safety_checker/config.json"]
        files |= dict.fromkeys(unread, b"not read")
        files["some/small.safetensors"] = convert(model, tmp_path / "small.safetensors").read_bytes()
        large = {name for name in files if name.endswith(".safetensors")}
        hub.repositories["ada/small"] = Repository(private=False, files=files, large=large)
        hub.read = sorted(set(files) - set(unread) - {"some/small.safetensors"})
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Convert in a process of its own, where the client knows the stand-in; returns the sentence of a refusal."""
    own = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    environment = {k: v for k, v in os.environ.items() if k not in own and not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HOME": str(tmp_path / "home")}

    def run(source, destination, variables=None, **settings):
        code = (
            "import time; time.sleep = lambda seconds: None  # the client waits before it tries again\n"
            f"from dbkit import convert; convert({str(source)!r}, {str(destination)!r}, **{settings!r})"
        )
        environ = {**environment, **(variables or {})}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
        if done.returncode == 0:
            return None
        said = [line for line in done.stderr.splitlines() if line.startswith("dbkit.errors.DbkitError: ")]
        assert said, done.stderr
        return said[-1].removeprefix("dbkit.errors.DbkitError: ")

    return run


def test_of_a_repository_only_what_is_read_is_downloaded_and_only_once(hub, run, model, tmp_path):
    (tmp_path / "out").mkdir()
    assert run("ada/small", tmp_path / "out" / "small.safetensors") is None
    assert (tmp_path / "out" / "small.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()
    asked = sorted(path for path, _ in hub.given)
    assert asked == [name for name in hub.read if name in asked]
    unneeded = {"tokenizer/tokenizer.json", "tokenizer/special_tokens_map.json"}
    assert set(hub.read) - set(asked) <= unneeded
    hub.given.clear()
    assert run(f"{hub.url}/ada/small", tmp_path / "again.safetensors") is None
    assert hub.given == []
    # What is here is enough where the Hub cannot be asked.
    hub.fail = lambda method, path: 0
    assert run("ada/small", tmp_path / "offline.safetensors", {"HF_HUB_OFFLINE": "1"}) is None


def test_one_file_of_a_repository_comes_with_the_yaml_beside_it(hub, run, tmp_path):
    hub.repositories["ada/small"].files["some/small.yaml"] = b"model: {params: {parameterization: v}}"
    sentence = run(f"{hub.url}/ada/small/blob/main/some/small.safetensors", tmp_path / "made")
    assert "predicts epsilon by the settings in it and v_prediction by" in sentence.replace(
        "epsilon by its modelspec.prediction_type and ", ""
    )
    assert sorted(path for path, _ in hub.given) == ["some/small.safetensors", "some/small.yaml"]
    assert run("ada/small/some/small.safetensors", tmp_path / "made", prediction_type="epsilon") is None


def test_a_cut_connection_to_the_hub_is_taken_up(hub, run, tmp_path):
    hub.cuts = 1
    # Some versions of the client go on in the same call, some in the next one.
    if sentence := run("ada/small/some/small.safetensors", tmp_path / "made"):
        assert "small.safetensors cannot be downloaded (" in sentence
        assert run("ada/small/some/small.safetensors", tmp_path / "made") is None
    assert [path for path, _ in hub.given] == ["some/small.safetensors"] * 2
    assert hub.given[1][1] is not None


def test_what_the_hub_states_is_compared(hub, run, tmp_path):
    hub.give = lambda path, content: content[:-1] + b"?" if path.startswith("unet/diffusion") else content
    sentence = run("ada/small", tmp_path / "made.safetensors")
    assert re.match(
        r"what arrived of ada/small/unet/.* is not the file that was stated: .* it is deleted, run", sentence
    )
    hub.give = lambda path, content: content
    assert run("ada/small", tmp_path / "made.safetensors") is None


def test_a_sha256_that_is_not_the_hubs_is_said_before_the_download(hub, run, tmp_path):
    sentence = run("ada/small/some/small.safetensors", tmp_path / "made", sha256="0" * 64)
    assert "small.safetensors is not the file that sha256 names, for its own is" in sentence
    assert hub.given == []


def test_repositories_that_may_not_be_read_are_one_sentence(hub, run, tmp_path):
    expected = (
        "there is no file or folder ada/none here and no model ada/none on the Hugging Face Hub that you may read"
    )
    for variables in ({}, {"HF_TOKEN": TOKEN}):
        assert run("ada/none", tmp_path / "made.ckpt", variables).startswith(expected)
    hub.repositories["ada/small"].gated = True
    for source in ("ada/small", "ada/small/some/small.safetensors"):
        destination = tmp_path / ("made" if source.endswith("safetensors") else "made.ckpt")
        sentence = run(source, destination, {"HF_TOKEN": TOKEN})
        assert sentence.startswith(
            "ada/small is given to those who accept its terms; accept them on its page and run hf"
        )
    sentence = run("ada/small", tmp_path / "made.ckpt", {"HF_TOKEN": "hf_wrong"})
    assert sentence.startswith("the Hub refuses the Hugging Face token (") and "hf_wrong" not in sentence


def test_a_private_repository_is_read_with_the_token(hub, run, tmp_path):
    hub.repositories["ada/small"].private = True
    assert "for a private one run hf auth login" in run("ada/small", tmp_path / "made.ckpt")
    assert run("ada/small", tmp_path / "made.ckpt", {"HF_TOKEN": TOKEN}) is None


def test_what_a_repository_does_not_hold_is_said(hub, run, tmp_path):
    url = f"{hub.url}/ada/small/resolve/gone/some/small.safetensors"
    assert run(url, tmp_path / "made") == "ada/small has no revision gone on the Hugging Face Hub; check the address"
    sentence = run("ada/small/none.ckpt", tmp_path / "made")
    assert sentence == "ada/small has no file none.ckpt on the Hugging Face Hub; check its name there"
    hub.repositories["ada/files"] = Repository(private=False, files={"a.ckpt": b"", "b.txt": b""})
    sentence = run("ada/files", tmp_path / "made.ckpt")
    assert (
        sentence == "ada/files is no diffusers model on the Hugging Face Hub; give one of its files: ada/files/a.ckpt"
    )
    hub.repositories["ada/small"].files["text_encoder_2/config.json"] = b"{}"
    assert "is a Stable Diffusion XL model" in run("ada/small", tmp_path / "made.ckpt")
    assert hub.given == []


def test_a_hub_that_cannot_be_reached_is_said(run, hub, tmp_path):
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert re.match(r"ada/small cannot be downloaded \(.+\); check the connection", run("ada/small", "a.ckpt", nobody))
    nowhere = {"HF_ENDPOINT": "http://hub.invalid"}
    assert "ada/small is not on this machine" in run("ada/small", "a.ckpt", nowhere)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert "ada/small is not on this machine and HF_HUB_OFFLINE is set" in run("ada/small", "a.ckpt", offline)
