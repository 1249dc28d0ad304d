"""CLIP's tokenizer: loaded, saved in both of its formats, and as plain tables."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.embedded import local_folder
from dbkit.errors import DbkitError
from dbkit.libraries import hub_options, loading

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# The tokenizer of every Stable Diffusion model, at the commit this was written against.
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
_CLIP_REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"


# Stable Diffusion 2 has the same words, and fills prompts up with this one, whose id is 0, instead of the end's.
SD2_PAD = "!"


def load_tokenizer(name: str | None, **settings: Any) -> CLIPTokenizer:
    """A tokenizer by folder or Hugging Face id; for None the one of Stable Diffusion 1. settings: pad_token."""
    if name:
        with loading(f"tokenizer {name}"):
            return clip_tokenizer(name, **settings)
    options = hub_options(CLIP_TOKENIZER, "tokenizer_config.json", _CLIP_REVISION)
    with loading(f"tokenizer {CLIP_TOKENIZER}"):
        return clip_tokenizer(CLIP_TOKENIZER, revision=_CLIP_REVISION, **options, **settings)


def model_tokenizer(name: str, revision: str | None = None) -> CLIPTokenizer:
    """The tokenizer of a model folder or Hugging Face id, without the rest of the model."""
    folder = local_folder(name)
    options = {"revision": revision} if revision else {}
    if folder.is_dir():
        with loading(name):
            return clip_tokenizer(folder, subfolder="tokenizer")
    options |= hub_options(name, "tokenizer/tokenizer_config.json", revision)
    with loading(name):
        return clip_tokenizer(name, subfolder="tokenizer", **options)


def tokenizer_fingerprint(name: str | None) -> str | None:
    """What tells one tokenizer from another: for a folder a hash of its files, else its id."""
    if not name or not Path(name).is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(name).iterdir() if path.suffix in (".json", ".txt")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def clip_tokenizer(name: str | Path, **options: Any) -> CLIPTokenizer:
    """A CLIP tokenizer as transformers loads it, which must know words."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(name, **options)
    # Where the files are missing, transformers 5 makes a tokenizer that knows no word, and says nothing.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise OSError("the tokenizer's vocabulary is missing" if Path(name).is_dir() else "its tokenizer cannot be had")
    return tokenizer


def load_tokenizer_tables(vocabulary: dict[str, int], merges: list[str], config: dict[str, Any]) -> CLIPTokenizer:
    """A tokenizer from the tables that tokenizer_tables() gives, and the settings beside them."""
    with tempfile.TemporaryDirectory(prefix="dbkit-") as name:
        folder = Path(name)
        _write_tables(vocabulary, merges, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_tokenizer(str(folder))


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the tokenizer as transformers does, plus vocab.json and merges.txt, which older clients read."""
    tokenizer.save_pretrained(folder)
    vocabulary, merges = tokenizer_tables(folder)
    _write_tables(vocabulary, merges, folder)


def _write_tables(vocabulary: dict[str, int], merges: list[str], folder: Path) -> None:
    texts = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def tokenizer_tables(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The vocabulary and the merges of a saved CLIP tokenizer, in whichever format it was saved."""
    try:
        vocabulary, merges = _tables(folder)
        if not isinstance(vocabulary, dict):
            raise ValueError("it holds no words")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DbkitError(f"the tokenizer in {folder} is not readable ({error}); copy the model again") from error
    return vocabulary, merges


def _tables(folder: Path) -> tuple[dict[str, int], list[str]]:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        return vocabulary, [line for line in lines if line and not line.startswith("#version")]
    if not (folder / "tokenizer.json").is_file():
        raise DbkitError(f"{folder} has neither vocab.json with merges.txt nor tokenizer.json; copy the model again")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return model["vocab"], merges


def added_words(folder: Path) -> list[str]:
    """The words that were added to a saved tokenizer and are not in the tables that tokenizer_tables() gives."""
    known, found = tokenizer_tables(folder)[0], []
    try:
        for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
            said = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
            if name == "added_tokens.json":
                found += said
            elif name == "tokenizer_config.json":
                found += [token["content"] for token in said.get("added_tokens_decoder", {}).values()]
            else:
                found += [token["content"] for token in said.get("added_tokens") or ()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DbkitError(f"{folder / name} is not readable ({error}); copy the model again") from error
    return sorted({str(word) for word in found} - known.keys())
