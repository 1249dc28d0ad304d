"""Several concepts: the list as the seed document writes it, pairing, balance, previews, and what is refused."""

import json

import pytest
from conftest import draw_photo

from dbkit import DbkitError, TrainConfig, train
from dbkit.concepts import concepts_of, warnings
from dbkit.embedded import data_templates


@pytest.fixture
def folders(tmp_path):
    for name in ("zwx", "ukj"):
        draw_photo(tmp_path / "sets" / name / f"{name}.png")
    return tmp_path / "sets"


DOG = {"instance_prompt": "photo of zwx dog", "class_prompt": "photo of a dog", "instance_data_dir": "zwx"}
CAR = {"instance_prompt": "photo of ukj car", "class_prompt": "photo of a car", "instance_data_dir": "ukj"}


def config(folders, *concepts, text=None, **changes):
    path = folders / "concepts_list.json"
    path.write_text(json.dumps(concepts) if text is None else text, encoding="utf-8")
    prior = {"with_prior_preservation": True, **changes}
    return TrainConfig(pretrained_model_name_or_path="owner/name", concepts_list=path, **prior)


def test_the_keys_of_the_seed_document_are_read_and_folders_taken_from_the_list(folders):
    absolute = {**CAR, "instance_data_dir": str(folders / "ukj"), "class_data_dir": "car", "weight": 2}
    dog, car = concepts_of(config(folders, DOG, absolute))
    assert (dog.instance_prompt, dog.class_prompt) == ("photo of zwx dog", "photo of a dog")
    assert (dog.instance_data_dir, dog.class_data_dir, dog.weight) == (folders / "zwx", None, 1.0)
    assert (car.instance_data_dir, car.class_data_dir, car.weight) == (folders / "ukj", folders / "car", 2.0)


def test_without_a_list_the_settings_are_the_one_concept():
    values = {"instance_data_dir": "images", "instance_prompt": "photo of zwx dog"}
    (concept,) = concepts_of(TrainConfig(pretrained_model_name_or_path="owner/name", **values))
    assert (str(concept.instance_data_dir), concept.instance_prompt) == ("images", "photo of zwx dog")


@pytest.mark.parametrize(
    ("entries", "sentences"),
    [
        ([{**DOG, "instance_promt": "x"}], ["concept 1: there is no setting 'instance_promt'; did you mean 'instance"]),
        ([DOG, {"instance_prompt": "x"}], ["concept 2: instance_data_dir is missing"]),
        ([{"instance_data_dir": "zwx"}], ["concept 1: instance_prompt is missing"]),
        ([{**DOG, "class_prompt": ""}], ["concept 1: class_prompt is missing"]),
        (
            [{**DOG, "class_prompt": DOG["instance_prompt"]}],
            ["concept 1: class_prompt and instance_prompt are the same"],
        ),
        (
            [{**DOG, "weight": 0}, {**CAR, "weight": "much"}],
            ["concept 1: weight is 0; write a", "concept 2: weight is"],
        ),
        ([{**DOG, "instance_data_dir": 3}], ["concept 1: instance_data_dir is 3; write text"]),
    ],
)
def test_every_mistake_of_a_list_is_named_with_its_concept(folders, entries, sentences):
    with pytest.raises(DbkitError) as raised:
        concepts_of(config(folders, *entries))
    for sentence in sentences:
        assert f"\n  - {sentence}" in str(raised.value)


@pytest.mark.parametrize("text", ["", "[", "{}", "[]", "[1]", '"zwx"'])
def test_a_file_that_is_no_list_of_concepts_is_refused(folders, text):
    with pytest.raises(DbkitError, match=r"^concepts_list .*concepts_list.json is not "):
        concepts_of(config(folders, text=text))


def test_a_list_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        DbkitError, match=r"^concepts_list gone.json cannot be read \(No such file or directory\); check"
    ):
        concepts_of(TrainConfig(pretrained_model_name_or_path="owner/name", concepts_list="gone.json"))


@pytest.mark.parametrize("name", ["instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir"])
def test_settings_that_the_list_has_for_each_concept_are_refused_beside_it(folders, name):
    with pytest.raises(DbkitError, match=f"concepts_list says {name} for each concept; leave {name} empty"):
        config(folders, DOG, **{name: "x"})


@pytest.mark.parametrize(
    ("entries", "changes", "sentence"),
    [
        (
            [{**DOG, "class_data_dir": "zwx"}],
            {},
            "concept 1: class_data_dir .*zwx holds instance images",
        ),
        ([{**DOG, "class_data_dir": "ukj"}, CAR], {}, "concept 1: class_data_dir .*ukj holds instance images"),
        (
            [{**DOG, "class_data_dir": "c"}, {**CAR, "class_data_dir": "./c"}],
            {},
            "concept 2: class_data_dir .*c is another class's too; choose another folder",
        ),
        (
            [DOG],
            {"output_dir": "."},
            "concept 1: instance_data_dir .*zwx lies in output_dir",
        ),
        ([DOG], {"with_prior_preservation": False}, "concept 1: class_prompt has no effect without with_prior"),
        ([DOG], {"use_txt_as_label": True}, "concept 1: instance_prompt would not be used, since each image's label"),
        ([{**DOG, "instance_data_dir": "~nobody-of-this-name/x"}], {}, "has no such user"),
    ],
)
def test_what_would_be_ignored_or_overwritten_is_refused_before_anything_is_made(folders, entries, changes, sentence):
    with pytest.raises(DbkitError, match=sentence):
        concepts_of(config(folders, *entries, **changes))
    assert sorted(path.name for path in folders.iterdir()) == ["concepts_list.json", "ukj", "zwx"]


def test_two_subjects_of_one_class_are_warned_of(folders):
    other = {**CAR, "instance_prompt": "photo of ukj dog", "class_prompt": "Photo of  a dog"}
    (sentence,) = warnings(concepts_of(config(folders, DOG, other)))
    assert sentence.startswith("photo of zwx dog and photo of ukj dog are of one class (photo of a dog): such subjects")
    assert warnings(concepts_of(config(folders, DOG, CAR))) == []


def test_two_concepts_of_one_folder_are_warned_of(folders):
    (sentence,) = warnings(concepts_of(config(folders, DOG, {**CAR, "instance_data_dir": "zwx"})))
    assert sentence.startswith("two concepts share one instance_data_dir")


def test_the_templates_list_names_folders_that_are_there():
    path = data_templates() / "concepts_list.json"
    concepts = concepts_of(
        TrainConfig(pretrained_model_name_or_path="x", concepts_list=path, with_prior_preservation=True)
    )
    assert len(concepts) == 2
    assert all(list(concept.instance_data_dir.glob("*.png")) for concept in concepts)


def test_two_concepts_train_together_each_with_its_class_images_and_its_preview(
    settings, folders, workspace_folder, capsys
):
    path = folders / "concepts_list.json"
    path.write_text(json.dumps([DOG, CAR]))
    given = {**settings, "instance_data_dir": None, "instance_prompt": None, "auto_test_model": True}
    options = {"with_prior_preservation": True, "num_class_images": 2}
    model = train(**given, concepts_list=path, **options)
    made = {path.parent.name.rpartition("-")[0] for path in workspace_folder.glob("class_images/*/*.png")}
    assert made == {"photo of a dog", "photo of a car"}
    previews = {path.name.split("-")[1] for path in model.parent.glob("previews/step_000002/*.png")}
    subjects = {"photo of zwx dog", "photo of ukj car"}
    assert previews == subjects | {f"{prompt} in the snow" for prompt in subjects} | {
        "photo of a dog",
        "photo of a car",
    }
    said = capsys.readouterr().out
    assert "1 instance image of photo of zwx dog; the first one's prompt: photo of zwx dog" in said
