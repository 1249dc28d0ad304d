"""Stage 1, data: the tokenizer, the pictures with their captions, and held-out pictures to judge the VAE by.

python recipes/tiny_sd/data.py --art build/art/node_modules/@iconify-json --out build/tiny_sd
"""

from __future__ import annotations

import argparse
import functools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from world import COLOURS, HELD_OUT, NOUNS, SETTINGS, SUBJECTS, Art, Scene, caption, compose, random_pose, random_scene

SIDE = 32
# Words without a meaning, one token each, as the real tokenizer has: identifiers to teach a subject under.
IDENTIFIERS = (
    "sks", "zwx", "ukj", "ohwx", "xjy", "qvk", "bnha", "rdw", "hta", "olis", "jfk", "uqv", "wzy", "kxq", "pfv", "gjb",
    "ynz", "vxw", "dkq", "mzp", "fwo", "cjv", "lqx", "tzk", "nrv", "iyx", "ewq", "azv", "oxk", "bqj", "shs", "qyu",
)  # fmt: skip
COMMON = """a an and are art artist as at background beautiful behind beside big black blue bottle bowl boy bright brown
by chair class close clouds cold colorful cup dark day desk detail digital door drawing dress eyes face field floor flying
for from front full garden girl gold gray green hair hand happy hat high hill his her holding ice illustration image in
inside island it jumping kitchen lake lamp landscape large leaf light little long looking man many model moon morning
mosaic mountain mountains near new next night object of old on one open orange outside over painting paper park pattern
pencil people person photo photograph photography picture pink plain plant portrait print purple quality rain realistic
red river road rock round running scene sea shiny shoes side simple single sitting sketch sky sleeping small soft standing
star stone street style summer sun sunny table tall tea teapot texture the thing three tiny to toy tree two under up
vase view walking wall warm watercolor wearing white wide wild window winter with woman wood wooden yellow young zoo"""
VOCABULARY = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--art", type=Path, required=True, help="folder of the icon packages")
    parser.add_argument("--out", type=Path, default=Path("build/tiny_sd"), help="where all stages work")
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    make_tokenizer(args.out / "tokenizer", args.art)
    makes = {
        "train": (args.images, draw_seen),
        "judge": (2000, draw_seen),
        "heldout": (512, draw_unseen),
        "things": (args.images // 2, draw_anything),
    }
    for seed, (name, (count, draw)) in enumerate(makes.items()):
        make_images(args.out / f"{name}.npz", args.art, count, seed, draw, args.processes)


def draw_seen(seed: int, number: int, art: Art) -> tuple[np.ndarray, str, Scene]:
    rng = np.random.default_rng([seed, number])
    scene = random_scene(rng)
    return np.asarray(compose(scene, art, SIDE)), caption(scene, rng, IDENTIFIERS), scene


def draw_anything(seed: int, number: int, art: Art) -> tuple[np.ndarray, str, Scene]:
    """Any of thousands of icons: a VAE that has seen only the world's things blurs every other."""
    rng = np.random.default_rng([seed, number])
    places = list(SETTINGS if rng.random() < 0.75 else COLOURS)
    scene = Scene(
        noun="thing", art=str(rng.choice(_others(art))), tint=None, size=None, place=str(rng.choice(places)),
        seed=number, **random_pose(rng, float(rng.uniform(0.5, 0.9))),
    )  # fmt: skip
    return np.asarray(compose(scene, art, SIDE)), caption(scene, rng), scene


@functools.cache
def _others(art: Art) -> list[str]:
    return art.others()


def draw_unseen(seed: int, number: int, art: Art) -> tuple[np.ndarray, str, Scene]:
    """Art that no stage trains on, in the world's settings."""
    rng = np.random.default_rng([seed, number])
    arts = [*HELD_OUT, *(name for _, name in SUBJECTS.values())]
    scene = Scene(
        noun="thing", art=str(rng.choice(arts)), tint=None, size=None, place=str(rng.choice(list(SETTINGS))),
        seed=number, **random_pose(rng, float(rng.uniform(0.58, 0.82))),
    )  # fmt: skip
    return np.asarray(compose(scene, art, SIDE)), caption(scene, rng), scene


_art: Art | None = None


def _draw_some(numbers: range, seed: int, folder: Path, draw) -> list[tuple[np.ndarray, str, Scene]]:
    global _art  # one set of sprites for each process
    _art = _art or Art(folder)
    return [draw(seed, number, _art) for number in numbers]


def make_images(path: Path, art: Path, count: int, seed: int, draw, processes: int) -> None:
    """images (N, 32, 32, 3) uint8, captions, and what the scene holds: noun, tint and place by number, art by name."""
    if path.exists():
        print(f"{path} is there already")
        return
    chunks = [range(start, min(start + 500, count)) for start in range(0, count, 500)]
    with ProcessPoolExecutor(processes) as pool:
        rows = [
            row
            for part in pool.map(functools.partial(_draw_some, seed=seed, folder=art, draw=draw), chunks)
            for row in part
        ]
    images, captions, scenes = zip(*rows)
    nouns, tints, places = list(NOUNS), list(COLOURS), [*SETTINGS, *COLOURS]
    partial_path = path.with_name(f"partial-{path.name}")
    np.savez(
        partial_path,
        images=np.stack(images),
        captions=np.array(captions),
        nouns=np.array([nouns.index(scene.noun) if scene.noun in nouns else -1 for scene in scenes]),
        tints=np.array([tints.index(scene.tint) if scene.tint else -1 for scene in scenes]),
        places=np.array([places.index(scene.place) for scene in scenes]),
        arts=np.array([f"{scene.art} {scene.tint}" for scene in scenes]),
    )
    partial_path.replace(path)
    print(f"{path}: {count} images, for instance: {captions[0]}")


def make_tokenizer(folder: Path, art: Path) -> None:
    """A byte-level BPE tokenizer of CLIP's format, trained on the captions' words, identifiers and common words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    names = json.loads((art.parent / "unicode-emoji-json" / "data-by-emoji.json").read_text(encoding="utf-8"))
    emoji_words = " ".join(entry["name"] for entry in names.values()).lower().replace(":", " ").split()
    world = " ".join([*NOUNS, *COLOURS, *SETTINGS.values(), "a photo of an picture place background small big"]).split()
    # How often a word is said to occur decides which words become one token before the vocabulary is full.
    counts = {word: 2 for word in sorted(set(emoji_words)) if word.isalpha() and word.isascii()}
    counts |= dict.fromkeys(COMMON.split(), 20) | dict.fromkeys(IDENTIFIERS, 40) | dict.fromkeys(world, 200)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(alphabet),
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((word for word, count in counts.items() for _ in range(count)), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    merged = ["".join(merge) for merge in merges]
    # CLIP's order: the bytes, the bytes that end a word, the merges, the two special tokens.
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *dict.fromkeys(merged)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}), "utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")


if __name__ == "__main__":
    main()
