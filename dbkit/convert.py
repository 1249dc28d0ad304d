"""convert(): original Stable Diffusion files to diffusers folders and back, each result read back and compared."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dbkit.config import ConvertConfig
from dbkit.downloads import Place, fetch, find, is_folder
from dbkit.embedded import is_embedded
from dbkit.errors import DbkitError, counted, reason_of, some
from dbkit.families import is_lora, require_usual, unusual
from dbkit.files import (
    full_disk_is_a_sentence,
    one_process,
    require_place,
    require_space,
    safe_name,
    share,
    size,
    sync,
    whole_file,
    write_text,
)
from dbkit.hub import require_hub, upload_files
from dbkit.layouts import to_original
from dbkit.libraries import quiet
from dbkit.lora import lora_file
from dbkit.lora_files import convert_lora
from dbkit.models import LORA_BASE, WEIGHTS, Models, precision_dtype, require_replaceable, save_all_but_weights
from dbkit.original_config import config_beside, original_config, read_prediction_type, require_replaceable_config
from dbkit.proof import prove, table
from dbkit.receipts import RECEIPT, architecture, model_spec, picture, run_receipt, step_of
from dbkit.settings import configured_by, replace
from dbkit.stored_models import METADATA, StoredModel, empty_modules, read_file, read_folder
from dbkit.tensor_files import (
    SAFETENSORS,
    Stored,
    damage,
    is_finite,
    open_tensors,
    read_back,
    same,
    write_ckpt,
    write_safetensors,
)
from dbkit.tokenizer import SD2_PAD, added_words, load_tokenizer, load_tokenizer_tables
from dbkit.workspace import download, require_download

if TYPE_CHECKING:
    import torch

_FILES = (SAFETENSORS, ".ckpt")


@configured_by(ConvertConfig)
def convert(config: ConvertConfig) -> Path:
    """Turn an original Stable Diffusion file into a diffusers folder, a folder into a file, or a LoRA file into the
    other of its two forms (kohya's and diffusers' names); returns what was made. Of a run's LoRA folder it is a file
    under the names that user interfaces read.

    The direction follows from the source, which is downloaded where it is elsewhere. Before what was written takes its
    final name it is read back, by the libraries' own readers and by dbkit's, and compared with the source: tensor by
    tensor, and by what both compute from the same inputs. Raises DbkitError for other families and damaged files.
    """
    place = find(config.source, _FILES)
    made = _converted(replace(config, destination=_reached(config.destination)), place)
    parts = [path for path in (made, *made.rglob("*")) if path.is_file()]
    # Of an address the query may be a secret, and the embedded model goes by its name.
    source = config.source if isinstance(place, Path) else place
    origin = step_of(place if place.is_dir() else place.parent) if isinstance(place, Path) else None
    print(f"{made} ({size(sum(path.stat().st_size for path in parts))}) is {origin or f'made from {source}'}")
    return made


def _converted(config: ConvertConfig, place: Place) -> Path:
    if isinstance(place, Path) and (place / LORA_BASE).is_file():
        config = replace(config, source=lora_file(place))
        _require_hands(config)
        return _handed_out(config, convert_lora(config, of_run=True))
    if is_folder(place):
        return _to_file(config, place)
    to_file = config.destination.suffix.lower() == SAFETENSORS and not str(place).lower().endswith(".ckpt")
    if isinstance(place, Path) or to_file:
        # Of a file another file is made only where it is a LoRA, which its tensors show.
        place = fetch(place, _FILES, config.sha256)
        config = replace(config, source=place, sha256=None)
        if place.suffix.lower() == SAFETENSORS and is_lora(open_tensors(place)[0]):
            _require_hands(config)
            return _handed_out(config, convert_lora(config))
    return _to_folder(config, place)


def _reached(destination: Path) -> Path:
    """The destination, or the folder that it is a link to. Raises DbkitError where nothing can be put there."""
    require_place(destination)
    try:
        found = destination.resolve()
        broken = [path for path in (destination, *destination.parents) if path.is_symlink() and not path.exists()]
    except (OSError, RuntimeError):  # links that lead round in a circle
        broken = [destination]
    if broken:
        raise DbkitError(f"{broken[0]} is a link that leads nowhere; remove it or choose another destination")
    # The folder that one is in may be gone.
    with contextlib.suppress(FileNotFoundError):
        if Path.cwd().is_relative_to(found):
            raise DbkitError(f"{destination} is the folder that you are in, or holds it; give the name of another one")
    return found if destination.is_symlink() and destination.is_dir() else destination


def _to_file(config: ConvertConfig, place: Place) -> Path:
    destination = config.destination
    suffix = destination.suffix.lower()
    if suffix not in _FILES:
        raise DbkitError(
            f"{place} is a folder, so the destination is a file: end {destination} in .safetensors or .ckpt"
        )
    _require_new(config)
    if isinstance(place, Path) and destination.resolve().is_relative_to(place.resolve()):
        raise DbkitError(f"{destination} would lie in the model {place} itself; choose another destination")
    _require_hands(config)
    beside = config_beside(destination)
    source = fetch(place, _FILES, config.sha256)
    config = replace(config, source=source)
    model = read_folder(config)
    _require_carried(config, model, source)
    tensors = to_original(model.weights, model.family.is_sd2, model.family.name, source)
    # User interfaces take a model for one that predicts noise, or guess, unless this file tells them.
    is_v = model.configs["scheduler"].get("prediction_type") == "v_prediction"
    told = original_config(model.configs, **vars(model.family)) if model.family.is_sd2 or is_v else None
    stale = not told and read_prediction_type(beside) is not None
    if told:
        require_replaceable_config(beside)
    elif stale and not config.overwrite:
        raise DbkitError(
            f"{beside} is of another model, and user interfaces would read it for {destination.name}; choose another "
            "name, or set overwrite, which removes it"
        )
    noted = _notes(model, source, destination.stem, is_v, config.license)
    with _Writer(config, tensors, destination) as writer, whole_file(destination, alone=True) as partial:
        _require_new(config)
        writer.write(tensors, partial, suffix, noted)
        writer.finish()
        writer.prove(model, read_file(ConvertConfig(partial, destination), suffix))
        _require_new(config)
        if told:
            write_text(beside, told)
        elif stale:
            beside.unlink()
    return _handed_out(config, destination, *([beside] if told else []))


def _require_new(config: ConvertConfig) -> None:
    if config.destination.is_dir():
        raise DbkitError(f"{config.destination} is a folder, and the destination is a file; choose another name")
    if config.destination.exists() and not config.overwrite:
        raise DbkitError(f"{config.destination} exists; choose another name, or set overwrite")


def _require_carried(config: ConvertConfig, model: StoredModel, source: Path) -> None:
    """Raise DbkitError for what no file carries to user interfaces; say what dbkit alone reads from its file."""
    is_sd2 = model.family.is_sd2
    require_usual(model.configs, is_sd2, source, model.other_vae)
    if words := added_words(source / "tokenizer"):
        raise DbkitError(
            f"the tokenizer of {source} has added words ({some(words)}), which no file carries; use it as a folder, or "
            "take a model without them"
        )
    if is_embedded(source):
        print(
            f"{config.destination} is for practice: it is of dbkit's own small model, which other programs cannot use"
        )
    elif odd := unusual(model.configs, is_sd2):
        print(
            f"user interfaces will make other pictures from {config.destination} than the model does, unless they are "
            f"told of its {', '.join(odd)}; dbkit reads that from its note in the file"
        )


def _require_hands(config: ConvertConfig) -> None:
    """Raise DbkitError where what is made could not be handed out as asked for."""
    require_download(config.download)
    require_hub(config, config.destination.stem)


def _handed_out(config: ConvertConfig, made: Path, *beside: Path) -> Path:
    """The file that was made, uploaded or downloaded with what belongs to it, if that is asked for."""
    upload_files(config, [made, *beside])
    for path in (made, *beside) if config.download else ():
        download(path)
    return made


def _to_folder(config: ConvertConfig, place: Place) -> Path:
    destination = config.destination
    if isinstance(place, Path) and place.suffix.lower() not in _FILES:
        raise DbkitError(f"{place} is neither a folder nor a .safetensors or .ckpt file; choose one of these")
    if destination.suffix.lower() in _FILES or destination.is_file():
        raise DbkitError(f"the source is a file, so the destination is a folder: {destination} is not one")
    if config.push_to_hub or config.download:
        raise DbkitError(f"push_to_hub and download are for a file, and {destination} is a folder; leave them out")
    require_free = functools.partial(
        require_replaceable, destination, config.overwrite, place if isinstance(place, Path) else destination.parent
    )
    require_free()
    source = fetch(place, _FILES, config.sha256)
    config = replace(config, source=source)
    model = read_file(config)
    models = _without_weights(model, config)
    everything = {f"{part} {name}": t for part, weights in model.weights.items() for name, t in weights.items()}
    with _Writer(config, everything, destination) as writer, _whole_folder(destination, require_free) as partial:
        save_all_but_weights(models, partial)
        for part, weights in model.weights.items():
            path = partial / part / WEIGHTS[part]
            writer.write(weights, path, SAFETENSORS, {"format": "pt"}, f"{part} ")
            share(path)
        writer.finish()
        writer.prove(model, read_folder(ConvertConfig(partial, destination)))
    return destination


def _notes(model: StoredModel, source: Path, title: str, is_v: bool, license: str | None) -> dict[str, str]:
    """What a file says beside its tensors: to become the same folder again, to user interfaces, and of its run."""
    facts = {"configs": model.configs, "tokenizer": model.tokenizer}
    noted = {METADATA: json.dumps(facts, ensure_ascii=False, sort_keys=True)}
    receipt, unet, family = run_receipt(source), model.configs["unet"], model.family
    if receipt:
        noted[RECEIPT] = json.dumps(receipt, ensure_ascii=False, sort_keys=True)
    learnt = receipt["settings"] if receipt else {}
    side = learnt.get("resolution") or unet["sample_size"] * 2 ** (len(model.configs["vae"]["block_out_channels"]) - 1)
    author = "Stability-AI/stablediffusion" if family.is_sd2 else "CompVis/stable-diffusion"
    return noted | model_spec(
        title,
        architecture(family.is_sd2, is_v, family.inpaints),
        is_v,
        (side, side),
        learnt.get("instance_prompt"),
        thumbnail=picture(source),
        license=license,
        implementation=f"https://github.com/{author}",
    )


@contextlib.contextmanager
def _whole_folder(destination: Path, require_free: Callable[[], None]) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of the destination when the block ends well.

    require_free is asked once more then, for something else may have come there meanwhile. What a kill left of an
    earlier conversion goes first, with the model that it was about to replace put back.
    """
    with one_process(destination, stays=False) as locked, full_disk_is_a_sentence(destination.parent):
        if locked:
            _restore(destination)
        require_free()
        # Of a name that nobody else has: what is deleted in the end is dbkit's own.
        place = Path(tempfile.mkdtemp(_PARTIAL, _hidden(destination), destination.parent))
        new, old = place / "new", place / "old"
        try:
            yield new
            for path in new.rglob("*"):
                if path.is_file():
                    sync(path)
            require_free()
            if destination.exists():
                destination.rename(old)
            new.rename(destination)
        finally:
            if old.exists() and not destination.exists():
                old.rename(destination)
            shutil.rmtree(place, ignore_errors=True)


_PARTIAL = ".partial"


def _hidden(destination: Path) -> str:
    """How the names of a destination's temporary folders begin, and of no other's."""
    digest = hashlib.sha256(os.fsencode(destination.name)).hexdigest()[:8]
    return f".{safe_name(destination.name, 40)}-{digest}."


def _restore(destination: Path) -> None:
    """Remove what a killed conversion left beside the destination; the model that it had moved away comes back."""
    for left in destination.parent.glob(f"{glob.escape(_hidden(destination))}*{_PARTIAL}"):
        new, old = left / "new", left / "old"
        if old.exists() and not destination.exists():
            old.rename(destination)
            print(f"{destination} is back: a conversion that was killed had moved it away and put nothing in its place")
        elif old.exists() and new.exists():
            print(f"{old} is the model that a killed conversion moved away from {destination}; move it or delete it")
            continue
        shutil.rmtree(left, ignore_errors=True)


# This share of a tensor's values becoming zero in a narrower type is worth a word.
_MANY = 0.01


class _Writer:
    """Writes tensors in the precision asked for and compares what lies on the disk with the source, under one bar."""

    def __init__(self, config: ConvertConfig, tensors: dict[str, Stored], destination: Path) -> None:
        from tqdm import tqdm

        self.source, self.destination, self.precision = config.source, destination, config.save_precision
        self.dtype = precision_dtype(config.save_precision)
        self.faults: dict[str, int] = {}
        # How many values became zero, where they are many.
        self.vanished: dict[str, int] = {}
        needed = sum(self._cast(name, tensor).nbytes for name, tensor in tensors.items())
        require_space(destination.parent, needed, str(destination))
        # Each byte is written and read back.
        self.bar = tqdm(
            desc="converting", total=2 * needed, unit="B", unit_scale=True, file=sys.stdout, mininterval=1, leave=False
        )

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def _cast(self, name: str, tensor: Stored) -> Stored:

        if not tensor.dtype.is_floating_point:
            return tensor
        dtype = self.dtype or tensor.dtype

        def change(values: torch.Tensor) -> torch.Tensor:
            cast = values.to(dtype)
            if not is_finite(cast):
                self.faults[name] = int((~cast.isfinite()).sum())
            if dtype.itemsize < tensor.dtype.itemsize:
                vanished = int(values.count_nonzero() - cast.count_nonzero())
                if vanished > _MANY * values.numel():
                    self.vanished[name] = vanished
            return cast

        return tensor.changed(change, dtype=dtype)

    def write(
        self, tensors: dict[str, Stored], path: Path, suffix: str, noted: dict[str, str], owner: str = ""
    ) -> None:
        """Write a file and read it back. Raises DbkitError where that gives something else.

        owner is what the tensors are called after in sentences: a part and a space.
        """
        tensors = {name: self._cast(owner + name, tensor) for name, tensor in tensors.items()}
        if suffix == SAFETENSORS:
            write_safetensors(tensors, path, {"format": "pt", **noted}, self.bar.update)
        else:
            write_ckpt(tensors, path, noted, self.bar.update)
        if self.faults:
            return
        try:
            different = [owner + name for name in self._different(read_back(path, suffix), tensors)]
        except damage() as error:
            different = [next(iter(str(error).splitlines()), "") or repr(error)]
        if different:
            raise DbkitError(
                f"{self.destination} reads back differently from its source ({some(different, 10)}); the disk may be "
                "failing, write elsewhere"
            )

    def _different(self, written: dict[str, Stored], tensors: dict[str, Stored]) -> list[str]:
        """The names whose tensors differ in value or type, or are on one side alone."""
        different = sorted(written.keys() ^ tensors.keys())
        for name in sorted(written.keys() & tensors.keys()):
            wanted, found = tensors[name], written[name]
            if (found.dtype, found.shape) != (wanted.dtype, wanted.shape) or not same(found.read(), wanted.read()):
                different.append(name)
            self.bar.update(wanted.nbytes)
        return different

    def prove(self, source: StoredModel, written: StoredModel) -> None:
        """Compare what both models compute, and say how they compare."""
        self.bar.set_description("computing with both")
        weights = [tensor for tensors in source.weights.values() for tensor in tensors.values()]
        changes = any(self._cast("", tensor).dtype != tensor.dtype for tensor in weights)
        proofs = prove(source, written, self.destination, self._cast if changes else None)
        self.bar.close()
        if source.other_vae:
            print(f"the VAE in it is {source.other_vae}")
        print(table(proofs))

    def finish(self) -> None:
        """Raise DbkitError if any value was no number: such a file would be black pictures. Say if many became zero."""
        if self.vanished:
            values, names = counted(sum(self.vanished.values()), "value"), some(list(self.vanished))
            self.bar.write(
                f"{values} in {names} became zero, being too small for {self.precision}; set save_precision to bf16 or "
                "fp32 to keep them"
            )
        if self.faults:
            values = counted(sum(self.faults.values()), "value")
            precision = self.precision or "their type"
            raise DbkitError(
                f"{self.source} has {values} in {some(list(self.faults), 10)} that are no numbers or do not fit in "
                f"{precision}; " + ("set save_precision to bf16 or fp32" if self.precision else "take another file")
            )


def _without_weights(model: StoredModel, config: ConvertConfig) -> Models:
    """Everything of a diffusers folder but the weights. Raises DbkitError where notes in a file are of no model."""
    with quiet():
        from diffusers import DDPMScheduler

    modules, settings = empty_modules(model, config.source), model.configs["scheduler"]
    with quiet():
        noise_scheduler = DDPMScheduler.from_config(settings)
    if not model.tokenizer:
        pad = {"pad_token": SD2_PAD} if model.family.is_sd2 else {}
        tokenizer = load_tokenizer(config.tokenizer_name, **pad)
    else:
        tables = model.tokenizer
        try:
            tokenizer = load_tokenizer_tables(tables["vocab"], tables["merges"], model.configs["tokenizer"])
            if type(tokenizer.model_max_length) is not int:
                raise ValueError(f"model_max_length is {tokenizer.model_max_length!r}")
        except Exception as error:  # the tokenizers library has none but this
            raise DbkitError(
                f"the tokenizer that dbkit noted in {config.source} cannot be made ({reason_of(error)}); download or "
                "copy the file again"
            ) from error
    return Models(tokenizer=tokenizer, noise_scheduler=noise_scheduler, scheduler_config=settings, **modules)
