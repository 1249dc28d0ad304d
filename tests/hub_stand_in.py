"""A stand-in of the Hugging Face Hub on this machine: the part of its HTTP interface that uploads and downloads use."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repository:
    """What a repository holds. large are the paths that are kept as LFS objects; a gated one shows only their names."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: int = 1
    gated: bool = False

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@dataclass
class Hub:
    """The state of the stand-in: ada's, who may write to her own repositories and to those of her organisation."""

    url: str = ""
    roles: dict[str, str] = field(default_factory=lambda: {"hf_writes": "write", "hf_reads": "read"})
    owners: tuple[str, ...] = ("ada", "engines")
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    # By method and path: the status to fail with, 0 to break the connection, None to do what is asked.
    fail: Callable[[str, str], int | None] = lambda method, path: None
    # What becomes of a file's bytes on their way.
    keep: Callable[[str, bytes], bytes] = lambda path, content: content
    # What becomes of them on the way to who asks, and how many answers end in their middle.
    give: Callable[[str, bytes], bytes] = lambda path, content: content
    cuts: int = 0
    # Which files were asked for, each with the range of bytes.
    given: list[tuple[str, str | None]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    do_POST = do_PUT = do_HEAD = do_GET

    def _serve(self):
        body, path = self._body(), self.path.partition("?")[0]
        status = self.hub.fail(self.command, path)
        if status == 0:
            self.close_connection = True
            return
        if status:
            return self._answer(status, {"error": "the stand-in fails"})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        role = self.hub.roles.get(token)
        if token and role is None:
            return self._answer(401, {"error": _BAD}, {"X-Error-Message": _BAD})
        if match := re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._give(role, *match.groups())
        if role is None and self.command == "POST":
            return self._answer(401, {"error": "Invalid username or password."})
        for pattern, answer in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                with contextlib.suppress(BrokenPipeError):
                    self._answer(*answer(self.hub, role, body, *match.groups()))
                return None
        return self._answer(404, {"error": f"the stand-in has no {self.command} {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while count := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(count))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if status in (200, 206) and headers and self.hub.cuts:
            self.hub.cuts -= 1
            text, self.close_connection = text[: len(text) // 2], True
        self.wfile.write(text)

    def _give(self, role: str | None, name: str, revision: str, path: str) -> None:
        """Answer with a file, or with the part of it that is asked for."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and role is None):
            return self._answer(*_unknown(role))
        if repository.gated:
            return self._answer(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
        path = urllib.parse.unquote(path)
        whole = repository.files[path]
        digest = hashlib.sha256(whole).hexdigest() if path in repository.large else _git_hash(whole)
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        content, asked = self.hub.give(path, whole), self.headers.get("Range")
        if self.command == "GET":
            self.hub.given.append((path, asked))
        if not asked:
            return self._answer(200, content, headers)
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._answer(206, content[start:], headers)


_BAD = "Invalid credentials in Authorization header"


def _unknown(role):
    # Who is not logged in is not told whether there is such a repository. (Of a Hub by https the client knows without
    # the code what its 401 means.)
    return 401 if role is None else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _who(hub, role, body):
    return 200, {"type": "user", "name": "ada", "orgs": [], "auth": {"accessToken": {"role": role}}}


def _create(hub, role, body):
    asked = json.loads(body)
    owner = asked["organization"] or "ada"
    name = f"{owner}/{asked['name']}"
    if role == "read" or owner not in hub.owners:
        return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
    answer = {"url": f"{hub.url}/{name}", "name": name}
    if name in hub.repositories:
        return 409, {**answer, "error": "You already created this model repo"}
    # Clients before version 2 say private, later ones visibility.
    hub.repositories[name] = Repository(asked.get("private") is True or asked.get("visibility") == "private")
    return 200, answer


def _about(hub, role, body, name, revision):
    repository = hub.repositories.get(name)
    if repository is None or (repository.private and role is None):
        return _unknown(role)
    if revision not in (None, "main", repository.sha):
        return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
    files = []
    for path, content in repository.files.items():
        files.append({"rfilename": path, "size": len(content), "blobId": _git_hash(content)})
        if path in repository.large:
            files[-1]["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    facts = {"id": name, "private": repository.private, "sha": repository.sha}
    return 200, {**facts, "siblings": files, "tags": [], "downloads": 0, "likes": 0}


def _modes(hub, role, body, name):
    if role == "read":
        return 403, {"error": "Forbidden: you must use a write token to upload to a repository."}
    repository, modes = hub.repositories[name], []
    for asked in json.loads(body)["files"]:
        path, large = asked["path"], asked["path"].endswith((".safetensors", ".png"))
        oid = None
        if path in repository.files:
            content = repository.files[path]
            oid = hashlib.sha256(content).hexdigest() if large else _git_hash(content)
        modes.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
    return 200, {"files": modes}


def _batch(hub, role, body, name):
    # Who may read is only turned away here, as by the Hub itself.
    if name.partition("/")[0] not in hub.owners:
        return 403, {"error": "You have read access but not the required permissions for this operation"}
    answers = []
    for asked in json.loads(body)["objects"]:
        answers.append(dict(asked))
        if asked["oid"] not in hub.objects:
            actions = {"upload": {"href": f"{hub.url}/objects/{asked['oid']}?X-Signature=signed"}}
            answers[-1]["actions"] = {**actions, "verify": {"href": f"{hub.url}/verify"}}
    return 200, {"transfer": "basic", "objects": answers}


def _put(hub, role, body, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "The content is not what was announced"}
    hub.objects[oid] = body
    return 200, {}


def _verify(hub, role, body):
    asked = json.loads(body)
    found = len(hub.objects.get(asked["oid"], b"")) == asked["size"]
    return (200, {}) if found else (404, {"error": "Object not found"})


def _commit(hub, role, body, name):
    repository = hub.repositories[name]
    repository.commits += 1
    for line in body.decode().splitlines():
        item, value = json.loads(line)["key"], json.loads(line)["value"]
        if item == "file":
            repository.files[value["path"]] = hub.keep(value["path"], base64.b64decode(value["content"]))
        elif item == "lfsFile":
            repository.files[value["path"]] = hub.keep(value["path"], hub.objects[value["oid"]])
            repository.large.add(value["path"])
    return 200, {"success": True, "commitOid": repository.sha, "commitUrl": f"{hub.url}/{name}/commit/{repository.sha}"}


def _tree(hub, role, body, name, revision):
    repository = hub.repositories[name]
    assert revision == repository.sha
    entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "unet"}]
    for path, content in repository.files.items():
        entries.append({"type": "file", "oid": _git_hash(content), "size": len(content), "path": path})
        if path in repository.large:
            oid = hashlib.sha256(content).hexdigest()
            entries[-1]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return 200, entries


_ROUTES = {
    "GET /api/whoami-v2": _who,
    "POST /api/repos/create": _create,
    "POST /api/validate-yaml": lambda hub, role, body: (200, {"errors": [], "warnings": []}),
    "GET /api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": _about,
    "POST /api/models/([^/]+/[^/]+)/preupload/main": _modes,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": _batch,
    "PUT /objects/(.+)": _put,
    "POST /verify": _verify,
    "POST /api/models/([^/]+/[^/]+)/commit/main": _commit,
    "GET /api/models/([^/]+/[^/]+)/tree/(.+)": _tree,
}


@contextlib.contextmanager
def serve():
    """Run the stand-in for the time of the block; yields its state."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
