"""Captions are text files beside the images."""

import pytest

from dbkit import DbkitError
from dbkit.captions import caption_file, read_caption


def test_an_image_without_a_text_file_has_no_caption(tmp_path):
    assert caption_file(tmp_path / "dog.png") is None
    assert read_caption(tmp_path / "dog.png") is None


def test_the_file_that_names_its_image_exactly_comes_first(tmp_path):
    (tmp_path / "dog.txt").write_text("any dog")
    assert read_caption(tmp_path / "dog.png") == "any dog"
    (tmp_path / "dog.png.txt").write_text("the dog of the PNG")
    assert read_caption(tmp_path / "dog.png") == "the dog of the PNG"
    assert read_caption(tmp_path / "dog.jpg") == "any dog"


def test_a_name_with_dots_keeps_them(tmp_path):
    (tmp_path / "dog.v2.txt").write_text("a dog")
    assert read_caption(tmp_path / "dog.v2.png") == "a dog"
    assert read_caption(tmp_path / "dog.v3.png") is None


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"  a dog\r\non grass \n\n", "a dog on grass"),
        ("\ufeff犬 zwx\n".encode(), "犬 zwx"),
        (b"", ""),
        (b" \n", ""),
    ],
)
def test_a_caption_is_one_line_of_utf_8(tmp_path, content, caption):
    (tmp_path / "dog.txt").write_bytes(content)
    assert read_caption(tmp_path / "dog.png") == caption


def test_a_folder_of_that_name_is_no_caption(tmp_path):
    (tmp_path / "dog.txt").mkdir()
    assert read_caption(tmp_path / "dog.png") is None


@pytest.mark.parametrize("content", ["Hündin".encode("latin-1"), b"\x89PNG\r\n"])
def test_a_caption_in_another_encoding_is_refused_by_name(tmp_path, content):
    (tmp_path / "dog.txt").write_bytes(content)
    with pytest.raises(DbkitError, match=r"^the caption .*dog.txt is not UTF-8 text; save it again as UTF-8$"):
        read_caption(tmp_path / "dog.png")
