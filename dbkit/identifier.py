"""The identifier: the rare word that will mean the subject, checked on the base model's own tokenizer.

DreamBooth (arXiv:2208.12242, "Rare-token Identifiers") takes a word that is rare to the model, since a common one
brings a meaning that training has to overcome, and a word of several pieces brings the meanings of its pieces.
"""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from dbkit.config import IdentifierConfig
from dbkit.settings import configured_by
from dbkit.tokenizer import load_tokenizer, model_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import CLIPTokenizer

    from dbkit.concepts import Concept

# CLIP reads 77 tokens, of which the first and the last are marks.
PROMPT_TOKENS = 75
# Of more prompts that are cut their number is said.
_MOST_CUT = 10
# Words that say nothing of the subject: two prompts may differ in them.
_SMALL_WORDS = frozenset(
    {"a", "an", "the", "of", "in", "on", "at", "by", "with", "and"}
    | {"photo", "picture", "image", "painting", "drawing", "portrait"}
)
# Rare in CLIP's vocabulary, or without a vowel, and yet full of meaning.
_MEANINGS = {
    "sks": "a rifle",
    "bnha": "a Japanese cartoon series",
    "crt": "a monitor",
    "dbz": "a Japanese cartoon series",
    "dprk": "North Korea",
    "fck": "a swear word",
    "fdr": "a president",
    "ffxv": "a video game",
    "fpv": "a drone's view",
    "hgtv": "a television channel",
    "hpv": "a virus",
    "jdm": "Japanese cars",
    "jfk": "a president and an airport",
    "lbj": "a president and a basketball player",
    "lsd": "a drug",
    "sht": "a swear word",
    "tvxq": "a pop group",
}
# Three to five letters without a vowel, none three times in a row: of the tokens that end a word, these read least
# like words.
_UNREADABLE = re.compile(r"(?!.*(.)\1\1)[bcdfghjklmnpqrstvwxz]{3,5}</w>")


@configured_by(IdentifierConfig)
def check_identifier(config: IdentifierConfig) -> str:
    """What the identifier of a prompt is, how the tokenizer reads it, what is wrong, and what to take instead."""
    name = config.pretrained_model_name_or_path
    tokenizer = model_tokenizer(name) if name else load_tokenizer(None)
    return describe(tokenizer, config.instance_prompt, config.class_prompt)


def find_identifier(instance_prompt: str, class_prompt: str | None) -> str | None:
    """The words of the instance prompt that the class prompt lacks; None if there are none, or no class prompt.

    Articles, prepositions and words such as photo do not count.
    """
    if not class_prompt:
        return None
    known = _SMALL_WORDS.union(word.lower() for word in _words(class_prompt))
    lacking = {word.lower(): word for word in _words(instance_prompt) if word.lower() not in known}
    return " ".join(lacking.values()) or None


def check_prompts(tokenizer: CLIPTokenizer, instance_prompt: str, class_prompt: str | None) -> list[str]:
    """What is wrong with the prompts of a DreamBooth training, each with what to do. Empty when all is well.

    Without a class prompt nothing tells which word is the identifier, and little can be said.
    """
    identifier = find_identifier(instance_prompt, class_prompt)
    problems = _identifier_problems(tokenizer, identifier) if identifier else []
    words = _words(instance_prompt)
    if words and (words == (identifier or "").split() or (not class_prompt and len(words) == 1)):
        problems.append(
            f"the instance prompt is {' '.join(words)!r} alone, so the model has to guess what kind of thing it is; "
            f"write the class behind it, as in: photo of {' '.join(words)} {' '.join(_content(class_prompt)) or 'dog'}"
        )
    elif class_prompt:
        problems += _class_problems(instance_prompt, class_prompt, identifier)
    for name, prompt in (("instance", instance_prompt), ("class", class_prompt)):
        if prompt and (count := _count(tokenizer, prompt)) > PROMPT_TOKENS:
            problems.append(
                f"the {name} prompt has {count} tokens and the model reads {PROMPT_TOKENS}; shorten it by "
                f"{count - PROMPT_TOKENS}, since the end would not be read"
            )
    return problems


def suggest_identifiers(tokenizer: CLIPTokenizer, count: int = 5, seed: int = 0) -> list[str]:
    """At most count rare letter groups, each one token of this tokenizer and no word; the same for the same seed."""
    import numpy as np

    first = _first_rare(tokenizer)
    rare = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= first)
    words = [token.removesuffix("</w>") for _, token in rare if _UNREADABLE.fullmatch(token)]
    # A word is in the vocabulary and yet never made where other merges come first.
    words = [word for word in words if word not in _MEANINGS and len(tokenizer.tokenize(word)) == 1]
    return [words[n] for n in np.random.default_rng(seed).permutation(len(words))[:count]]


def describe(tokenizer: CLIPTokenizer, instance_prompt: str, class_prompt: str | None) -> str:
    """For people, in lines: the identifier, its tokens, and what is wrong, with rare words to take instead."""
    identifier = find_identifier(instance_prompt, class_prompt)
    if identifier:
        pieces = _pieces(tokenizer, identifier)
        lines = [f"identifier: {identifier}, {_tokens(len(pieces))} ({', '.join(pieces)})"]
    else:
        lines = ["identifier: none found, " + ("see below" if class_prompt else "since there is no class prompt")]
    problems = check_prompts(tokenizer, instance_prompt, class_prompt)
    lines += [f"  - {problem}" for problem in problems]
    if problems and (suggestions := suggest_identifiers(tokenizer)):
        lines.append(f"rare words of this model: {', '.join(suggestions)}")
    return "\n".join(lines)


def how_read(tokenizer: CLIPTokenizer, concepts: Sequence[Concept], prompts: Sequence[str]) -> list[str]:
    """How a model reads the prompts of a training, in lines: each concept's identifier, and which prompts are cut.

    prompts are all that it is trained with, each once.
    """
    lines = [
        describe(tokenizer, concept.instance_prompt, concept.class_prompt)
        for concept in concepts
        if concept.instance_prompt and concept.class_prompt
    ]
    most = min(tokenizer.model_max_length - 2, PROMPT_TOKENS)
    counts = [_count(tokenizer, prompt) for prompt in prompts]
    lines.append(f"the first prompt has {_tokens(counts[0])}; the model reads at most {most}")
    cut = [f"cut after {most} of {count} tokens: {prompt}" for prompt, count in zip(prompts, counts) if count > most]
    more = [f"{len(cut) - _MOST_CUT} more prompts are cut"] * (len(cut) > _MOST_CUT)
    return [*lines, *cut[:_MOST_CUT], *more]


def _identifier_problems(tokenizer: CLIPTokenizer, identifier: str) -> list[str]:
    problems, words = [], identifier.split()
    pieces = _pieces(tokenizer, identifier)
    if len(pieces) > 1:
        advice = "choose a rare word that is one token"
        if len(words) > 1:
            advice = "write both prompts alike, but for one rare word that is one token"
        problems.append(f"the identifier {identifier!r} is {_tokens(len(pieces))} ({', '.join(pieces)}); {advice}")
    for word in words:
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))
        if meaning := _MEANINGS.get(word.lower()):
            problems.append(
                f"{word!r} also stands for {meaning}, which will show through; choose a word that means nothing"
            )
        elif len(ids) == 1 and ids[0] < _first_rare(tokenizer):
            problems.append(
                f"{word!r} is a common word of this model (token {ids[0]} of {len(tokenizer)}) with a meaning of its "
                "own; choose a rarer one"
            )
    return problems


def _class_problems(instance_prompt: str, class_prompt: str, identifier: str | None) -> list[str]:
    if not identifier:
        return [
            "the class prompt has every word of the instance prompt, so none means the subject alone; put the "
            "identifier, a rare word, in the instance prompt and keep it out of the class prompt"
        ]
    present = {word.lower() for word in _words(instance_prompt)}
    missing = [word for word in _content(class_prompt) if word.lower() not in present]
    if not missing:
        return []
    return [
        f"the instance prompt lacks {' '.join(missing)!r} of the class prompt, so what the model knows of that is not "
        "used; write it behind the identifier"
    ]


def _first_rare(tokenizer: CLIPTokenizer) -> int:
    """The id from which a token is rare. Ids follow the order of merges, which is that of frequency.

    CLIP's last fifth begins at 39526: dog is token 1929, corgi 31320, poodle 34961, sks 48136. A vocabulary that was
    learnt from few texts has no such tail: in the embedded model's, the names of its world end at 0.33 of it, the
    words without a meaning lie from 0.37 to 0.40, and its captions have nothing of what follows.
    """
    size = len(tokenizer)
    return int(size * (0.8 if size >= 40_000 else 0.35))


def _words(prompt: str) -> list[str]:
    stripped = (word.strip(string.punctuation) for word in prompt.split())
    return [word for word in stripped if word]


def _content(class_prompt: str | None) -> list[str]:
    """The words that name the class."""
    return [word for word in _words(class_prompt or "") if word.lower() not in _SMALL_WORDS]


def _pieces(tokenizer: CLIPTokenizer, text: str) -> list[str]:
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    return [tokenizer.decode([number]).strip() for number in ids]


def _count(tokenizer: CLIPTokenizer, prompt: str) -> int:
    # Without `verbose` transformers would warn of what is said here.
    return len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)


def _tokens(count: int) -> str:
    return "one token" if count == 1 else f"{count} tokens"
