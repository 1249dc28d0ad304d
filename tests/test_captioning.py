"""Captions say what the picture shows, join what is there as asked, and are written once, whenever it is stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_tagger import save_tagger
from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

from dbkit import DbkitError
from dbkit.captioners import PINNED
from dbkit.captioning import RECORD, CaptionReport, caption_dataset
from dbkit.captions import read_caption
from dbkit.config import CaptionConfig
from dbkit.libraries import quiet
from dbkit.report import DatasetReport, Kept, write_report

RED = "red hair, ^_^, 1girl, (o)_(o)"  # 0.982, 0.924, 0.881, 0.818
BLUE = "blue sky, miku (vocaloid), 1girl"  # 0.982, 0.953, 0.881


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    return save_tagger(tmp_path_factory.mktemp("models") / "tagger")


# What the small BLIP is taught to say of each colour, and how often. Of lime the likeliest first word, "a", is not that
# of the likeliest sentence.
SAID = {
    "red": ["red"],
    "blue": ["a blue picture of the sea ' s waves"],
    "black": [""],
    "lime": ["a dog"] * 3 + ["a fox"] * 3 + ["the cat"] * 4,
}


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A folder with the real classes at small size, in the files of Salesforce/blip-image-captioning-base."""
    folder = tmp_path_factory.mktemp("models") / "blip"
    folder.mkdir()
    words = sorted({word for texts in SAID.values() for text in texts for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "processor_class": "BlipProcessor"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    half = [0.5, 0.5, 0.5]
    images = {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": half}
    images |= {"image_std": half, "do_normalize": True, "do_resize": True, "do_rescale": True, "do_convert_rgb": True}
    (folder / "preprocessor_config.json").write_text(json.dumps({**images, "processor_class": "BlipProcessor"}))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # As in the real model the start is a token that the tokenizer does not know.
    tokens = {"vocab_size": len(vocabulary) + 1, "bos_token_id": len(vocabulary), "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**shape, **tokens, "eos_token_id": 3, "encoder_hidden_size": 32, "max_position_embeddings": 90},
        vision_config={**shape, "image_size": 32, "patch_size": 16},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BlipForConditionalGeneration(config)
        teach(model, BlipProcessor.from_pretrained(folder), {word: n for n, word in enumerate(vocabulary)})
    with quiet():
        model.save_pretrained(folder)
    return folder


def teach(model, processor, numbers):
    """Train until the model says what SAID says, as often."""
    start, end = model.config.text_config.bos_token_id, model.config.text_config.sep_token_id
    pairs = [(colour, text) for colour, texts in SAID.items() for text in texts]
    pictures = [Image.new("RGB", (32, 32), colour) for colour, _ in pairs]
    pixels = processor(images=pictures, return_tensors="pt").pixel_values
    rows = [[start, *(numbers[word] for word in text.split()), end] for _, text in pairs]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(pixel_values=pixels, input_ids=tokens, attention_mask=(tokens > 0).long(), labels=labels).loss.backward()
        optimizer.step()


def paint(path, colour, size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two red pictures and a blue one; the second has a text."""
    paint(tmp_path / "data" / "a.png", "red")
    paint(tmp_path / "data" / "b.png", "red")
    paint(tmp_path / "data" / "c.jpg", "blue")
    (tmp_path / "data" / "b.txt").write_text("my own\n", encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def settings(folder, tagger):
    return {"folder": folder, "captioner": "tagger", "model": str(tagger), "device": "cpu"}


def texts(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def test_tags_follow_the_picture_from_the_likeliest_on_without_ratings(settings, folder):
    report = caption_dataset(CaptionConfig(**settings))
    assert report == CaptionReport(folder, {"a.png": RED, "c.jpg": BLUE}, ["b.png"], [], {})
    assert texts(folder) == {"a.txt": RED + "\n", "b.txt": "my own\n", "c.txt": BLUE + "\n"}
    assert [read_caption(folder / name) for name in ("a.png", "c.jpg")] == [RED, BLUE]


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (4000, 2000)])
def test_a_picture_is_made_square_with_white_and_not_stretched(settings, folder, size):
    paint(folder / "a.png", "red", size)
    # Half of the square is white then.
    assert "half white" in caption_dataset(**settings).written["a.png"].split(", ")
    assert "half white" not in RED


def test_a_very_long_picture_is_read_too(settings, folder):
    paint(folder / "a.png", "red", (3000, 1))
    assert "half white" in caption_dataset(**settings).written["a.png"]


def test_what_is_transparent_counts_as_white(settings, folder):
    Image.new("RGBA", (20, 20), (0, 0, 255, 0)).save(folder / "a.png")
    assert caption_dataset(**settings).written["a.png"].startswith("half white, white background")


@pytest.mark.parametrize(
    ("threshold", "caption"), [(0.35, RED), (0.85, "red hair, ^_^, 1girl"), (0.9, "red hair, ^_^"), (0.95, "red hair")]
)
def test_only_tags_as_probable_as_the_threshold_are_written(settings, threshold, caption):
    assert caption_dataset(**settings, threshold=threshold).written["a.png"] == caption


def test_a_tag_of_just_the_threshold_is_written(settings, tmp_path):
    settings["model"] = str(save_tagger(tmp_path / "model", tags=[("even", 0, (0, 0, 0), 0)]))
    assert caption_dataset(**settings, threshold=0.5).written["a.png"] == "even"


@pytest.mark.parametrize(
    ("blacklist", "caption"),
    [
        (("red_hair",), "^_^, 1girl, (o)_(o)"),
        (("Red Hair",), "^_^, 1girl, (o)_(o)"),
        ((" RED_HAIR ", "^_^"), "1girl, (o)_(o)"),
        (("1girl, red hair, ",), "^_^, (o)_(o)"),
        (("red",), RED),
    ],
)
def test_tags_of_the_blacklist_are_never_written(settings, blacklist, caption):
    assert caption_dataset(**settings, blacklist=blacklist).written["a.png"] == caption


def test_underscores_and_escapes_are_written_as_asked(settings):
    def captions(**changes):
        return list(caption_dataset(**settings, existing="replace", **changes).written.values())

    assert captions(underscores=True) == [RED.replace("d h", "d_h")] * 2 + ["blue_sky, miku_(vocaloid), 1girl"]
    escaped = RED.replace("(o)_(o)", r"\(o\)_\(o\)")
    assert captions(escape=True) == [escaped] * 2 + [r"blue sky, miku \(vocaloid\), 1girl"]


def test_underscores_stay_in_emoticons(settings, tmp_path):
    faces = ["^_^", ">_<", "o_o", "0_0", "u_u", ";_;", "._.", "+_-", "|_|", "||_||", "(o)_(o)", "<o>_<o>", "6_9"]
    words = {"long_hair": "long hair", "1990s_(style)": "1990s (style)", "x-ray_of_x": "x-ray of x", "v": "v"}
    words |= {"\u732b\u8033_x": "\u732b\u8033 x"}
    tags = [(tag, 0, (0, 0, 0), 3) for tag in (*faces, *words)]
    settings["model"] = str(save_tagger(tmp_path / "model", tags=tags))
    # Equally likely tags stay in the table's order.
    assert caption_dataset(**settings).written["a.png"].split(", ") == [*faces, *words.values()]


@pytest.mark.parametrize("existing", ["keep", "append", "prepend", "replace"])
def test_an_image_in_which_nothing_is_found_keeps_its_text(settings, folder, existing):
    report = caption_dataset(**settings, existing=existing, threshold=0.999, prefix="photo of zwx dog")
    assert report.without == (["a.png", "c.jpg"] if existing == "keep" else ["a.png", "b.png", "c.jpg"])
    assert report.written == {}
    assert texts(folder) == {"b.txt": "my own\n"}


@pytest.mark.parametrize(
    ("existing", "text"),
    [
        ("keep", "my own"),
        ("append", f"my own, zwx, {RED}"),
        ("prepend", f"zwx, {RED}, my own"),
        ("replace", f"zwx, {RED}"),
    ],
)
def test_an_existing_text_is_treated_as_asked(settings, folder, existing, text):
    for own in ("my own", "my  own\r\n", "my own,\n"):
        (folder / "b.txt").write_text(own, encoding="utf-8", newline="")
        report = caption_dataset(**settings, existing=existing, prefix="zwx, ")
        assert report.kept == (["b.png"] if existing == "keep" else [])
        assert read_caption(folder / "b.png").strip(",") == text
        assert texts(folder)["a.txt"] == f"zwx, {RED}\n"
        for path in (*folder.glob("*.txt"), folder / RECORD):
            path.unlink()


def test_an_empty_text_is_no_text(settings, folder):
    (folder / "b.txt").write_text(" \n")
    assert caption_dataset(**settings).written["b.png"] == RED


def test_texts_are_utf8(settings, folder):
    (folder / "b.txt").write_text("Käse", encoding="utf-16")
    caption_dataset(**settings, existing="append", prefix="\u732b")
    assert (folder / "b.txt").read_bytes() == f"Käse, \u732b, {RED}\n".encode()


def test_the_file_that_is_there_is_written(settings, folder):
    (folder / "b.txt").rename(folder / "b.png.txt")
    caption_dataset(**settings, existing="append")
    assert texts(folder) == {"a.txt": RED + "\n", "b.png.txt": f"my own, {RED}\n", "c.txt": BLUE + "\n"}


def test_images_that_share_a_name_get_a_text_each(settings, folder):
    paint(folder / "a.jpg", "blue")
    paint(folder / "b.webp", "blue")
    paint(folder / "c.jpg.png", "red")
    report = caption_dataset(**settings, existing="append")
    found = texts(folder)
    # b.txt is the text of both images, and from now on of neither.
    assert found == {
        "a.jpg.txt": BLUE + "\n",
        "a.png.txt": RED + "\n",
        "b.png.txt": f"my own, {RED}\n",
        "b.txt": "my own\n",
        "b.webp.txt": f"my own, {BLUE}\n",
        "c.jpg.png.txt": RED + "\n",
        "c.txt": BLUE + "\n",
    }
    assert {name: read_caption(folder / name) for name in report.written} == report.written
    assert caption_dataset(**settings, existing="append").written == {}
    assert texts(folder) == found


@pytest.mark.parametrize("existing", ["keep", "append", "prepend", "replace"])
def test_a_second_run_with_the_same_settings_changes_nothing(settings, folder, existing):
    caption_dataset(**settings, existing=existing)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    report = caption_dataset(**settings, existing=existing, batch_size=1)
    assert (report.written, report.kept) == ({}, ["a.png", "b.png", "c.jpg"])
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_new_image_is_captioned_and_the_others_stay(settings, folder):
    caption_dataset(**settings, existing="append")
    before = texts(folder)
    paint(folder / "d.png", "blue")
    assert caption_dataset(**settings, existing="append").written == {"d.png": BLUE}
    assert texts(folder) == before | {"d.txt": BLUE + "\n"}


@pytest.mark.parametrize(
    "changes", [{"threshold": 0.9}, {"blacklist": ("1girl",)}, {"underscores": True}, {"escape": True}, {"prefix": "x"}]
)
def test_other_settings_are_other_captions(settings, folder, changes):
    caption_dataset(**settings, existing="replace")
    assert set(caption_dataset(**settings, existing="replace", **changes).written) == {"a.png", "b.png", "c.jpg"}


def test_a_blacklist_in_another_spelling_is_the_same_settings(settings):
    caption_dataset(**settings, existing="append", blacklist=("1girl", "red_hair"))
    assert caption_dataset(**settings, existing="append", blacklist=("Red Hair, 1girl",)).written == {}


def test_settings_write_into_a_text_once_whatever_others_added(settings, folder):
    other = {**settings, "existing": "append", "threshold": 0.95, "prefix": "other"}
    for _ in range(2):
        caption_dataset(**settings, existing="append")
        caption_dataset(**other)
        caption_dataset(**settings, existing="prepend")
        caption_dataset(**settings)
        assert texts(folder)["b.txt"] == f"my own, {RED}, other, red hair\n"
        assert texts(folder)["c.txt"] == f"{BLUE}, other, blue sky, miku (vocaloid)\n"


def test_replacing_what_was_appended_leaves_the_caption_alone(settings, folder):
    caption_dataset(**settings, existing="append")
    report = caption_dataset(**settings, existing="replace")
    assert (report.written, report.kept) == ({"b.png": RED}, ["a.png", "c.jpg"])
    assert texts(folder)["b.txt"] == RED + "\n"


@pytest.mark.parametrize("existing", ["append", "replace"])
def test_a_caption_that_was_edited_stays_and_an_emptied_one_is_written_anew(settings, folder, existing):
    caption_dataset(**settings, existing=existing)
    (folder / "a.txt").write_text("my words", encoding="utf-8")
    (folder / "b.txt").write_text("", encoding="utf-8")
    (folder / "c.txt").unlink()
    assert caption_dataset(**settings, existing=existing).written == {"b.png": RED, "c.jpg": BLUE}
    assert texts(folder)["a.txt"] == "my words"


def test_a_text_put_back_is_written_into_again(settings, folder):
    caption_dataset(**settings, existing="append")
    (folder / "b.txt").write_text("my own", encoding="utf-8")
    assert caption_dataset(**settings, existing="append").written == {"b.png": f"my own, {RED}"}


@pytest.mark.parametrize("existing", ["keep", "append", "prepend", "replace"])
def test_stopped_at_any_moment_it_ends_as_if_it_had_not_been(settings, tmp_path, monkeypatch, existing):
    def fresh(name):
        for image, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
            paint(tmp_path / name / image, colour)
        (tmp_path / name / "b.txt").write_text("my own\n", encoding="utf-8")
        return {**settings, "folder": tmp_path / name, "existing": existing, "batch_size": 2}

    real, calls, last = os.fsync, [], 10**6

    def fsync(handle):
        calls.append(handle)
        if len(calls) > last:
            raise KeyboardInterrupt
        real(handle)

    # Called before and after each file takes its name.
    monkeypatch.setattr(os, "fsync", fsync)
    caption_dataset(**fresh("straight"))
    expected, moments = texts(tmp_path / "straight"), len(calls)
    assert moments >= 4
    for last in range(moments):
        calls.clear()
        stopped = fresh(f"stopped{last}")
        with pytest.raises(KeyboardInterrupt):
            caption_dataset(**stopped)
        calls, last = [], 10**6
        caption_dataset(**stopped)
        assert texts(stopped["folder"]) == expected


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_goes_on_where_it_was(settings, folder):
    settings |= {"existing": "append", "batch_size": 1}
    # The second text's second call: it is in its temporary file, and the record says what it will be.
    code = f"""
import os, pathlib, signal
from dbkit.captioning import caption_dataset
real, calls = os.fsync, []
def fsync(handle):
    calls.append(handle)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
caption_dataset(**{ {**settings, "folder": str(folder)} })
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert texts(folder) == {"a.txt": RED + "\n", "b.txt": "my own\n"}
    # Another process may be writing the same, so each has a name of its own for it; what is left is no caption.
    left = list(folder.glob("*.partial"))
    assert [path.name.split(".")[:2] for path in left] == [["b", "txt"]]
    report = caption_dataset(**settings)
    assert report.kept == ["a.png"]
    assert report.written == {"b.png": f"my own, {RED}", "c.jpg": BLUE}
    assert texts(folder) == {"a.txt": RED + "\n", "b.txt": f"my own, {RED}\n", "c.txt": BLUE + "\n"}
    assert list(folder.glob("*.partial")) == left


def test_what_cannot_be_read_is_named_and_stops_nothing(settings, folder):
    (folder / "a.png").write_bytes(b"not a picture")
    (folder / "b.txt").write_bytes(b"\xff\x00\xfe")
    (folder / "e.psd").write_bytes(b"")
    report = caption_dataset(**settings, existing="append")
    assert report.written == {"c.jpg": BLUE}
    assert list(report.refused) == ["e.psd", "b.png", "a.png"]
    assert "a.png cannot be read as an image" in report.refused["a.png"]
    assert "b.txt is not UTF-8 text; save it again as UTF-8" in report.refused["b.png"]
    assert "e.psd is of a kind that dbkit does not read" in report.refused["e.psd"]
    assert (folder / "b.txt").read_bytes() == b"\xff\x00\xfe"
    (folder / "c.jpg").write_bytes(b"")
    assert caption_dataset(**settings, existing="replace").written == {}


def test_the_report_says_what_happened(settings, folder):
    for number in range(7):
        paint(folder / f"d{number}.png", "black")
    (folder / "a.png").write_bytes(b"")
    report = caption_dataset(**settings, threshold=0.9)
    lines = str(report).splitlines()
    assert lines[0] == f"1 caption written, 1 kept, 7 without, 1 refused: {folder}"
    assert lines[1] == "  c.jpg: blue sky, miku (vocaloid)"
    assert lines[2] == "  kept: b.png; empty a text to have it written anew"
    assert lines[3] == (
        "  nothing was found in d0.png, d1.png, d2.png, d3.png, d4.png and 2 more; their texts are as they were"
    )
    assert lines[4].startswith("  refused: a.png cannot be read as an image")
    assert len(lines) == 5


def test_progress_goes_to_the_output(settings, capsys):
    caption_dataset(**settings)
    printed = capsys.readouterr()
    assert "captions: 100%" in printed.out and "2/2" in printed.out
    assert printed.err == ""


def test_no_image_is_said_before_anything_is_loaded(tmp_path):
    settings = {"captioner": "tagger", "model": str(tmp_path / "no such model")}
    with pytest.raises(DbkitError, match=r"^folder .*nowhere is not a folder; check the path, or make it with"):
        caption_dataset(tmp_path / "nowhere", **settings)
    (tmp_path / "data").mkdir()
    with pytest.raises(DbkitError, match=r"^there are no images in folder .*data; put your pictures there$"):
        caption_dataset(tmp_path / "data", **settings)
    (tmp_path / "data" / "x.psd").write_bytes(b"")
    with pytest.raises(DbkitError, match=r"^there are no images in folder .*; x.psd is of a kind that dbkit does not"):
        caption_dataset(tmp_path / "data", **settings)
    (tmp_path / "data" / "x.psd").unlink()
    paint(tmp_path / "data" / "below" / "a.png", "red")
    with pytest.raises(DbkitError, match=r"; there are some in .*below: name that folder$"):
        caption_dataset(tmp_path / "data", **settings)


@pytest.mark.parametrize("captioner", ["blip", "tagger"])
def test_where_every_image_has_a_text_no_model_is_needed(folder, captioner):
    for name in "ac":
        (folder / f"{name}.txt").write_text("a text")
    report = caption_dataset(folder, captioner=captioner, model="no/model")
    assert report.kept == ["a.png", "b.png", "c.jpg"]
    assert not (folder / RECORD).exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {}, "images": {"a.png": {"now": {}}}}'])
def test_a_damaged_record_is_said(settings, folder, content):
    (folder / RECORD).write_text(content)
    with pytest.raises(
        DbkitError, match=r"\.captions\.json is damaged or not dbkit's \(.+\); delete it, and every text"
    ):
        caption_dataset(**settings)
    assert (folder / RECORD).read_text() == content


def test_the_record_says_what_wrote_a_text(settings, folder):
    caption_dataset(**settings, existing="append", blacklist=("X y",))
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    [(key, facts)] = record["settings"].items()
    assert facts == {
        "captioner": "tagger",
        "model": settings["model"],
        "prefix": "",
        "threshold": 0.35,
        "underscores": False,
        "escape": False,
        "blacklist": ["x_y"],
    }
    assert record["images"]["b.png"] == {
        "before": {"text": "my own", "by": ["own"]},
        "now": {"text": f"my own, {RED}", "by": ["own", key]},
    }


def test_without_onnxruntime_the_tagger_says_what_to_install(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DbkitError, match=r"needs onnxruntime, .*; pip install onnxruntime$"):
        caption_dataset(**settings)


def without_file(folder, name):
    (folder / name).unlink()


def with_content(folder, name, content):
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda model: without_file(model, "model.onnx"), r"cannot be loaded \(model.onnx is missing\); copy"),
        (lambda model: without_file(model, "selected_tags.csv"), r"cannot be loaded \(selected_tags.csv is missing\)"),
        (lambda model: with_content(model, "model.onnx", b"no model"), r"cannot be loaded \(.*failed.*\); copy"),
        (
            lambda model: with_content(model, "selected_tags.csv", b"name,count\nx,1\n"),
            r"cannot be loaded \(selected_tags.csv has no column category\)",
        ),
        (
            lambda model: with_content(model, "selected_tags.csv", b"tag_id,name,category,count\n0,x,0,1\n"),
            r"model.onnx of .* knows 11 tags and selected_tags.csv 1; take both from one place",
        ),
        (lambda model: save_tagger(model, side="S"), r"takes \['S', 'S', 3\] and not squares in BGR; give a wd tagger"),
    ],
)
def test_a_model_that_is_no_tagger_is_refused(settings, tmp_path, harm, sentence):
    model = save_tagger(tmp_path / "model")
    harm(model)
    with pytest.raises(DbkitError, match=sentence):
        caption_dataset(**{**settings, "model": str(model)})


@pytest.mark.parametrize("form", [{"side": 12}, {"count": 1}])
def test_the_model_says_how_large_its_pictures_are_and_how_many(settings, folder, tmp_path, form):
    paint(folder / "a.png", "red", (40, 20))
    settings["model"] = str(save_tagger(tmp_path / "model", **form))
    assert caption_dataset(**settings).written["c.jpg"] == BLUE
    assert "half white" in texts(folder)["a.txt"]


def unreachable(*_):
    raise OSError("name or service not known")


def cache(monkeypatch, tmp_path, captioner, model):
    """A Hub's cache that holds a model at the commit that dbkit takes, and nothing else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    # Older versions of transformers keep the place in a variable of their own.
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    name, revision = PINNED[captioner]
    place = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / revision
    shutil.copytree(model, place)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("captioner", ["blip", "tagger"])
def test_a_pinned_model_that_was_loaded_once_needs_no_network(
    folder, request, monkeypatch, tmp_path, captioner, offline
):
    cache(monkeypatch, tmp_path, captioner, request.getfixturevalue(captioner))
    # Either the user says that there is no network, or it is found to be gone.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    report = caption_dataset(folder, captioner=captioner, device="cpu")
    assert report.written["a.png"] == {"tagger": RED, "blip": "red"}[captioner]
    facts = json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
    assert [fact["model"] for fact in facts.values()] == ["@".join(PINNED[captioner])]


@pytest.mark.parametrize("captioner", ["blip", "tagger"])
def test_a_model_that_cannot_be_had_is_said(folder, monkeypatch, tmp_path, captioner):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("urllib.request.getproxies", dict)
    name = PINNED[captioner][0]
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(
            DbkitError, match=f"^the model {name} is not on this machine and Hugging Face cannot be reached"
        ):
            caption_dataset(folder, captioner=captioner, device="cpu")
    assert texts(folder) == {"b.txt": "my own\n"}


@pytest.fixture
def colours(tmp_path):
    for colour in SAID:
        paint(tmp_path / "colours" / f"{colour}.png", colour, (40, 20))
    return tmp_path / "colours"


def test_blip_says_what_it_sees_and_no_more(blip, colours):
    report = caption_dataset(colours, model=str(blip), device="cpu")
    assert report.written == {
        # As people write it, and not as the tokenizer cuts it.
        "blue.png": "a blue picture of the sea's waves",
        "lime.png": "the cat",
        # No least length makes a sentence of this word.
        "red.png": "red",
    }
    assert report.without == ["black.png"]
    assert texts(colours) == {f"{name[:-4]}.txt": text + "\n" for name, text in report.written.items()}


def test_more_beams_find_the_likelier_sentence(blip, colours):
    def said(beams):
        return caption_dataset(colours, model=str(blip), num_beams=beams, existing="replace").written["lime.png"]

    assert said(1) in ("a dog", "a fox")
    assert said(2) == said(3) == "the cat"


def test_a_sentence_ends_at_the_asked_length(blip, colours):
    report = caption_dataset(colours, model=str(blip), max_new_tokens=3, device="cpu")
    assert report.written["blue.png"] == "a blue picture"


@pytest.mark.parametrize("size", [1, 3, 64])
def test_sentences_do_not_depend_on_the_batch(blip, colours, size):
    report = caption_dataset(colours, model=str(blip), batch_size=size, device="cpu", prefix="photo of zwx")
    assert report.written == {
        "blue.png": "photo of zwx, a blue picture of the sea's waves",
        "lime.png": "photo of zwx, the cat",
        "red.png": "photo of zwx, red",
    }


def test_a_sentence_and_then_tags(blip, folder, settings):
    for _ in range(2):
        caption_dataset(folder, model=str(blip), device="cpu")
        caption_dataset(**settings, existing="append")
        assert texts(folder) == {
            "a.txt": f"red, {RED}\n",
            "b.txt": f"my own, {RED}\n",
            "c.txt": f"a blue picture of the sea's waves, {BLUE}\n",
        }


def test_another_kind_of_model_is_refused(folder, model, tmp_path):
    with pytest.raises(DbkitError, match=r"^the model .* is CLIPTextModel; give one that is BlipForConditionalGenera"):
        caption_dataset(folder, model=str(model / "text_encoder"), device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DbkitError, match=r"^the model .*empty (is of an unknown kind; give|cannot be loaded \()"):
        caption_dataset(folder, model=str(tmp_path / "empty"), device="cpu")


def test_without_a_captioner_nothing_is_written_and_that_is_said(folder):
    before = texts(folder)
    report = caption_dataset(folder, captioner="none", existing="replace")
    assert texts(folder) == before and not (folder / RECORD).exists()
    assert str(report) == f"no captioner is chosen, so all texts are as they were: {folder}"


def test_a_text_written_while_it_runs_is_left_alone(settings, folder, monkeypatch):
    # Someone types a caption for the last image while the first is on its way to the disk.
    last = sorted(path.name for path in folder.iterdir() if path.suffix != ".txt")[-1]
    fsync = os.fsync

    def typed(handle):
        (folder / last).with_suffix(".txt").write_text("typed by hand")
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", typed)
    report = caption_dataset(**settings, batch_size=1, existing="replace")
    assert texts(folder)[f"{Path(last).stem}.txt"].strip() == "typed by hand"
    assert last in report.kept and last not in report.written


def test_a_background_gets_no_caption_of_the_subject(settings, folder):
    name = sorted(path.name for path in folder.iterdir() if path.suffix == ".png")[0]
    kept = [Kept(name, "photo.jpg", 40, 30, 1.0, False, None, "", part="background")]
    write_report(DatasetReport(folder, kept, {}), 32)
    report = caption_dataset(**settings, existing="replace", prefix="photo of zwx man")
    assert name in report.kept and name not in report.written
