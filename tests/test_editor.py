"""The caption editor without a browser: fields are filled and buttons clicked from code, and the files looked at."""

import io

import ipywidgets as widgets
import pytest
from conftest import draw_photo
from PIL import Image

from dbkit import DbkitError
from dbkit.editor import PER_PAGE, SIDE, caption_editor


@pytest.fixture
def editor(photos):
    return caption_editor(photos)


@pytest.fixture
def many(tmp_path):
    """A folder of 30 images, of which the first has a caption."""
    folder = tmp_path / "many"
    for number in range(30):
        draw_photo(folder / f"{number:02}.png", size=(40, 40))
    (folder / "00.txt").write_text("the first\n", encoding="utf-8")
    return folder


def every(widget):
    """A widget and all below it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from every(child)


def read(folder, name):
    return (folder / name).read_text(encoding="utf-8")


def test_each_picture_stands_beside_its_text(editor):
    rows = editor._rows.children
    assert [[type(part) for part in every(row)] for row in rows] == 3 * [
        [widgets.HBox, widgets.HBox, widgets.Image, widgets.VBox, widgets.HTML, widgets.Textarea]
    ]
    assert [part.value for row in rows for part in every(row) if isinstance(part, widgets.Textarea)] == [
        "a crimson thing",
        "a gold thing",
        "a teal thing",
    ]
    assert "<b>teal.png</b>" in [part.value for part in every(rows[2]) if isinstance(part, widgets.HTML)]


def test_a_picture_is_a_small_whole_jpeg(tmp_path):
    draw_photo(tmp_path / "wide" / "wide.png", size=(800, 200))
    (picture,) = [part for part in every(caption_editor(tmp_path / "wide")) if isinstance(part, widgets.Image)]
    image = Image.open(io.BytesIO(picture.value))
    assert (picture.format, image.format, image.size) == ("jpeg", "JPEG", (SIDE, SIDE // 4))


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DbkitError, match="there are no images in"):
        caption_editor(tmp_path)


def test_opening_the_editor_writes_nothing(photos):
    before = sorted(path.name for path in photos.iterdir())
    caption_editor(photos)
    assert sorted(path.name for path in photos.iterdir()) == before


def test_a_changed_text_is_saved_at_once(editor, photos):
    assert not editor._boxes["teal.png"].continuous_update
    editor._boxes["teal.png"].value = "zwx thing"
    assert read(photos, "teal.txt") == "zwx thing\n"
    assert editor._message.value == "teal.png: saved"
    editor._boxes["teal.png"].value = " zwx  thing"
    assert editor._message.value == "teal.png: unchanged"


def test_a_text_is_replaced_in_all_captions_and_the_fields_show_it(editor, photos):
    editor._find.value, editor._replacement.value = "thing", "toy"
    editor._replace.click()
    assert editor._message.value == "3 texts changed"
    assert [read(photos, f"{name}.txt") for name in ("crimson", "gold", "teal")] == [
        "a crimson toy\n",
        "a gold toy\n",
        "a teal toy\n",
    ]
    assert editor._boxes["gold.png"].value == "a gold toy"
    editor._find.value = "gold"
    editor._replace.click()
    assert editor._message.value == "1 text changed"


def test_text_is_put_before_and_after_all_captions(editor, photos):
    editor._added.value = "zwx:"
    editor._before.click()
    editor._added.value = ", in the sun"
    editor._after.click()
    assert editor._message.value == "3 texts changed"
    assert read(photos, "teal.txt") == "zwx: a teal thing, in the sun\n"


def test_undo_takes_back_one_change_after_the_other(editor, photos):
    editor._boxes["teal.png"].value = "mine"
    editor._added.value = "zwx"
    editor._before.click()
    editor._undo.click()
    assert (editor._message.value, editor._boxes["teal.png"].value) == ("taken back: 3 texts changed", "mine")
    editor._undo.click()
    assert (editor._message.value, editor._boxes["teal.png"].value) == ("taken back: 1 text changed", "a teal thing")
    assert read(photos, "teal.txt") == "a teal thing\n"
    editor._undo.click()
    assert editor._message.value == "nothing to take back"


def test_a_mistake_is_said_in_red_and_changes_nothing(editor, photos):
    editor._replace.click()
    assert editor._message.value == (
        "<span style='color:crimson'>the text to find is empty; write what is to be replaced</span>"
    )
    editor._boxes["teal.png"].value = "mine"
    (photos / "teal.txt").write_text("<b>theirs</b>", encoding="utf-8")
    editor._undo.click()
    assert "color:crimson" in editor._message.value
    assert "someone changed teal.txt since" in editor._message.value
    assert read(photos, "teal.txt") == "<b>theirs</b>"
    assert editor._boxes["teal.png"].value == "<b>theirs</b>"


def test_a_text_that_cannot_be_saved_is_said_and_stays_in_its_field(editor, photos):
    (photos / "teal.txt").unlink()
    (photos / "teal.txt").mkdir()
    editor._boxes["teal.png"].value = "mine"
    assert "teal.txt cannot be written" in editor._message.value
    assert editor._boxes["teal.png"].value == "mine"


def click_after_all(editor):
    editor._added.value = "zwx"
    editor._after.click()


def write_in_a_field(editor):
    editor._boxes["teal.png"].value = "mine"


@pytest.mark.parametrize("change", [click_after_all, write_in_a_field, lambda editor: editor._undo.click()])
def test_of_a_folder_that_was_renamed_or_deleted_it_is_said_and_none_is_made(editor, photos, change):
    editor._boxes["gold.png"].value = "gold"
    photos.rename(photos.with_name("renamed"))
    change(editor)
    assert editor._message.value == (
        f"<span style='color:crimson'>no longer there: {photos}; nothing was changed, so run the cell again</span>"
    )
    assert not photos.exists()


@pytest.mark.parametrize("change", [click_after_all, write_in_a_field])
def test_a_picture_that_was_deleted_gets_no_text_and_it_is_said(editor, photos, change):
    (photos / "teal.png").unlink()
    (photos / "teal.txt").unlink()
    change(editor)
    assert "color:crimson" in editor._message.value
    assert "no longer there: teal.png; nothing was changed" in editor._message.value
    assert not (photos / "teal.txt").exists()
    assert read(photos, "gold.txt") == "a gold thing\n"


def test_the_other_pictures_of_a_page_are_edited_on(editor, photos):
    (photos / "teal.png").unlink()
    editor._boxes["gold.png"].value = "gold"
    assert editor._message.value == "gold.png: saved"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("long " * 30_000, "teal.txt is too long to be a caption; replace it or take it out"),
        ("half \ud83d", "teal.txt has half a character in it (&#x27;\\ud83d&#x27;); take it out"),
        ("a\0b", "teal.txt is not text; save it again as UTF-8"),
    ],
    ids=["long", "half", "zero"],
)
def test_a_text_that_could_not_be_read_again_is_not_saved(editor, photos, text, sentence):
    editor._boxes["teal.png"].value = text
    assert "color:crimson" in editor._message.value and sentence in editor._message.value
    assert read(photos, "teal.txt") == "a teal thing\n"
    editor._undo.click()
    assert editor._message.value == "nothing to take back"


def test_many_images_come_in_pages(many):
    editor = caption_editor(many)
    assert len(editor._rows.children) == PER_PAGE == 12
    assert editor._place.value == "1 to 12 of 30"
    assert (editor._previous.disabled, editor._next.disabled) == (True, False)
    editor._next.click()
    assert list(editor._boxes) == [f"{number}.png" for number in range(12, 24)]
    editor._next.click()
    assert editor._place.value == "25 to 30 of 30"
    assert (editor._previous.disabled, editor._next.disabled) == (False, True)
    editor._next.click()
    assert editor._place.value == "25 to 30 of 30"
    for _ in range(3):
        editor._previous.click()
    assert editor._place.value == "1 to 12 of 30"
    assert editor._boxes["00.png"].value == "the first"


def test_a_bulk_change_reaches_the_other_pages_and_stays_on_this_one(many):
    editor = caption_editor(many)
    editor._next.click()
    editor._added.value = "zwx"
    editor._before.click()
    assert editor._message.value == "30 texts changed"
    assert editor._place.value == "13 to 24 of 30"
    assert (read(many, "00.txt"), read(many, "29.txt")) == ("zwx the first\n", "zwx\n")


def test_the_widgets_of_a_page_are_closed_when_it_is_left(many):
    editor = caption_editor(many)
    left = list(every(editor._rows))[1:]
    assert len([part for part in left if part.comm is not None]) == 12 * 6
    editor._next.click()
    assert [part for part in left if part.comm is not None] == []
    assert len([part for part in every(editor) if isinstance(part, widgets.Image)]) == 12


def test_what_cannot_be_read_is_shown_with_its_reason_and_kept(photos):
    broken = "Hündin".encode("latin-1")
    (photos / "teal.txt").write_bytes(broken)
    (photos / "gold.png").write_bytes(b"no picture")
    editor = caption_editor(photos)
    red = [
        part.value for part in every(editor._rows) if isinstance(part, widgets.HTML) and "color:crimson" in part.value
    ]
    assert len(red) == 2
    assert "gold.png cannot be read as an image" in red[0]
    assert "teal.txt is not UTF-8 text" in red[1]
    editor._added.value = "zwx"
    editor._before.click()
    assert editor._message.value == "2 texts changed"
    assert (photos / "teal.txt").read_bytes() == broken
    editor._boxes["teal.png"].value = "Hündin"
    assert read(photos, "teal.txt") == "Hündin\n"
    # Taking it back shows the unreadable text as an empty field, which must not be saved.
    editor._undo.click()
    assert editor._boxes["teal.png"].value == ""
    assert (photos / "teal.txt").read_bytes() == broken


def test_names_and_texts_cannot_bring_markup_into_the_page(tmp_path):
    draw_photo(tmp_path / "odd" / "a&b.png")
    editor = caption_editor(tmp_path / "odd")
    assert "<b>a&amp;b.png</b>" in [part.value for part in every(editor._rows) if isinstance(part, widgets.HTML)]
    editor._boxes["a&b.png"].value = "x"
    assert editor._message.value == "a&amp;b.png: saved"
