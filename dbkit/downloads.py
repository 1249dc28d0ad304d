"""What a conversion reads, wherever it lies: on this machine, on the Hugging Face Hub, or at an address.

What is downloaded is compared with the size and the SHA-256 that are stated, and kept in a cache of this machine.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import string
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from dbkit.checkpoint import MANIFEST
from dbkit.embedded import local_folder
from dbkit.errors import DbkitError, some
from dbkit.files import (
    FULL,
    full_disk_is_a_sentence,
    one_process,
    require_space,
    safe_name,
    sha256,
    share,
    size,
    sync,
    write_text,
)
from dbkit.libraries import hub_errors, hub_options, status_and_reason
from dbkit.models import CONFIGS, WEIGHTS, models_beside, weight_names
from dbkit.workspace import FOLDERS, working_folder

if TYPE_CHECKING:
    from tqdm import tqdm

_TOKENS = "https://huggingface.co/settings/tokens"
_BY_HAND = "download it in a browser and give the path of the file"
_INDEX = "model_index.json"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class OnHub:
    """A repository of the Hugging Face Hub as a diffusers folder, or one file in it."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}" if self.file else self.repo


@dataclass(frozen=True)
class Address:
    """A file anywhere else, by its http or https address."""

    url: str

    def __str__(self) -> str:
        # Queries may hold a token.
        return urllib.parse.urlsplit(self.url)._replace(query="", fragment="").geturl()


Place = Path | OnHub | Address


def find(source: str | Path, suffixes: Sequence[str]) -> Place:
    """Where a source is; a path that exists goes before a Hugging Face id. suffixes are those that files may have.

    Nothing is asked of the network. Raises DbkitError for what is neither a path, an id nor an address.
    """
    source = str(source)
    if re.match(r"https?://", source, re.IGNORECASE):
        return _by_address(source, suffixes)
    try:
        path = local_folder(source).expanduser()
    except RuntimeError as error:
        raise DbkitError(f"{source} cannot be found ({error}); write the whole path") from error
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if path.exists():
        return path
    if saved := models_beside(path):
        raise DbkitError(f"there is no file or folder {path}; the run has {some(saved)}")
    # An id that ends as a file does, or a file in a repository that does not, is a path with a mistake in it.
    if _is_repo(f"{owner}/{name}") and owner not in FOLDERS and _ends(file or name, suffixes) == bool(file):
        return OnHub(f"{owner}/{name}", file or None)
    raise DbkitError(f"there is no file or folder {path}; check the path")


def is_folder(place: Place) -> bool:
    """Whether a place is a whole diffusers folder and no single file."""
    return place.is_dir() if isinstance(place, Path) else isinstance(place, OnHub) and not place.file


def fetch(place: Place, suffixes: Sequence[str], stated: str | None = None) -> Path:
    """The local path of a place, downloaded first where it is elsewhere. stated is the SHA-256 that a file must have.

    Raises DbkitError where that is not possible or something else arrived, which is then deleted.
    """
    stated = stated and stated.lower()
    if stated and is_folder(place):
        raise DbkitError(f"sha256 is that of one file, and {place} is a folder; leave it out")
    if isinstance(place, OnHub):
        return _from_hub(place, stated)
    if isinstance(place, Address):
        return _from_address(place, suffixes, stated)
    if stated and (found := _hash(place)) != stated:
        raise DbkitError(
            f"{place} is not the file that sha256 names, for its own is {found}; compare the sums or download it again"
        )
    return place


def _ends(name: str, suffixes: Sequence[str]) -> bool:
    return PureWindowsPath(name).suffix.lower() in suffixes


def _is_repo(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        # The client's check before version 2 takes letters of any script.
        validate_repo_id(name if name.isascii() else "")
    except HFValidationError:
        return False
    return True


def _by_address(source: str, suffixes: Sequence[str]) -> OnHub | Address:
    """An address; those of the Hub's pages and files are read as what they show."""
    from huggingface_hub import constants

    try:
        parts = urllib.parse.urlsplit(source)
        usable = parts.hostname and parts.username is None and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise DbkitError("the address needs a host, and no name or password before it; copy it again")
    hosts = {"huggingface.co", "www.huggingface.co", "hf.co", urllib.parse.urlsplit(constants.ENDPOINT).hostname}
    page = re.fullmatch(r"/([^/]+/[^/]+)(?:/(?:tree|blob|resolve)/([^/]+)(?:/(.+?))?)?/?", parts.path)
    if parts.hostname not in hosts or not page or not _is_repo(page[1]):
        return Address(source)
    revision, file = (urllib.parse.unquote(part) if part else None for part in page.group(2, 3))
    if file and not _ends(file, suffixes):
        raise DbkitError(f"{page[1]}/{file} ends in none of {', '.join(suffixes)}; choose a file that does")
    return OnHub(page[1], file, revision)


def _from_hub(place: OnHub, stated: str | None) -> Path:
    """Download what a conversion reads of a repository into the Hub's own cache, and compare each large file."""
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    probe = place.file or _INDEX
    if constants.HF_HUB_OFFLINE or hub_options(place.repo, probe, place.revision):
        cached = try_to_load_from_cache(place.repo, probe, revision=place.revision)
        if not isinstance(cached, str):
            raise DbkitError(f"{place} is not on this machine and HF_HUB_OFFLINE is set; unset it to download")
        return fetch(Path(cached), (), stated) if place.file else Path(cached).parent
    with _hub_refusals_are_sentences(place):
        listed = HfApi().model_info(place.repo, revision=place.revision, files_metadata=True)
        files = {file.rfilename: file for file in listed.siblings or ()}
        names = _needed(place, list(files))
        hashes = {name: files[name].lfs.sha256 for name in names if files[name].lfs}
        if stated and hashes.setdefault(place.file, stated) != stated:
            raise DbkitError(f"{place} is not the file that sha256 names, for its own is {hashes[place.file]}")
        missing = [n for n in names if not isinstance(try_to_load_from_cache(place.repo, n, revision=listed.sha), str)]
        cache = Path(constants.HF_HUB_CACHE)
        require_space(cache, sum(files[name].size or 0 for name in missing), f"downloading {place}")
        with full_disk_is_a_sentence(cache):
            paths = [Path(hf_hub_download(place.repo, name, revision=place.revision)) for name in names]
    for name, path in zip(names, paths):
        _checked(path, hashes.get(name), f"{place.repo}/{name}")
    return paths[0] if place.file else paths[0].parents[names[0].count("/")]


def _needed(place: OnHub, files: list[str]) -> list[str]:
    """Which of a repository's files a conversion reads. Raises DbkitError where it holds none that can be converted."""
    if place.file:
        if place.file not in files:
            raise DbkitError(f"{place.repo} has no file {place.file} on the Hugging Face Hub; check its name there")
        beside = PureWindowsPath(place.file).with_suffix(".yaml").as_posix()
        return [place.file, *({beside} & {*files})]
    if any(name.startswith("text_encoder_2/") for name in files):
        raise DbkitError(f"{place} is a Stable Diffusion XL model; dbkit converts Stable Diffusion 1.x and 2.x")
    weights = []
    for part in WEIGHTS:
        inside = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
        weights += [f"{part}/{name}" for name in weight_names(name for name in inside if "/" not in name)]
    if not any(name.startswith("unet/") for name in weights):
        single = [
            f"{place.repo}/{name}" for name in files if "/" not in name and _ends(name, (".safetensors", ".ckpt"))
        ]
        hint = f"give one of its files: {some(single)}" if single else "check its page there"
        raise DbkitError(f"{place} is no diffusers model on the Hugging Face Hub; {hint}")
    tables = {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    tables = tables if tables <= {*files} else {"tokenizer/tokenizer.json"}
    small = {_INDEX, MANIFEST, *tables, *(f"{part}/{name}" for part, name in CONFIGS.items())}
    return [*(name for name in files if name in small), *weights]


@contextmanager
def _hub_refusals_are_sentences(place: OnHub) -> Iterator[None]:
    """Say in one sentence why something cannot be had from the Hub, and what to do."""
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    token = f"run hf auth login, or put a token from {_TOKENS} that may read it in the environment variable HF_TOKEN"
    try:
        yield
    except hub_errors() as error:
        status, reason = status_and_reason(error)
        if isinstance(error, GatedRepoError):
            sentence = f"{place.repo} is given to those who accept its terms; accept them on its page and {token}"
        elif isinstance(error, RepositoryNotFoundError):
            sentence = (
                f"there is no file or folder {place} here and no model {place.repo} on the Hugging Face Hub that you "
                f"may read; check the name, and for a private one {token}"
            )
        elif isinstance(error, RevisionNotFoundError):
            sentence = f"{place.repo} has no revision {place.revision} on the Hugging Face Hub; check the address"
        elif status == 401:
            sentence = f"the Hub refuses the Hugging Face token ({reason}); make one at {_TOKENS}"
        else:
            sentence = f"{place} cannot be downloaded ({reason}); check the connection and run the same command again"
        raise DbkitError(sentence) from error


def _from_address(place: Address, suffixes: Sequence[str], stated: str | None) -> Path:
    """Download a file into a folder of its own in dbkit's cache, going on where an earlier try stopped."""
    from huggingface_hub import constants

    # Never on Google Drive, even if the Hub's own cache is there.
    cache = working_folder(Path(constants.HF_HOME) / "dbkit", None)
    folder = cache / hashlib.sha256(place.url.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with one_process(folder):
        whole = next((path for path in sorted(folder.iterdir()) if _ends(path.name, suffixes)), None)
        if whole:
            print(f"{whole} was downloaded before; delete it to download it again")
            return fetch(whole, (), stated)  # what was good once is kept: the sum may be mistyped
        partial = folder / "partial"
        with full_disk_is_a_sentence(folder):
            name = _receive(place, suffixes, partial, folder / "partial.json", bool(stated))
            _checked(partial, stated, place)
            share(partial)
            sync(partial)
            whole = partial.rename(folder / name)
        (folder / "partial.json").unlink()
        return whole


def _receive(place: Address, suffixes: Sequence[str], partial: Path, noted: Path, checked: bool) -> str:
    """Bring partial to the whole of what an address gives, and return the file's name.

    noted is what the last try learnt: name, size, and the validator by which a server knows whether its file changed.
    checked: what arrives is compared with a SHA-256, so that a server need not say how much it is.
    """
    have = partial.stat().st_size if partial.exists() else 0
    known = json.loads(noted.read_text(encoding="utf-8")) if have and noted.exists() else {}
    if have and have == known.get("size"):
        return known["name"]
    headers = {"User-Agent": "dbkit"}  # some servers turn Python's own away
    if known.get("validator"):
        headers |= {"Range": f"bytes={have}-", "If-Range": known["validator"]}
    request = urllib.request.Request(urllib.parse.quote(place.url, safe=string.punctuation), headers=headers)
    total, reason = None, "the connection ended"
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            name, length, etag = _name(place, answer, suffixes), *map(answer.headers.get, ("Content-Length", "ETag"))
            validator = etag if etag and not etag.startswith("W/") else answer.headers["Last-Modified"]
            _require_whole(place, answer, checked)
            # A server that knows no ranges, or whose file changed, gives it from its start.
            goes_on = answer.status == 206 and _fits(answer, have, known, validator)
            have = have if goes_on else 0
            total = have + int(length) if length else None
            if goes_on and (whole := answer.headers["Content-Range"].partition("/")[2]).isdigit():
                total = int(whole)  # it may give less than the rest
            require_space(partial.parent, int(length or 0), f"downloading {place}")
            with partial.open("ab" if have else "wb") as file, _bar(f"downloading {name}", total, have) as bar:
                if answer.status == 206 and not goes_on:
                    raise ValueError("it gives other bytes than it was asked for")
                write_text(noted, json.dumps({"name": name, "size": total, "validator": validator}))
                while block := answer.read(_BLOCK):
                    file.write(block)
                    bar.update(len(block))
    except (OSError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in FULL:
            raise
        if getattr(error, "code", None) == 416 and have:  # what is here is no beginning of what is there
            partial.unlink()
            return _receive(place, suffixes, partial, noted, checked)
        if total is None:
            raise _refusal(place, error) from error
        reason = status_and_reason(error)[1]
    got = partial.stat().st_size
    if not got and not total:
        partial.unlink()
        raise DbkitError(f"{place} gives an empty file; {_BY_HAND}")
    if total is not None and got != total:
        raise DbkitError(
            f"the download of {place} stopped at {size(got)} of {size(total)} ({reason}); run the same command again, "
            "which goes on from there where the server can"
        )
    return name


def _require_whole(place: Address, answer: http.client.HTTPResponse, checked: bool) -> None:
    """Raise DbkitError where nobody could tell whether what arrives is the whole file, or it is packed."""
    packed = answer.headers.get("Content-Encoding", "identity").lower()
    if packed != "identity":
        raise DbkitError(f"{place} gives its file packed ({packed}), which it was not asked to; {_BY_HAND}")
    # The last of an answer's chunks says that it is the last.
    if not (answer.headers["Content-Length"] or answer.chunked or checked):
        raise DbkitError(
            f"{place} does not say how large its file is, so a part of it could pass for the whole; {_BY_HAND}, or set "
            "sha256"
        )


def _fits(answer: http.client.HTTPResponse, have: int, known: dict[str, Any], validator: str | None) -> bool:
    """Whether a part of a file goes on where the first part ended, and is of the same file as far as that is said."""
    first, _, whole = f"{answer.headers['Content-Range']}".partition("/")
    same = not validator or validator == known.get("validator")
    return same and first.startswith(f"bytes {have}-") and whole in ("*", str(known.get("size") or whole))


def _name(place: Address, answer: http.client.HTTPResponse, suffixes: Sequence[str]) -> str:
    """The name that a server gives its file, else that in its address, as one that lies in no other folder.

    Raises DbkitError where it is no file of these kinds, such as a page that asks for a login.
    """
    if answer.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise DbkitError(f"{place} gives a web page and no file, as where a login is needed; {_BY_HAND}")
    paths = [urllib.parse.unquote(urllib.parse.urlsplit(url).path) for url in (answer.url, place.url)]
    names = [PureWindowsPath(name).name for name in (answer.headers.get_filename(), *paths) if name]
    for name in names:
        if _ends(name, suffixes):
            suffix = PureWindowsPath(name).suffix
            return safe_name(name.removesuffix(suffix)) + suffix.lower()
    raise DbkitError(
        f"{place} gives {names[0] if names else 'no name'!r}, which ends in none of {', '.join(suffixes)}; {_BY_HAND}"
    )


def _refusal(place: Address, error: Exception) -> DbkitError:
    """Why an address cannot be downloaded, and what to do."""
    code = getattr(error, "code", None)
    reason = status_and_reason(error)[1]
    if code in (401, 403):
        return DbkitError(f"{place} wants a login, or refuses programs ({reason}); {_BY_HAND}")
    if code in (404, 410):
        return DbkitError(f"there is no file at {place} ({reason}); copy its address again")
    return DbkitError(f"{place} cannot be downloaded ({reason}); check the connection and run the same command again")


def _checked(path: Path, stated: str | None, what: object) -> Path:
    """The path of a download, which is deleted, with DbkitError, if its SHA-256 is not the one stated."""
    if stated and (found := _hash(path)) != stated:
        for each in {path.resolve(), path}:  # the Hub's cache holds links
            each.unlink(missing_ok=True)
        raise DbkitError(
            f"what arrived of {what} is not the file that was stated: its SHA-256 is {found} and not {stated}; it is "
            "deleted, run the same command again"
        )
    return path


def _hash(path: Path) -> str:
    with _bar(f"checking {path.name}", path.stat().st_size) as bar:
        return sha256(path, bar.update)


def _bar(what: str, total: int | None, done: int = 0) -> tqdm:
    from tqdm import tqdm

    options = {"unit": "B", "unit_scale": True, "file": sys.stdout, "mininterval": 1, "leave": False}
    return tqdm(desc=what, total=total, initial=done, **options)
