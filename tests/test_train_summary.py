"""The summary under the form of training, and the thread that finds it out."""

import html
import itertools
import json
import re
import shutil
import threading
import types

import huggingface_hub
import psutil
import pytest
from conftest import draw_photo

from dbkit import TrainConfig, embedded, train
from dbkit.memory import STABLE_DIFFUSION_1
from dbkit.plan import Where, estimate
from dbkit.settings import replace
from dbkit.train_summary import MOST_PICTURES, Background, summarize


def last(config):
    """The whole summary, as text with HTML around it."""
    *_, text = summarize(config)
    return html.unescape(text)


def test_it_grows_and_ends_whole(config, capsys):
    texts = [html.unescape(text) for text in summarize(config)]
    assert all(text.endswith("<p>…</p>") for text in texts[:-1]) and texts[-1].endswith("</table>")
    rows = [text.removesuffix("<p>…</p>").removesuffix("</table>") for text in texts]
    assert all(after.startswith(before) for before, after in itertools.pairwise(rows))
    assert "3 instance images; the first one's prompt: photo of zwx thing" in texts[0] and "memory" not in texts[0]
    assert "2 steps x 1 image = 2 samples: each of 3 instance images is seen 0.667 times on average" in texts[-1]
    assert "trained as 3 of 64 x 64; the crops keep 83% of the pictures" in texts[-1]
    assert "it fits" in texts[-1] and "<b>disk</b>" in texts[-1]
    assert "how long a step takes is known after the first steps" in texts[-1]
    assert capsys.readouterr() == ("", "")


def test_the_prompts_of_images_and_previews_are_said(config, photos):
    said = last(replace(config, instance_prompt=None, use_txt_as_label=True, auto_test_model=True, test_prompt="<zwx>"))
    assert "crimson.png: a crimson thing" in said or "the first one's prompt: a crimson thing" in said
    assert "<b>previews of</b></td><td><zwx></td>" in said
    assert "previews of" not in last(config)


def test_nothing_is_written_and_no_weights_are_read(config, copied, tmp_path):
    for path in copied.rglob("*.safetensors"):
        path.write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    assert "it fits" in last(replace(config, pretrained_model_name_or_path=str(copied)))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_auto_chooses_is_said_with_its_reason(settings):
    given = {name: value for name, value in settings.items() if name not in ("max_train_steps", "learning_rate")}
    said = last(TrainConfig(**given, auto=True))
    assert "<b>chosen</b>" in said and "max_train_steps 400: " in said
    assert "400 steps x " in said


def test_how_the_model_reads_the_prompts_is_said_in_the_words_of_training(config, prior, capsys):
    config = replace(config, **prior | {"class_prompt": "photo of a thing, " + "z" * 90}, instance_prompt="Bella thing")
    (said,) = re.findall(r"<b>prompts</b></td><td>(.*?)</td>", last(config))
    lines = said.split("<br>")
    assert lines[0].startswith("identifier: Bella, 5 tokens (")
    assert any("choose a rare word that is one token" in line for line in lines)
    assert any(re.match(r"cut after 75 of \d+ tokens: photo of a thing, zzz", line) for line in lines)
    train(config, max_train_steps=1)
    assert said.replace("<br>", "\n") in capsys.readouterr().out


def test_another_tokenizer_is_the_one_that_is_asked(config, prior):
    said = last(replace(config, **prior, tokenizer_name=str(embedded.MODEL / "tokenizer")))
    assert "<b>prompts</b></td><td>identifier: zwx, one token (zwx)<br>the first prompt has " in said


def test_a_mistake_is_the_last_row(config, photos, tmp_path):
    (photos / "teal.png").write_bytes(b"torn")
    said = last(config)
    assert (
        "2 samples" in said
        and "<b>to be changed</b></td><td><span style='color:crimson'>1 of 3 images are not usable: " in said
    )
    said = last(replace(config, instance_data_dir=tmp_path / "nowhere"))
    assert "is not a folder; check the path" in said


def test_a_run_that_these_settings_do_not_continue_is_said_before_it_is_trained(config):
    train(config, max_train_steps=1)
    assert "to be changed" not in last(config)
    other = replace(config, instance_prompt="photo of zwx dog", resolution=128)
    said = last(other)
    assert "holds a run of 1 step that these settings do not continue: " in said and "resolution was 64" in said
    said = last(replace(other, start_over=True))
    assert "to be changed" not in said and "resolution is 128, but this model draws pictures of 64 px" in said
    assert f"<b>starts over</b></td><td>the run in {config.output_dir} (1 step) is moved aside<" in said


def test_of_a_finished_run_it_says_that_it_is_finished_and_of_none_that_it_starts_over(config):
    assert "starts over" not in last(replace(config, start_over=True))
    train(config)
    said = last(config)
    assert "<b>finished</b></td><td>all 2 steps are done; to train further, raise max_train_steps<" in said
    assert "<b>time</b>" not in said and "starts over" not in said
    assert "<b>goes on</b></td><td>after step 2, which is saved<" in last(replace(config, max_train_steps=3))


def test_a_run_that_start_over_began_is_not_said_to_be_moved_aside(config, photos):
    over = replace(config, start_over=True)
    train(over, max_train_steps=1)
    said = last(over)
    assert "<b>goes on</b></td><td>after step 1, which is saved; start_over was done already<" in said
    assert "starts over" not in said
    # Other pictures are another run.
    draw_photo(photos / "teal.png", colour="navy")
    said = last(over)
    assert "<b>starts over</b></td><td>the run in " in said and "to be changed" not in said and "goes on" not in said


def test_on_a_new_machine_what_auto_chose_is_known_from_the_runs_home(config, settings, tmp_path):
    given = {name: value for name, value in settings.items() if name != "train_batch_size"}
    # What another machine chose.
    train(**given | {"train_batch_size": 5, "max_train_steps": 1})
    said = last(TrainConfig(**given, auto=True, local_dir=tmp_path / "new machine"))
    assert "goes on with" in said and "train_batch_size 5" in said and "to be changed" not in said
    # Native training has none.
    assert "num_class_images" not in said


def test_what_would_make_it_fit_is_said_where_it_does_not(config, monkeypatch):
    large = replace(config, resolution=256, train_batch_size=8)
    free = estimate(large, Where.of(large), search=False).peak.total - psutil.Process().memory_info().rss
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=free))
    said = last(large)
    assert "it does not fit" in said and "<b>it fits with</b></td><td>gradient_checkpointing on (saves " in said
    assert "dbkit plan says" not in said


def test_settings_that_are_not_right_have_no_summary():
    assert list(summarize(None)) == [""]


def test_many_pictures_are_left_for_the_training_to_look_at(config, photos):
    first = draw_photo(photos / "0.png")
    for number in range(1, MOST_PICTURES):
        shutil.copy(first, photos / f"{number}.png")
    said = last(config)
    count = MOST_PICTURES + 3
    assert f"{count} instance images" in said
    assert f"{count} pictures, which are looked at when training starts" in said and "the crops keep" not in said


def test_of_a_hub_model_only_what_lies_here_is_read(config, tmp_path, monkeypatch):
    # Were it asked, the Hub would not be found at this address, and that would be said.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = replace(config, pretrained_model_name_or_path="ada/small")
    said = last(hub)
    assert "2 samples" in said and "<b>prompts</b>" not in said
    assert (
        "not known yet: text_encoder/config.json of ada/small is not on this machine yet; dbkit.plan() downloads it"
        in said
    )
    cached = tmp_path / "hub" / "models--ada--small"
    for part, settings in STABLE_DIFFUSION_1.items():
        path = cached / "snapshots" / ("0" * 40) / part / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert "<b>memory, CPU</b>" in last(hub) and "<b>prompts</b>" not in last(hub)
    shutil.copytree(embedded.MODEL / "tokenizer", cached / "snapshots" / ("0" * 40) / "tokenizer")
    assert "<b>prompts</b></td><td>the first prompt has " in last(hub)


def test_a_folder_that_the_workspace_lacks_is_no_hub_model_that_is_not_here_yet(config):
    said = last(replace(config, pretrained_model_name_or_path="models/sd15"))
    assert "<b>to be changed</b></td><td><span style='color:crimson'>there is no model folder models/sd15" in said
    assert "dbkit.plan() downloads it" not in said


def test_a_mistake_of_the_program_is_shown_and_not_lost(config):
    assert "<b>not known</b></td><td>AttributeError: " in last(dataclass_without_prompts(config))


def dataclass_without_prompts(config):
    class Torn:
        device = config.device
        output_dir = config.output_dir

    return Torn()


@pytest.fixture
def stage():
    """A background whose steps wait to be let through, and what it has shown."""
    shown, through, begun = [], threading.Semaphore(0), threading.Semaphore(0)

    def steps(value):
        for number in range(2):
            begun.release()
            assert through.acquire(timeout=60)
            yield f"{value}{number}"

    return Background(steps), shown, through, begun


def test_steps_are_shown_one_after_the_other_and_no_thread_stays(stage):
    background, shown, through, _ = stage
    background.give("a", shown.append)
    through.release(2)
    background.finish()
    assert shown == ["a0", "a1"]
    background.give("b", shown.append)
    through.release(2)
    background.finish()
    assert shown == ["a0", "a1", "b0", "b1"]


def test_what_a_newer_value_overtakes_is_not_shown_and_of_several_the_last_counts(stage):
    background, shown, through, begun = stage
    background.give("a", shown.append)
    assert begun.acquire(timeout=60)
    background.give("b", shown.append)
    background.give("c", shown.append)
    through.release(3)
    background.finish()
    assert shown == ["c0", "c1"]


def test_who_gave_the_last_value_is_shown_its_text_and_who_gave_it_before_no_more(stage):
    background, shown, through, begun = stage
    later = []
    background.give("a", shown.append)
    assert begun.acquire(timeout=60)
    background.give("b", later.append)
    through.release(3)
    background.finish()
    assert (shown, later) == ([], ["b0", "b1"])


def test_without_a_value_there_is_nothing_to_wait_for(stage):
    background, shown, _, _ = stage
    background.finish()
    assert shown == []
