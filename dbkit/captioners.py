"""The captioners: BLIP's sentences and a tagger's tags, each a thing that turns prepared pixels into texts."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbkit.config import CaptionConfig
from dbkit.errors import DbkitError
from dbkit.libraries import choose_device, choose_dtype, hub_options, loading, quiet

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

# The models that are used when none is named, each at the commit this was written against.
PINNED = {
    "blip": ("Salesforce/blip-image-captioning-base", "82a37760796d32b1411fe092ab5d4e227313294b"),
    "tagger": ("SmilingWolf/wd-vit-tagger-v3", "7f6b584d0bd3f55c4531f14ba3d4761b2bccdc0f"),
}
# The category of the tags that say whom a picture may be shown to: general, sensitive, questionable, explicit.
_RATING = "9"


def _source(config: CaptionConfig, file: str) -> tuple[str, dict[str, Any]]:
    """A model's folder or Hugging Face id, and how to load it now; file is one that it has for certain."""
    name, revision = (config.model, None) if config.model else PINNED[config.captioner]
    if Path(name).is_dir():
        return name, {}
    return name, ({"revision": revision} if revision else {}) | hub_options(name, file, revision)


class Blip:
    """Sentences by BLIP (arXiv:2201.12086), found by beam search.

    There is no least length: one makes the model invent details until the sentence is long enough.
    """

    def __init__(self, config: CaptionConfig):
        self.search = {"num_beams": config.num_beams, "max_new_tokens": config.max_new_tokens}
        self.device = choose_device(config.device)
        self.dtype = choose_dtype("auto", self.device)
        name, options = _source(config, "config.json")
        with loading(name):
            from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

            # transformers would load other models too, and make up the weights that they lack.
            kinds = BlipConfig.get_config_dict(name, **options)[0].get("architectures") or ["of an unknown kind"]
            if BlipForConditionalGeneration.__name__ not in kinds:
                raise DbkitError(
                    f"the model {name} is {kinds[0]}; give one that is {BlipForConditionalGeneration.__name__}, or "
                    "leave model empty"
                )
            self.processor = BlipProcessor.from_pretrained(name, **options)
            model = BlipForConditionalGeneration.from_pretrained(name, **options)
        self.model = model.to(self.device, self.dtype).eval()

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """(3, S, S), normalized: the whole picture squeezed into a square, which is what BLIP learnt from."""
        return self.processor(images=picture, return_tensors="pt").pixel_values[0]

    def __call__(self, batch: list[torch.Tensor]) -> list[str]:
        """A sentence for each picture."""
        import torch

        pixels = torch.stack(batch).to(self.device, self.dtype)
        with quiet(), torch.no_grad():
            tokens = self.model.generate(pixel_values=pixels, do_sample=False, min_length=0, **self.search)
        # The first token is BLIP's start, which lies beyond its tokenizer's vocabulary.
        texts = self.processor.tokenizer.batch_decode(
            tokens[:, 1:], skip_special_tokens=True, clean_up_tokenization_spaces=True
        )
        return [text.strip() for text in texts]


class Tagger:
    """Danbooru tags by an ONNX model of SmilingWolf's wd family: a probability for each line of its table of tags."""

    def __init__(self, config: CaptionConfig):
        self.config = config
        self.banned = banned_tags(config)
        device = choose_device(config.device)
        onnxruntime = _onnxruntime()
        name, options = _source(config, "model.onnx")
        with loading(name):
            model, table = (_fetch(name, file, options) for file in ("model.onnx", "selected_tags.csv"))
            self.tags = _read_tags(table)
            self.session = _session(onnxruntime, model, device)
        count, *size = self.session.get_inputs()[0].shape
        known = self.session.get_outputs()[0].shape[-1]
        # A side that is not fixed is a name here, and so is a number of pictures that is not.
        if len(size) != 3 or not isinstance(size[0], int) or size != [size[0], size[0], 3]:
            raise DbkitError(f"the model {name} takes {size} and not squares in BGR; give a wd tagger")
        if known != len(self.tags):
            raise DbkitError(
                f"model.onnx of {name} knows {known} tags and selected_tags.csv {len(self.tags)}; take both from one "
                "place"
            )
        self.side, self.single = size[0], isinstance(count, int)

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """(S, S, 3), float32, BGR, 0 to 255: the whole picture, made square with white."""
        import numpy as np
        from PIL import Image

        scale = self.side / max(picture.size)
        # Shrunk before it is made square, since the square of a long picture might not fit into memory.
        size = [max(1, round(length * scale)) for length in picture.size]
        canvas = Image.new("RGB", (self.side, self.side), "white")
        place = ((self.side - size[0]) // 2, (self.side - size[1]) // 2)
        canvas.paste(picture.resize(size, Image.Resampling.BICUBIC), place)
        return np.asarray(canvas, np.float32)[:, :, ::-1]

    def __call__(self, batch: list[np.ndarray]) -> list[str]:
        """The tags of each picture, the likeliest first, joined by commas; empty where none is likely enough."""
        import numpy as np

        name = self.session.get_inputs()[0].name
        groups = [[pixels] for pixels in batch] if self.single else [batch]
        rows = [row for group in groups for row in self.session.run(None, {name: np.stack(group)})[0]]
        return [", ".join(self._likely(row)) for row in rows]

    def _likely(self, probabilities: np.ndarray) -> list[str]:
        found = []
        for number in (-probabilities).argsort(kind="stable"):
            tag, category = self.tags[number]
            if probabilities[number] < self.config.threshold:
                break
            if category != _RATING and _plain_tag(tag) not in self.banned:
                found.append(_spelt(tag, self.config))
        return found


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DbkitError(
            f"captioner tagger needs onnxruntime, which does not work here ({error}); pip install onnxruntime"
        ) from error
    return onnxruntime


def _fetch(name: str, file: str, options: dict[str, Any]) -> Path:
    """A file of the model, in its folder or in the Hub's cache."""
    from huggingface_hub import hf_hub_download

    if not Path(name).is_dir():
        return Path(hf_hub_download(name, file, **options))
    if not (Path(name) / file).is_file():
        raise OSError(f"{file} is missing")
    return Path(name) / file


def _read_tags(table: Path) -> list[tuple[str, str]]:
    """The name and the category of each tag, in the order of the model's probabilities."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.DictReader(file)
        if missing := {"name", "category"} - set(lines.fieldnames or ()):
            raise ValueError(f"{table.name} has no column {' and none '.join(sorted(missing))}")
        return [(line["name"], line["category"]) for line in lines]


def _session(onnxruntime: Any, model: Path, device: torch.device) -> Any:
    """The model, ready to run: by CUDA where the device is one and onnxruntime can, else by the CPU."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    # onnxruntime's errors have no common class.
    errors = tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    cuda = "CUDAExecutionProvider"
    able = device.type == "cuda" and cuda in onnxruntime.get_available_providers()
    settings = onnxruntime.SessionOptions()
    # Errors only: its warnings are about how the file was made.
    settings.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(model), settings, providers=[cuda] * able + ["CPUExecutionProvider"])
    except errors as error:
        raise OSError(str(error)) from error


def banned_tags(config: CaptionConfig) -> set[str]:
    """The tags that are never written. No tag has a comma in it, so several may stand in one text."""
    return {_plain_tag(tag) for text in config.blacklist for tag in text.split(",") if tag.strip()}


def _plain_tag(tag: str) -> str:
    return "_".join(tag.casefold().split())


def _spelt(tag: str, config: CaptionConfig) -> str:
    """A tag as it is written in a caption."""
    # In an emoticon the underscore is a mouth: ^_^, o_o, (o)_(o), ||_||. Danbooru has many of all lengths; what sets
    # them apart from words is that no two letters or digits stand side by side in them.
    if not config.underscores and re.search(r"[^\W_]{2}", tag):
        tag = tag.replace("_", " ")
    return tag.replace("(", "\\(").replace(")", "\\)") if config.escape else tag
