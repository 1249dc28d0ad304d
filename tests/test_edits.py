"""Captions are edited on the disk, and every change can be taken back to the byte."""

import shutil

import pytest
from conftest import draw_photo

from dbkit import DbkitError, prepare_dataset
from dbkit.captions import read_caption
from dbkit.edits import Captions


def files(folder):
    """Every text file of a folder with its bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.txt"))}


@pytest.fixture
def captions(photos):
    return Captions(photos)


@pytest.fixture
def twins(tmp_path):
    """Two images of one stem that read the same text."""
    folder = tmp_path / "twins"
    for suffix in ("jpg", "png"):
        draw_photo(folder / f"dog.{suffix}")
    (folder / "dog.txt").write_bytes(b"a dog\n")
    return folder


def test_the_images_of_a_folder_are_listed_with_their_texts(captions, photos):
    (photos / "gold.txt").unlink()
    assert captions.names == ["crimson.png", "gold.png", "teal.png"]
    assert captions.image("teal.png") == photos / "teal.png"
    assert [captions.text(name) for name in captions.names] == ["a crimson thing", None, "a teal thing"]


def test_a_folder_without_images_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DbkitError, match=r"there are no images in .*; name the folder whose captions you want"):
            Captions(folder)


def test_an_image_that_is_not_there_is_named(captions):
    with pytest.raises(DbkitError, match=r"there is no image blue\.png in .*photos; take one of names"):
        captions.set("blue.png", "a blue thing")


def test_a_text_is_saved_at_once_on_one_line(captions, photos):
    assert captions.set("teal.png", "  zwx thing,\n teal ")
    assert (photos / "teal.txt").read_bytes() == b"zwx thing, teal\n"
    assert captions.text("teal.png") == "zwx thing, teal"


def test_what_someone_else_wrote_is_seen(captions, photos):
    (photos / "teal.txt").write_text("a new thing")
    assert captions.text("teal.png") == "a new thing"


@pytest.mark.parametrize("text", ["a teal thing", " a  teal\nthing"])
def test_the_same_text_is_no_change(captions, photos, text):
    before = files(photos)
    assert not captions.set("teal.png", text)
    assert files(photos) == before
    assert captions.undo() == 0


def test_a_new_text_goes_to_the_short_name_unless_two_images_share_it(captions, photos, twins):
    (photos / "gold.txt").unlink()
    captions.set("gold.png", "gold")
    assert files(photos)["gold.txt"] == b"gold\n"
    Captions(twins).set("dog.png", "a painted dog")
    assert files(twins) == {"dog.png.txt": b"a painted dog\n", "dog.txt": b"a dog\n"}
    assert Captions(twins).text("dog.jpg") == "a dog"


def test_a_text_that_names_its_image_exactly_is_the_one_that_changes(captions, photos):
    (photos / "teal.png.txt").write_text("exact")
    captions.set("teal.png", "new")
    assert files(photos)["teal.png.txt"] == b"new\n"
    assert files(photos)["teal.txt"] == b"a teal thing\n"


def test_names_that_differ_in_case_alone_share_a_text(tmp_path):
    draw_photo(tmp_path / "set" / "DOG.png")
    draw_photo(tmp_path / "set" / "dog.jpg")
    Captions(tmp_path / "set").set("DOG.png", "loud")
    assert list(files(tmp_path / "set")) == ["DOG.png.txt"]


def test_an_emptied_text_is_an_empty_file_and_stays_so(photos, tmp_path):
    prepared = tmp_path / "prepared"
    prepare_dataset(photos, prepared, resolution=32)
    assert Captions(prepared).set("teal.png", "")
    assert files(prepared)["teal.txt"] == b""
    # The photograph's own caption would be copied again if the file were gone.
    prepare_dataset(photos, prepared, resolution=32)
    assert read_caption(prepared / "teal.png") == ""


def test_emptying_what_has_no_text_makes_no_file(captions, photos):
    (photos / "gold.txt").unlink()
    assert not captions.set("gold.png", " ")
    assert "gold.txt" not in files(photos)


def test_emptying_one_of_two_images_leaves_the_other_its_text(twins):
    captions = Captions(twins)
    captions.set("dog.png", "")
    assert (captions.text("dog.png"), captions.text("dog.jpg")) == ("", "a dog")


def test_replacing_changes_the_whole_set_and_counts(captions):
    assert captions.replace("thing", "zwx toy") == 3
    assert captions.text("gold.png") == "a gold zwx toy"
    assert captions.replace("a t", "the t") == 1
    assert captions.replace("Thing", "x") == captions.replace("thing", "x") == 0


def test_what_is_found_is_plain_text(captions):
    captions.set("teal.png", "a (teal) thing. [1]")
    assert captions.replace("(teal) ", "") == 1
    assert captions.text("teal.png") == "a thing. [1]"
    assert captions.replace(".", "") == 1
    assert captions.replace("a.*", "x") == 0


def test_a_bulk_change_of_images_that_share_a_text_gives_each_its_own(twins):
    captions = Captions(twins)
    assert captions.replace("dog", "cat") == 2
    assert files(twins) == {"dog.jpg.txt": b"a cat\n", "dog.png.txt": b"a cat\n", "dog.txt": b"a dog\n"}
    assert captions.undo() == 2
    assert files(twins) == {"dog.txt": b"a dog\n"}


def test_text_is_added_before_or_after_all(captions, photos):
    (photos / "gold.txt").unlink()
    assert captions.add("photo of zwx:", before=True) == 3
    assert captions.add(", in the sun", before=False) == 3
    assert captions.add("today ", before=False) == 3
    assert captions.text("teal.png") == "photo of zwx: a teal thing, in the sun today"
    assert captions.text("gold.png") == "photo of zwx:, in the sun today"


def test_nothing_to_find_or_to_add_is_refused(captions):
    with pytest.raises(DbkitError, match=r"^the text to find is empty; write what is to be replaced$"):
        captions.replace("", "x")
    with pytest.raises(DbkitError, match=r"^the text to add is empty; write what is to stand before or after each"):
        captions.add(" ", before=True)


def test_undo_takes_back_change_after_change_to_the_byte(captions, photos):
    (photos / "gold.txt").unlink()
    (photos / "teal.txt").write_bytes("\ufeffa  Bär\r\n\r\n".encode())
    states = [files(photos)]
    changes = (
        lambda: captions.set("gold.png", "gold"),
        lambda: captions.set("teal.png", "a bear"),
        lambda: captions.replace("a ", "the "),
        lambda: captions.set("crimson.png", ""),
        lambda: captions.add("zwx", before=True),
    )
    for change in changes:
        assert change()
        states.append(files(photos))
    taken_back = []
    for state in reversed(states[:-1]):
        taken_back.append(captions.undo())
        assert files(photos) == state
    assert taken_back == [3, 1, 2, 1, 1]
    assert captions.undo() == 0


def test_undo_never_overwrites_what_someone_changed_meanwhile(captions, photos):
    first = files(photos)
    captions.set("gold.png", "gold")
    captions.replace("a ", "the ")
    (photos / "teal.txt").write_text("mine")
    with pytest.raises(DbkitError, match=r"^someone changed teal\.txt since; that stays, and nothing was taken back"):
        captions.undo()
    assert files(photos)["crimson.txt"] == b"the crimson thing\n"
    assert captions.undo() == 1
    assert captions.undo() == 1
    assert files(photos) == first | {"teal.txt": b"mine"}
    assert captions.undo() == 0


def test_a_text_that_someone_took_out_is_not_brought_back(captions, photos):
    captions.set("gold.png", "first")
    captions.set("gold.png", "gold")
    (photos / "gold.txt").unlink()
    for _ in range(2):
        with pytest.raises(DbkitError, match=r"^someone changed gold\.txt since; that stays"):
            captions.undo()
    assert captions.undo() == 0
    assert "gold.txt" not in files(photos)


def test_an_unreadable_text_stops_no_other_and_is_not_overwritten_unasked(captions, photos):
    broken = "Hündin".encode("latin-1")
    (photos / "teal.txt").write_bytes(broken)
    assert list(captions.unreadable) == ["teal.png"]
    assert "teal.txt is not UTF-8 text; save it again as UTF-8" in captions.unreadable["teal.png"]
    assert captions.replace("thing", "toy") == captions.add("zwx", before=True) == 2
    assert files(photos)["teal.txt"] == broken
    assert captions.set("teal.png", "Hündin")
    assert captions.unreadable == {}
    assert captions.text("teal.png") == "Hündin"
    captions.undo()
    assert files(photos)["teal.txt"] == broken


def test_where_one_text_cannot_be_written_none_is_changed(captions, photos):
    before = files(photos)
    # A folder in the way: it is no caption, and no file can take its name.
    (photos / "teal.txt").unlink()
    (photos / "teal.txt").mkdir()
    with pytest.raises(DbkitError, match=r"teal\.txt cannot be written \(.*\), so no text was changed; see what is in"):
        captions.add("zwx", before=True)
    (photos / "teal.txt").rmdir()
    assert files(photos) == {name: content for name, content in before.items() if name != "teal.txt"}
    assert captions.undo() == 0


def test_where_one_text_would_be_too_long_to_be_read_none_is_changed(captions, photos):
    captions.set("teal.png", "teal " * 19_000)
    before = files(photos)
    with pytest.raises(DbkitError, match=r"teal\.txt is too long to be a caption"):
        captions.add("zwx " * 2_000, before=True)
    assert files(photos) == before


def test_an_undo_that_cannot_be_written_may_be_tried_again(captions, photos):
    before = files(photos)
    captions.replace("thing", "toy")
    (photos / "teal.txt.partial").mkdir()
    with pytest.raises(DbkitError, match=r"teal\.txt cannot be written"):
        captions.undo()
    assert files(photos)["crimson.txt"] == b"a crimson toy\n"
    shutil.rmtree(photos / "teal.txt.partial")
    assert captions.undo() == 3
    assert files(photos) == before
