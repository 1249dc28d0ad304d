"""CLIP's tokenizer from its folder, from its tables, and where it is missing."""

import pytest

from dbkit import DbkitError
from dbkit.tokenizer import CLIP_TOKENIZER, load_tokenizer, load_tokenizer_tables, tokenizer_tables

TEXTS = ("photo of zwx dog", "Ein Bär, ganz groß!", "犬の写真 🐕", "")


@pytest.fixture
def offline(monkeypatch):
    """The hub's library reads its environment once, when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_tokenizer_that_cannot_be_downloaded_is_said_in_one_sentence(offline):
    with pytest.raises(
        DbkitError, match=f"the model {CLIP_TOKENIZER} is not on this machine and Hugging Face cannot be"
    ):
        load_tokenizer(None)


@pytest.mark.parametrize("removed", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_both_formats_of_the_tokenizer_hold_the_same(copied, model, removed):
    expected = load_tokenizer(str(model / "tokenizer"))
    tables = tokenizer_tables(model / "tokenizer")
    for name in removed:
        (copied / "tokenizer" / name).unlink()
    assert tokenizer_tables(copied / "tokenizer") == tables
    found = load_tokenizer(str(copied / "tokenizer"))
    assert [found(text).input_ids for text in TEXTS] == [expected(text).input_ids for text in TEXTS]


def test_tokenizer_tables_make_the_same_tokenizer():
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    made = load_tokenizer_tables({w: n for n, w in enumerate(words)}, ["d o", "do g</w>"], {"model_max_length": 77})
    assert made("dog cat").input_ids == [words.index(w) for w in ("<|startoftext|>", "dog</w>", "c", "a", "t</w>")] + [
        words.index("<|endoftext|>")
    ]


def test_a_folder_without_tokenizer_tables_is_refused(copied):
    for name in ("tokenizer.json", "vocab.json"):
        (copied / "tokenizer" / name).unlink()
    with pytest.raises(DbkitError, match=r"tokenizer has neither vocab\.json with merges\.txt nor tokenizer\.json"):
        tokenizer_tables(copied / "tokenizer")
