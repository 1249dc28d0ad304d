"""The identifier on the embedded model's tokenizer, on one with CLIP's numbers, and in the sample files."""

import itertools
import json
import re

import pytest

from dbkit import embedded
from dbkit.concepts import Concept
from dbkit.identifier import check_prompts, describe, find_identifier, how_read, suggest_identifiers
from dbkit.settings import read_yaml
from dbkit.tokenizer import clip_tokenizer, load_tokenizer_tables

# Where these words stand in the vocabulary of openai/clip-vit-large-patch14.
CLIP_IDS = {"dog": 1929, "jfk": 18486, "poodle": 34961, "ohwx": 47993, "sks": 48136, "hta": 49384}
CLIP_SIZE = 49408
MARKS = ("<|startoftext|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def tiny():
    return clip_tokenizer(embedded.MODEL / "tokenizer")


@pytest.fixture(scope="module")
def clip():
    """A tokenizer of CLIP's size: a few words with the ids that they have there, and consonants at the rare end."""
    rare = {f"{a}{b}{c}": 49000 + n for n, (a, b, c) in enumerate(itertools.product("bcd", repeat=3))}
    return make_tokenizer({**CLIP_IDS, **rare}, CLIP_SIZE)


def make_tokenizer(words, size, unmade=()):
    """A tokenizer of the words with their ids; the rest of its vocabulary are numbers that no text makes.

    Words of `unmade` are in the vocabulary, and no merge makes them.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in (word for word in words if word not in unmade):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            # The end is merged first: no two words of a test then share a piece that another one would need.
            merges.append(f"{parts[-2]} {parts[-1]}")
            parts = [*parts[:-2], parts[-2] + parts[-1]]
            pieces.append(parts[-1])
    merges = list(dict.fromkeys(merges))
    ids = {word + "</w>": number for word, number in words.items()}
    fixed = {**ids, MARKS[0]: size - 2, MARKS[1]: size - 1}
    free = (number for number in range(size) if number not in set(fixed.values()))
    vocabulary = fixed | dict(zip((piece for piece in dict.fromkeys(pieces) if piece not in fixed), free))
    vocabulary |= {f"0{number}": number for number in free}
    return load_tokenizer_tables(vocabulary, merges, {"model_max_length": 77})


@pytest.mark.parametrize(
    ("instance", "class_prompt", "identifier"),
    [
        ("photo of zwx dog", "photo of a dog", "zwx"),
        ("A picture of the Zwx dog.", "photo of a Dog", "Zwx"),
        ("photo of zwx ukj dog", "photo of a dog", "zwx ukj"),
        ("zwx dog, photo of zwx dog", "photo of a dog", "zwx"),
        ("photo of the dog", "photo of a dog", None),
        ("photo of zwx dog", None, None),
        ("photo of zwx dog", "", None),
    ],
)
def test_the_identifier_is_what_the_class_prompt_lacks(instance, class_prompt, identifier):
    assert find_identifier(instance, class_prompt) == identifier


@pytest.mark.parametrize("identifier", ["zwx", "ukj", "ohwx", "hta", "ZWX"])
def test_a_rare_word_before_the_class_word_is_well(tiny, identifier):
    assert check_prompts(tiny, f"photo of {identifier} dog", "photo of a dog") == []
    assert check_prompts(tiny, f"a picture of the {identifier} dog", "photo of a dog") == []


@pytest.mark.parametrize(
    ("instance", "class_prompt", "problem"),
    [
        (
            "photo of fluffball dog",
            "photo of a dog",
            "the identifier 'fluffball' is 4 tokens (fl, u, ff, ball); choose a rare word that is one token",
        ),
        (
            "photo of zwx dog ukj",
            "photo of a dog",
            "the identifier 'zwx ukj' is 2 tokens (zwx, ukj); write both prompts alike, but for one rare word that is "
            "one token",
        ),
        (
            "photo of red dog",
            "photo of a dog",
            "'red' is a common word of this model (token 585 of 2022) with a meaning of its own; choose a rarer one",
        ),
        (
            "photo of SKS dog",
            "photo of a dog",
            "'SKS' also stands for a rifle, which will show through; choose a word that means nothing",
        ),
        (
            "photo of zwx",
            "photo of a red dog",
            "the instance prompt lacks 'red dog' of the class prompt, so what the model knows of that is not used; "
            "write it behind the identifier",
        ),
        (
            "photo of zwx dog",
            "photo of a zwx dog",
            "the class prompt has every word of the instance prompt, so none means the subject alone; put the "
            "identifier, a rare word, in the instance prompt and keep it out of the class prompt",
        ),
        (
            "zwx",
            "photo of a dog",
            "the instance prompt is 'zwx' alone, so the model has to guess what kind of thing it is; write the class "
            "behind it, as in: photo of zwx dog",
        ),
        (
            "zwx",
            None,
            "the instance prompt is 'zwx' alone, so the model has to guess what kind of thing it is; write the class "
            "behind it, as in: photo of zwx dog",
        ),
        (
            "photo of zwx dog" + " on the beach" * 24,
            "photo of a dog on the beach",
            "the instance prompt has 76 tokens and the model reads 75; shorten it by 1, since the end would not be "
            "read",
        ),
        (
            "photo of zwx dog",
            "photo of a dog" + " dog" * 80,
            "the class prompt has 84 tokens and the model reads 75; shorten it by 9, since the end would not be read",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tiny, instance, class_prompt, problem):
    assert check_prompts(tiny, instance, class_prompt) == [problem]


def test_a_prompt_may_have_as_many_tokens_as_the_model_reads(tiny):
    assert check_prompts(tiny, "photo of zwx dog" + " dog" * 71, "photo of a dog") == []


def test_several_problems_are_all_said(tiny):
    assert len(check_prompts(tiny, "photo of sks red", "photo of a dog")) == 4


def test_without_a_class_prompt_little_is_known(tiny):
    assert check_prompts(tiny, "photo of red dog", None) == []


@pytest.mark.parametrize(
    ("word", "problems"),
    [
        (
            "poodle",
            [
                "'poodle' is a common word of this model (token 34961 of 49408) with a meaning of its own; choose a "
                "rarer one"
            ],
        ),
        # Where the meaning is known it is said instead.
        (
            "jfk",
            [
                "'jfk' also stands for a president and an airport, which will show through; choose a word that means "
                "nothing"
            ],
        ),
        ("ohwx", []),
        ("hta", []),
    ],
)
def test_the_last_fifth_of_a_large_vocabulary_is_rare(clip, word, problems):
    assert check_prompts(clip, f"photo of {word} dog", "photo of a dog") == problems


def test_the_same_word_may_be_one_token_of_one_model_and_several_of_another(tiny, clip):
    assert check_prompts(tiny, "photo of zwx dog", "photo of a dog") == []
    (problem,) = check_prompts(clip, "photo of zwx dog", "photo of a dog")
    assert problem == "the identifier 'zwx' is 2 tokens (z, wx); choose a rare word that is one token"


def test_suggestions_are_rare_single_tokens_and_no_words(tiny, clip):
    for tokenizer, first in ((tiny, 0.35 * len(tiny)), (clip, 0.8 * CLIP_SIZE)):
        words = suggest_identifiers(tokenizer, count=1000)
        assert len(words) > 10
        assert len(set(words)) == len(words)
        for word in words:
            assert re.fullmatch(r"[b-df-hj-np-tv-xz]{3,5}", word)
            (number,) = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))
            assert number >= first
            assert check_prompts(tokenizer, f"photo of {word} dog", "photo of a dog") == []


def test_letters_three_times_in_a_row_and_known_meanings_are_not_suggested(tiny, clip):
    assert "bbb" not in suggest_identifiers(clip, count=1000)
    assert "bbc" in suggest_identifiers(clip, count=1000)
    assert not {"sks", "jfk"} & set(suggest_identifiers(tiny, count=1000))
    assert "zwx" in suggest_identifiers(tiny, count=1000)


def test_a_word_that_the_merges_never_make_is_not_suggested():
    words = {"bcd": 390, "fgh": 391}
    assert sorted(suggest_identifiers(make_tokenizer(words, 400))) == ["bcd", "fgh"]
    assert suggest_identifiers(make_tokenizer(words, 400, unmade=["fgh"])) == ["bcd"]


def test_suggestions_follow_the_seed_alone(tiny):
    assert suggest_identifiers(tiny, seed=3) == suggest_identifiers(tiny, seed=3)
    assert len({tuple(suggest_identifiers(tiny, seed=seed)) for seed in range(5)}) > 1
    assert len(suggest_identifiers(tiny)) == 5
    assert suggest_identifiers(tiny, count=2) == suggest_identifiers(tiny)[:2]


def test_a_tokenizer_without_rare_words_has_no_suggestions():
    letters = make_tokenizer({"dog": 100}, 400)
    assert suggest_identifiers(letters) == []
    assert "rare words" not in describe(letters, "photo of zwx dog", "photo of a dog")


def test_a_description_of_good_prompts_is_one_line(tiny):
    assert describe(tiny, "photo of zwx dog", "photo of a dog") == "identifier: zwx, one token (zwx)"
    assert describe(tiny, "photo of zwx dog", None) == "identifier: none found, since there is no class prompt"


def test_a_description_of_bad_prompts_suggests_others(tiny):
    identifier, problem, suggestions = describe(tiny, "photo of sks dog", "photo of a dog").splitlines()
    assert identifier == "identifier: sks, one token (sks)"
    assert problem.startswith("  - 'sks' also stands for a rifle")
    assert suggestions == f"rare words of this model: {', '.join(suggest_identifiers(tiny))}"
    assert describe(tiny, "a dog", "a dog").startswith("identifier: none found, see below\n  - the class prompt has")


def concepts():
    """The instance and class prompts of the sample files."""
    folder = embedded.data_templates()
    files = [read_yaml(path) for path in sorted(folder.glob("train_*.yaml"))]
    files += json.loads((folder / "concepts_list.json").read_text(encoding="utf-8"))
    return [(file["instance_prompt"], file["class_prompt"]) for file in files if "instance_prompt" in file]


def test_the_prompts_of_the_sample_files_have_nothing_wrong_with_them(tiny):
    assert len(concepts()) == 5
    for instance, class_prompt in concepts():
        assert check_prompts(tiny, instance, class_prompt) == []


@pytest.mark.parametrize("kind", ["person", "animal", "object"])
def test_the_preview_prompts_of_a_kind_have_its_identifier_and_class(kind):
    folder = embedded.data_templates()
    settings = read_yaml(folder / f"train_{kind}.yaml")
    prompts = (folder / f"prompts_{kind}.txt").read_text(encoding="utf-8").splitlines()
    identifier = find_identifier(settings["instance_prompt"], settings["class_prompt"])
    class_word = settings["class_prompt"].split()[-1]
    named = [prompt for prompt in prompts if identifier in prompt.split()]
    assert len(named) >= 10
    assert all(f"{identifier} {class_word}" in prompt for prompt in named)
    assert settings["class_prompt"] in prompts
    # One prompt has nothing to do with the subject, and shows drift.
    assert len([prompt for prompt in prompts if class_word not in prompt]) == 1


def test_the_preview_prompts_of_the_style_name_it_as_its_captions_do():
    folder = embedded.data_templates()
    style = "in zwx style"
    captions = [path.read_text(encoding="utf-8").strip() for path in sorted((folder / "print").glob("*.txt"))]
    prompts = (folder / "prompts_style.txt").read_text(encoding="utf-8").splitlines()
    assert captions
    assert all(caption.endswith(style) for caption in captions)
    assert len([prompt for prompt in prompts if prompt.endswith(style)]) >= 10
    assert len([prompt for prompt in prompts if "zwx" not in prompt]) == 2


def test_of_all_prompts_each_identifier_is_told_and_which_are_cut(tiny, tmp_path):
    concepts = [Concept(tmp_path, f"photo of {word} dog", "photo of a dog") for word in ("zwx", "ukj")]
    long = [f"dog {number} " + "dog " * 80 for number in range(12)]
    lines = how_read(tiny, [*concepts, Concept(tmp_path)], ["photo of zwx dog", *long])
    assert lines[:2] == ["identifier: zwx, one token (zwx)", "identifier: ukj, one token (ukj)"]
    assert re.fullmatch(r"the first prompt has \d+ tokens; the model reads at most 75", lines[2])
    assert len(lines) == 3 + 10 + 1 and lines[-1] == "2 more prompts are cut"
    assert re.fullmatch(rf"cut after 75 of \d+ tokens: {re.escape(long[0])}", lines[3])
    assert len(how_read(tiny, [], long[:10])) == 11
