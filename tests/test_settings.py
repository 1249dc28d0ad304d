"""How settings work: types, bounds, all mistakes at once, YAML there and back, functions of one settings object."""

import dataclasses
import datetime
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from dbkit import DbkitError
from dbkit.settings import (
    Settings,
    closest,
    coerce,
    configured_by,
    field_type,
    is_optional,
    is_path,
    is_several,
    plain,
    read_yaml,
    replace,
    setting,
    to_yaml,
    type_name,
)


@dataclass(frozen=True)
class Bread(Settings):
    """One setting of every kind."""

    flour: Path = setting(..., "folder of the flour", positional=True)
    water: int = setting(300, "millilitres of water", min=0, max=1000, positional=True)
    salt: float = setting(0.02, "share of salt", above=0, max=1)
    rye: bool = setting(False, "whether there is rye in it")
    name: str = setting("loaf", "what it is called")
    crust: Literal["no", "thin", "thick"] = setting("thin", "the crust")
    note: str | None = setting(None, "anything else to say")
    tin: Path | None = setting(None, "the tin, if there is one")
    seeds: tuple[str, ...] = setting((), "what is on top")
    rests: tuple[float, ...] = setting((1.5,), "hours of each rest", min=0.5, max=24)
    recipe_key: str | None = setting(None, "what opens the recipe book", secret=True)

    def contradictions(self):
        return ["rye needs water; add some"] if self.rye and not self.water else []


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("water", "250", 250),
        ("water", " 1_000 ", 1000),
        ("water", 250.0, 250),
        ("salt", "2e-6", 2e-6),
        ("salt", 1, 1.0),
        ("rye", "true", True),
        ("rye", "Off", False),
        ("rye", 1, True),
        ("name", 7, "7"),
        ("crust", False, "no"),
        ("crust", "thick", "thick"),
        ("note", "", None),
        ("note", "warm", "warm"),
        ("tin", "", None),
        ("tin", "tins/a", Path("tins/a")),
        ("tin", "~/tin", Path.home() / "tin"),
        ("seeds", "poppy", ("poppy",)),
        ("seeds", ["poppy", 1], ("poppy", "1")),
        ("rests", ["1", 2], (1.0, 2.0)),
        ("seeds", (seed for seed in ("poppy", "flax")), ("poppy", "flax")),
        ("rests", iter(["1", 2]), (1.0, 2.0)),
        ("note", datetime.date(2020, 1, 31), "2020-01-31"),
        ("note", Path("a"), "a"),
        ("note", np.int64(7), "7"),
    ],
)
def test_a_value_becomes_the_declared_type(name, given, value):
    made = getattr(Bread("wheat", **{name: given}), name)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("water", "1.5", "water is '1.5'; write a whole number"),
        ("water", 1.5, "water is 1.5; write a whole number"),
        ("water", True, "water is True; write a whole number"),
        ("water", None, "water is None; write a whole number"),
        ("water", float("inf"), "water is inf; write a whole number"),
        ("water", [1], "water is [1]; write a whole number"),
        ("salt", "much", "salt is 'much'; write a number"),
        ("salt", "nan", "salt is 'nan'; write a number"),
        ("rye", "perhaps", "rye is 'perhaps'; write true or false"),
        ("name", None, "name is None; write text"),
        ("name", ["a"], "name is ['a']; write text"),
        ("name", False, "name is False; write text"),
        ("note", {"a": 1}, "note is {'a': 1}; write text"),
        ("flour", " ", "flour is empty; write a path"),
        ("flour", None, "flour is None; write text"),
        ("crust", "tick", "crust is 'tick'; choose one of no, thin, thick; did you mean 'thick'?"),
        ("crust", ["thin"], "crust is ['thin']; choose one of no, thin, thick"),
        ("crust", {}, "crust is {}; choose one of no, thin, thick"),
        ("crust", 1, "crust is 1; choose one of no, thin, thick"),
        ("seeds", [["a"]], "seeds is ['a']; write text"),
        ("name", (text for text in "ab"), "name is <generator object"),
        ("name", b"rye", "name is b'rye'; write text"),
        ("name", {"rye"}, "name is {'rye'}; write text"),
        ("tin", b"/x", "tin is b'/x'; write text"),
        ("seeds", b"rye", "seeds is b'rye'; write text"),
        ("seeds", {"rye"}, "seeds is {'rye'}; write text"),
        ("seeds", [None], "seeds is None; write text"),
        ("water", b"250", "water is b'250'; write a whole number"),
        ("rests", {1.5}, "rests is {1.5}; write a number"),
        ("name", "a\udcffb", r"name is 'a\udcffb', which has characters that are no text; type it again"),
        ("seeds", ["\ud83d"], r"seeds is '\ud83d', which has characters that are no text; type it again"),
        ("water", -1, "water is -1; it must be at least 0"),
        ("water", 1001, "water is 1001; it must be at most 1000"),
        ("salt", 0, "salt is 0.0; it must be more than 0"),
        ("rests", [1, 0.1], "rests is 0.1; it must be at least 0.5"),
        ("rests", [25, 1], "rests is 25.0; it must be at most 24"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_the_value_and_what_to_write(name, given, sentence):
    with pytest.raises(DbkitError) as caught:
        Bread(**{"flour": "wheat", name: given})
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(("name", "bound"), [("water", 0), ("water", 1000), ("salt", 1), ("rests", (0.5, 24))])
def test_bounds_are_inclusive(name, bound):
    assert getattr(Bread("wheat", **{name: bound}), name) == bound


def test_all_values_that_do_not_fit_are_named_at_once():
    with pytest.raises(DbkitError, match=r"3 settings need a change:\n  - water is.*\n  - salt is.*\n  - rye is"):
        Bread("wheat", water="a", salt=2, rye="b")


def test_a_contradiction_is_a_mistake():
    with pytest.raises(DbkitError, match=r"^rye needs water; add some$"):
        Bread("wheat", rye=True, water=0)


def test_contradictions_wait_until_each_value_is_what_it_claims():
    with pytest.raises(DbkitError, match=r"^salt is 'x'; write a number$"):
        Bread("wheat", rye=True, water=0, salt="x")


def test_settings_cannot_change_after_they_are_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Bread("wheat").water = 1


def test_unknown_setting_is_refused_with_the_nearest_name():
    with pytest.raises(DbkitError, match=r"^there is no setting 'watter'; did you mean 'water'\?$"):
        Bread.from_dict({"flour": "wheat", "watter": 3})


def test_an_unknown_name_with_nothing_near_is_refused_without_a_guess():
    with pytest.raises(DbkitError, match=r"^there is no setting 'zzzzzz'$"):
        Bread.from_dict({"flour": "wheat", "zzzzzz": 3})


def test_unknown_and_missing_names_are_reported_together_with_the_file_they_are_in():
    with pytest.raises(DbkitError, match=r"3 settings need a change") as caught:
        Bread.from_dict({"watter": 3, "sallt": 1}, origin="bread.yaml")
    assert "there is no setting 'watter' in bread.yaml" in str(caught.value)
    assert "there is no setting 'sallt' in bread.yaml" in str(caught.value)
    assert "flour is missing in bread.yaml; give it a value" in str(caught.value)


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_required_setting_is_missing(empty):
    with pytest.raises(DbkitError, match=r"^flour is missing; give it a value$"):
        Bread.from_dict({"flour": empty})


def test_a_name_in_yaml_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "bread.yaml"
    path.write_text("flour: wheat\n1: 2\n")
    with pytest.raises(DbkitError, match=r"there is no setting 1 in "):
        Bread.load(path)


def test_a_learning_rate_that_yaml_takes_for_text_becomes_a_number(tmp_path):
    path = tmp_path / "bread.yaml"
    path.write_text("flour: wheat\nsalt: 2e-6\n")
    assert read_yaml(path)["salt"] == "2e-6"
    assert Bread.load(path).salt == 2e-6


def test_saved_settings_load_as_the_same_settings(tmp_path):
    bread = Bread(
        flour=tmp_path / "Mehl für 犬",
        water=1,
        salt=1e-8,
        rye=True,
        name="yes",
        crust="no",
        note="a: b # c\n  'null' 1e3",
        seeds=("1e3", "no", "- x", "日本"),
        rests=(0.5, 24),
    )
    path = bread.save(tmp_path / "new" / "bread.yaml")
    assert Bread.load(path) == bread
    assert b"\r" not in path.read_bytes()


def test_empty_values_survive_the_yaml_file(tmp_path):
    bread = Bread("wheat", seeds=(), note=None, tin=None)
    assert Bread.load(bread.save(tmp_path / "bread.yaml")) == bread


def test_saved_settings_carry_each_help_as_a_comment():
    lines = to_yaml(Bread("wheat")).splitlines()
    assert lines[lines.index("water: 300") - 1] == "# millilitres of water"


def test_a_secret_is_never_saved(tmp_path):
    bread = Bread("wheat", recipe_key="open-sesame")
    assert bread.recipe_key == "open-sesame"
    text = bread.save(tmp_path / "bread.yaml").read_text()
    assert "recipe_key" not in text
    assert "sesame" not in text
    assert "recipe_key" not in plain(bread)


def test_a_secret_is_never_shown(tmp_path):
    assert "sesame" not in repr(Bread("wheat", recipe_key="open-sesame"))
    with pytest.raises(DbkitError, match=r"^recipe_key is no text; write text$"):
        Bread("wheat", recipe_key=["open-sesame"])
    path = tmp_path / "bread.yaml"
    path.write_text("flour: wheat\nrecipe_key: 'open-sesame\n")
    with pytest.raises(DbkitError, match=r"line 3, column 1\); mend that line$") as caught:
        Bread.load(path)
    assert "sesame" not in str(caught.value)


def test_plain_values_are_text_numbers_and_lists():
    values = plain(Bread("wheat", seeds=("a",)))
    assert values["flour"] == "wheat"
    assert values["seeds"] == ["a"]
    assert values["water"] == 300
    assert values["tin"] is None


def test_changes_win_over_the_file(tmp_path):
    path = Bread("wheat", water=1, name="rusk").save(tmp_path / "bread.yaml")
    assert Bread.load(path, water=2) == Bread("wheat", water=2, name="rusk")


def test_an_empty_file_holds_no_settings_and_a_byte_order_mark_is_no_matter(tmp_path):
    path = tmp_path / "bread.yaml"
    path.write_text("")
    assert read_yaml(path) == {}
    path.write_bytes("\ufeffflour: weiß\n".encode())
    assert read_yaml(path) == {"flour": "weiß"}


def test_a_missing_settings_file_is_a_sentence(tmp_path):
    with pytest.raises(DbkitError, match=r"there is no settings file .*gone.yaml; check the path"):
        Bread.load(tmp_path / "gone.yaml")


@pytest.mark.parametrize("content", [b"flour: [wheat", b"\tflour: wheat", b"flour: \xff\xfe"])
def test_an_unreadable_settings_file_is_a_sentence_on_one_line(tmp_path, content):
    path = tmp_path / "bread.yaml"
    path.write_bytes(content)
    with pytest.raises(DbkitError, match=r"^.*bread.yaml is not readable as YAML \(.*\); mend that line$"):
        Bread.load(path)


@pytest.mark.parametrize("content", ["- flour\n- water\n", "flour", "3"])
def test_a_file_without_names_and_values_is_a_sentence(tmp_path, content):
    path = tmp_path / "bread.yaml"
    path.write_text(content)
    with pytest.raises(DbkitError, match=r"bread.yaml holds no settings; write lines of the form name: value"):
        Bread.load(path)


def test_replace_changes_a_copy_and_refuses_unknown_names():
    bread = Bread("wheat", seeds=("a", "b"))
    assert replace(bread, water=1) == Bread("wheat", water=1, seeds=("a", "b"))
    assert bread.water == 300
    with pytest.raises(DbkitError, match=r"did you mean 'water'"):
        replace(bread, watr=1)


@configured_by(Bread)
def bake(config) -> Bread:
    """Bake it."""
    return config


@pytest.mark.parametrize(
    "call",
    [
        lambda: bake(Bread("wheat", water=5)),
        lambda: bake(flour="wheat", water=5),
        lambda: bake("wheat", 5),
        lambda: bake("wheat", water="5"),
        lambda: bake(Bread("wheat", water=1), water=5),
    ],
)
def test_a_function_takes_its_settings_as_an_object_or_by_name(call):
    assert call() == Bread("wheat", water=5)


def test_a_function_refuses_unknown_settings_with_the_nearest_name():
    with pytest.raises(DbkitError, match=r"did you mean 'water'"):
        bake("wheat", watr=5)
    with pytest.raises(DbkitError, match=r"did you mean 'water'"):
        bake(Bread("wheat"), watr=5)


def test_too_many_values_without_names_are_a_programmers_mistake():
    with pytest.raises(TypeError, match=r"bake\(\) takes Bread or settings by name, not 0.5"):
        bake("wheat", 5, 0.5)
    with pytest.raises(TypeError, match=r"bake\(\) takes one Bread, then settings by name"):
        bake(Bread("wheat"), 5)


def test_a_function_shows_the_signature_of_its_settings():
    assert list(inspect.signature(bake).parameters) == [field.name for field in dataclasses.fields(Bread)]
    assert inspect.signature(bake).return_annotation is Bread
    assert bake.__doc__ == "Bake it."


def test_a_near_name_is_found_in_either_spelling():
    assert closest("learning-rte", ["learning_rate", "seed"]) == "; did you mean 'learning_rate'?"
    assert closest("zzz", ["learning_rate", "seed"]) == ""


@pytest.mark.parametrize(
    ("name", "words", "facts"),
    [
        ("flour", "path", {is_path}),
        ("water", "whole number", set()),
        ("salt", "number", set()),
        ("rye", "switch", set()),
        ("name", "text", set()),
        ("crust", "no / thin / thick", set()),
        ("note", "text", {is_optional}),
        ("tin", "path", {is_path, is_optional}),
        ("seeds", "text, several", {is_several}),
        ("rests", "number, several", {is_several}),
    ],
)
def test_a_declared_type_is_told_in_a_users_words(name, words, facts):
    kind = field_type(Bread, name)
    assert type_name(kind) == words
    assert {ask for ask in (is_path, is_optional, is_several) if ask(kind)} == facts


def test_what_the_system_refuses_a_function_is_a_sentence(tmp_path):
    @configured_by(Bread)
    def weigh(config):
        return config.flour.read_bytes()

    with pytest.raises(DbkitError, match=r"folder where a file belongs \(.+\); choose another name, or move"):
        weigh(tmp_path)
    with pytest.raises(DbkitError, match="rye is not there"):
        weigh(Bread(tmp_path / "rye"))


def test_coerce_raises_half_a_sentence_that_begins_after_the_name():
    with pytest.raises(ValueError, match=r"^is 'x'; write a number$"):
        coerce("x", float)
