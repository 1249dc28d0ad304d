"""The figures mean what they say: on the instance images themselves, on pictures of other things, and on none."""

import pytest
import torch
from PIL import Image

from dbkit import DbkitError, EvaluateConfig, embedded, evaluate
from dbkit.evaluate import Clip, Dino, Figures, _default_prompts, _measure, without_identifier
from dbkit.images import list_images, read_image, render

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip():
    return Clip(embedded.CLIP, CPU)


@pytest.fixture(scope="module")
def dino():
    return Dino(embedded.DINO, CPU)


def sample_set(name):
    paths = list_images(embedded.data_templates() / name)
    return [render(read_image(path), (embedded.RESOLUTION,) * 2) for path in paths]


def test_a_subject_is_likest_to_itself_whatever_is_behind_it(clip, dino):
    sets = {name: sample_set(name) for name in ("poodle", "clownfish", "racer")}
    for name, pictures in sets.items():
        features = dino(pictures)
        own = (features @ features.T)[~torch.eye(len(features), dtype=bool)].mean()
        others = [dino(other) for key, other in sets.items() if key != name]
        assert own > max((features @ other.T).mean() for other in others) + 0.2


def test_the_instance_images_as_samples_have_the_highest_fidelity_and_one_picture_many_times_no_variety(clip, dino):
    poodle, racer = sample_set("poodle"), sample_set("racer")
    texts = ["a photo of a dog on the beach"]
    best = _measure((poodle, [poodle[0]] * 5), poodle, texts, clip, dino)
    worst = _measure((racer, racer), poodle, texts, clip, dino)
    assert best.subject_fidelity > worst.subject_fidelity + 0.3
    assert best.subject_fidelity_clip > worst.subject_fidelity_clip
    assert best.prompt_match is None  # of one prompt there is nothing to match
    assert best.class_diversity == pytest.approx(0, abs=1e-5)
    assert worst.class_diversity > 0.01
    assert best.class_leak > worst.class_leak + 0.3


def test_pictures_match_the_prompts_that_name_their_settings(clip, dino):
    pictures = sample_set("poodle")
    places = [path.stem.split("_")[1] for path in list_images(embedded.data_templates() / "poodle")]
    said = {"beach": "on the beach", "city": "in the city", "grass": "on the grass", "room": "in a room",
            "sunset": "at sunset"}  # fmt: skip
    texts = [f"a photo of a dog {said[place]}" for place in places]
    right = _measure((pictures, []), pictures, texts, clip, dino)
    wrong = _measure((pictures[1:] + pictures[:1], []), pictures, texts, clip, dino)
    assert right.prompt_match == 1
    assert wrong.prompt_match == 0
    assert right.prompt_fidelity > wrong.prompt_fidelity
    assert right.class_leak is right.class_diversity is None
    # Two prompts that say the same are one: no picture can be told to fit the other.
    twice = _measure((pictures + pictures, pictures[:1]), pictures, texts + texts, clip, dino)
    assert twice.prompt_match == 1
    assert twice.class_diversity is None and twice.class_leak is not None


def test_clips_text_does_not_name_the_identifier():
    def without(prompt):
        return without_identifier(prompt, "photo of zwx dog", "photo of a dog")

    assert without("photo of zwx dog in space") == "photo of a dog in space"
    assert without("a red zwx dog") == "a red dog"
    assert without("photo of a dog") == "photo of a dog"
    assert without_identifier("a house in zwx style", None, None) == "a house in zwx style"


def test_a_model_compared_with_itself_has_drifted_nowhere(tmp_path):
    made = evaluate(
        embedded.MODEL,
        pretrained_model_name_or_path=str(embedded.MODEL),
        instance_data_dir=embedded.data_templates() / "poodle",
        instance_prompt="photo of zwx dog",
        class_prompt="photo of a dog",
        num_per_prompt=1,
        num_inference_steps=4,
        output=tmp_path / "grid.png",
        device="cpu",
    )
    assert made.base == made.model
    assert Image.open(made.grid).width > 2 * embedded.RESOLUTION
    table = str(made).splitlines()
    assert len(table) == len(Figures.__dataclass_fields__) + 2
    assert table[-1] == f"before and after: {made.grid}"
    shown = made._repr_html_()
    assert table[0] in shown and shown.count("data:image/jpeg;base64,") == 1


def test_what_is_left_empty_comes_from_the_run_and_its_absence_is_said(tmp_path, model):
    with pytest.raises(
        DbkitError,
        match=r"^pretrained_model_name_or_path and instance_data_dir cannot be read from a run's settings.yaml beside "
        r".*; give them$",
    ):
        evaluate(model)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(embedded.MODEL)
    (tmp_path / "run" / "settings.yaml").write_text(
        f"pretrained_model_name_or_path: {embedded.MODEL}\ninstance_data_dir: {tmp_path / 'nothing'}\n"
        "instance_prompt: photo of zwx dog\n",
        encoding="utf-8",
    )
    with pytest.raises(DbkitError, match=r"^there are no images in instance_data_dir .*nothing; name the folder"):
        evaluate(tmp_path / "run" / "model")
    with pytest.raises(
        DbkitError, match=r"^there is no instance_prompt and no caption in .*; give a prompt to sample$"
    ):
        evaluate(
            model, pretrained_model_name_or_path=str(model), instance_data_dir=embedded.data_templates() / "poodle"
        )
    with pytest.raises(DbkitError, match=r"^there is no model folder owner/name; give a run's model/ or one of its"):
        evaluate("owner/name")
    with pytest.raises(DbkitError, match=r"is a run; its model is "):
        evaluate(tmp_path / "run")


def test_wrong_settings_are_refused_before_a_network_is_loaded(tmp_path, model):
    given = {"pretrained_model_name_or_path": "tiny-sd", "instance_data_dir": embedded.data_templates() / "print"}
    for name in ("grid.jpg", "folder.png"):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(DbkitError, match=r"^output is .*; give the grid the name of a file that ends in .png$"):
            evaluate(model, **given, output=tmp_path / name)
    with pytest.raises(DbkitError, match=r"^resolution is 33; this model's pictures need a multiple of 8"):
        evaluate(model, **given, resolution=33)
    with pytest.raises(DbkitError, match=r"^mixed_precision is fp16, which needs a GPU"):
        evaluate(model, **given, mixed_precision="fp16", device="cpu")
    with pytest.raises(DbkitError, match=r"^clip .*tiny-dino is not a CLIP model; give one, or leave clip empty$"):
        evaluate(embedded.MODEL, **given, clip=str(embedded.DINO))


def test_a_native_run_is_sampled_with_what_it_was_trained_with(tmp_path):
    run, prints = tmp_path / "run", embedded.data_templates() / "print"
    run.mkdir()
    (run / "model").symlink_to(embedded.MODEL)
    settings = f"pretrained_model_name_or_path: tiny-sd\ninstance_data_dir: {prints}\nuse_txt_as_label: true\n"
    (run / "settings.yaml").write_text(settings, encoding="utf-8")
    made = evaluate(run / "model", num_per_prompt=1, num_inference_steps=1, device="cpu")
    assert made.grid == run / "model-evaluation.png"
    assert made.model.class_leak is None and made.model.prompt_match is not None

    config, paths = EvaluateConfig(run / "model", instance_data_dir=prints), list_images(prints)
    captions = _default_prompts(config, {"use_txt_as_label": True}, paths)
    assert len(captions) == 6 and captions[0] == "a photo of a dog on the beach in zwx style"
    assert _default_prompts(config, {"use_filename_as_label": True}, paths)[0] == "01_dog"


def test_a_clip_model_in_dinos_place_is_refused_before_anything_is_sampled():
    with pytest.raises(DbkitError, match=r"^dino .*tiny-clip is not an image encoder of DINO's kind; give"):
        Dino(embedded.CLIP, torch.device("cpu"))
