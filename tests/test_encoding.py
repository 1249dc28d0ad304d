"""What a run's file of latents holds is what the VAE would give, bit for bit; what it does not hold is encoded."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conftest import draw_photo
from PIL import Image
from test_train import assert_equal, assert_same_run, state_of, stop_in_pass
from torch.nn.modules.module import register_module_forward_pre_hook

from dbkit import DbkitError, encoding, train
from dbkit.cache import encode_images
from dbkit.concepts import concepts_of
from dbkit.encoding import FILE, Picture, at_once, encode, files_near
from dbkit.examples import instance_examples
from dbkit.images import View, read_image, render
from dbkit.models import load_models, read_weights
from dbkit.settings import replace
from dbkit.tensor_files import open_tensors

CPU = torch.device("cpu")
CASES = {
    "plain": {},
    "mirrored": {"hflip": True},
    "buckets": {"use_aspect_ratio_bucket": True, "hflip": True, "center_crop": False},
    "varied": {"augment_rotation": 5, "augment_crop": 0.3, "augment_brightness": 0.1, "augment_contrast": 0.1},
    "masked": {"masked_loss": True, "unmasked_weight": 0.2},
    "inpainting": {"inpainting_masks": 3, "hflip": True},
}


@pytest.fixture(scope="module")
def models(model):
    return load_models(model)


@contextlib.contextmanager
def counted():
    """Yield a list that gets the number of pictures of each pass through a VAE's encoder."""
    passes: list[int] = []

    def count(module, inputs):
        if type(module).__name__ == "Encoder":
            passes.append(len(inputs[0]))

    handle = register_module_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def examples_of(config):
    return instance_examples(config, concepts_of(config))


def pictures_of(config):
    return [Picture(example, view) for example in examples_of(config) for view in example.views]


def assert_same(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    assert len(one) == len(two) > 0
    assert all(torch.equal(first, second) for first, second in zip(one, two))


@pytest.mark.parametrize("case", CASES)
def test_what_is_found_is_what_would_be_encoded(case, models, inpainting_model, config, photos, tmp_path):
    """All of it, and where a part is found, in whatever order; the VAE then sees the rest alone."""
    draw_photo(photos / "wide.png", (160, 80)).with_suffix(".txt").write_text("a wide thing")
    (photos / "masks").mkdir()
    Image.linear_gradient("L").resize((160, 80)).save(photos / "masks" / "wide.png")
    config = replace(config, **CASES[case])
    models = load_models(inpainting_model) if case == "inpainting" else models
    sets = [examples_of(config), examples_of(replace(config, center_crop=False))[::-1]]
    files = [tmp_path / "run" / FILE]

    def fields(files=()):
        with counted() as passes:
            found = encode_images(models, sets, config, CPU, files)
        tensors = [
            tensor
            for latents, _ in found
            for part in latents
            for tensor in dataclasses.astuple(part)
            if tensor is not None
        ]
        return [places for _, places in found], tensors, len(passes)

    places, expected, all_passes = fields()
    encode_images(models, [sets[0][1:3]], config, CPU, files)
    for least, most in ((1, all_passes - 1), (0, 0)):
        again, tensors, passes = fields(files)
        assert least <= passes <= most and again == places
        assert_same(tensors, expected)


def test_the_file_holds_mean_and_std_of_each_view_once(models, config, photos, tmp_path):
    shutil.copy(photos / "gold.png", photos / "again.png")
    pictures = pictures_of(replace(config, hflip=True))
    with counted() as passes:
        latents = encode(models.vae, pictures, CPU, [tmp_path / FILE])
    stored, _ = open_tensors(tmp_path / FILE)
    assert (len(pictures), len(passes), len(stored)) == (8, 6, 6)
    for picture, found in zip(pictures, latents):
        image = render(read_image(picture.example.path), picture.example.size, picture.view)
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = models.vae.encode(pixels).latent_dist
        wanted = torch.cat([posterior.mean, posterior.std]) * models.vae.config.scaling_factor
        torch.testing.assert_close(found, wanted)
    held = [tensor.read() for tensor in stored.values()]
    assert all(any(torch.equal(found, tensor) for tensor in held) for found in latents)


def changed_weight(vae):
    with torch.no_grad():
        next(vae.encoder.parameters()).view(-1)[0] += 1e-3


def test_latents_that_are_no_numbers_are_not_kept(model, config, tmp_path):
    vae, path = load_models(model).vae, tmp_path / FILE
    vae.encoder.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 0,) if vae.breaks else None)
    for vae.breaks, kept in ((True, 0), (False, 3)):
        encode(vae, pictures_of(config), CPU, [path])
        assert len(open_tensors(path)[0]) == kept


def changed_scale(vae):
    vae.register_to_config(scaling_factor=0.5)


def changed_decoder(vae):
    with torch.no_grad():
        next(vae.decoder.parameters()).view(-1)[0] += 1


@pytest.mark.parametrize(("change", "passes"), [(changed_weight, 3), (changed_scale, 3), (changed_decoder, 0)])
def test_another_vae_encodes_again_and_another_decoder_does_not(change, passes, model, config, tmp_path):
    pictures, vae = pictures_of(config), load_models(model).vae
    encode(vae, pictures, CPU, [tmp_path / FILE])
    change(vae)
    with counted() as seen:
        latents = encode(vae, pictures, CPU, [tmp_path / FILE])
    assert len(seen) == passes
    assert_same(latents, encode(vae, pictures, CPU))


def test_a_library_of_another_version_encodes_again(models, config, tmp_path, monkeypatch):
    encode(models.vae, pictures_of(config), CPU, [tmp_path / FILE])
    monkeypatch.setattr(PIL, "__version__", PIL.__version__ + "1")
    with counted() as passes:
        encode(models.vae, pictures_of(config), CPU, [tmp_path / FILE])
    assert len(passes) == 3


def test_what_is_changed_of_a_picture_is_encoded_again_and_its_name_is_none_of_it(models, config, photos, tmp_path):
    def passes(**changes):
        own = replace(config, **changes)
        with counted() as seen:
            latents = encode(models.vae, pictures_of(own), CPU, [tmp_path / FILE])
        assert_same(latents, encode(models.vae, pictures_of(own), CPU))
        return len(seen)

    assert passes() == 3
    (photos / "gold.png").rename(photos / "another name.png")
    assert passes() == 0
    draw_photo(photos / "teal.png", colour="navy")
    assert passes() == 1
    assert passes(resolution=32) == 3
    assert passes(center_crop=False) == 3  # what the file held before is not needed any more
    assert passes(center_crop=False, hflip=True) == 3
    assert passes(center_crop=False, seed=1) == 3


def test_a_picture_that_changes_while_training_begins_is_refused_and_its_latents_are_not_kept(
    models, config, photos, tmp_path
):
    pictures = pictures_of(config)
    draw_photo(photos / "teal.png", colour="navy")
    with pytest.raises(DbkitError, match=r"teal\.png was changed after training began; start training again"):
        encode(models.vae, pictures, CPU, [tmp_path / FILE])
    assert not (tmp_path / FILE).exists()


def test_a_picture_is_framed_as_the_kept_latents_were():
    """Where this has to change, so has encoding._FORMAT: otherwise latents of the earlier framing would be found."""
    y, x = np.mgrid[:40, :60]
    image = Image.fromarray(np.stack([4 * x, 6 * y, 3 * x + 2 * y], axis=-1).astype(np.uint8))
    for view, diagonal in (
        (View(), [[57, 27, 52], [98, 85, 102], [138, 149, 153], [179, 207, 203]]),
        (
            View((0.2, 1.0), share=0.6, flip=True),
            [[111, 111, 120], [87, 147, 114], [63, 184, 108], [39, 219, 102]],
        ),
        (
            View((1.0, 0.3), degrees=20, brightness=1.2, contrast=0.7),
            [[162, 75, 143], [172, 123, 167], [186, 167, 191], [205, 221, 224]],
        ),
    ):
        seen = np.asarray(render(image, (4, 4), view), dtype=int).reshape(-1, 3)[::5]
        assert np.abs(seen - diagonal).max() <= 2


def test_another_hole_is_another_picture(config):
    example, holes = examples_of(config)[0], [np.zeros((8, 8), np.float32) for _ in range(3)]
    holes[1][2, 3] = 1
    places = [Picture(example, View(), hole).address("vae") for hole in (None, *holes)]
    assert places[1] == places[3] and len(set(places)) == 3


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "nothing": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "a bit of the last value": lambda data: flipped(data, len(data) - 1),
    "a bit of the header's length": lambda data: flipped(data, 2),
    "a digest": lambda data: data.replace(b'":"', b'":"0', 1),
    "text": lambda data: b"<html>404</html>",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_said_and_made_again(damage, models, config, tmp_path, capsys):
    pictures, path = pictures_of(config), tmp_path / FILE
    expected = encode(models.vae, pictures, CPU, [path])
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    capsys.readouterr()
    with counted() as passes:
        assert_same(encode(models.vae, pictures, CPU, [path]), expected)
    # Of one entry alone it costs that one.
    assert len(passes) == (1 if damage == "a bit of the last value" else 3)
    sentence = f"{path} is damaged or cannot be read; the latents that are not whole in it are made again\n"
    assert sentence in capsys.readouterr().out
    assert path.read_bytes() == whole
    encode(models.vae, pictures, CPU, [path])
    said = capsys.readouterr().out
    assert "damaged" not in said and "latents, 3 of 3 found" in said


def test_no_tensor_passes_for_another(models, config, tmp_path):
    """Two entries of a file change their names, each with its digest."""
    pictures, path = pictures_of(config), tmp_path / FILE
    expected = encode(models.vae, pictures, CPU, [path])
    one, two = list(open_tensors(path)[0])[:2]
    data = path.read_bytes().replace(one.encode(), b"?" * 64).replace(two.encode(), one.encode())
    path.write_bytes(data.replace(b"?" * 64, two.encode()))
    assert open_tensors(path)[0].keys() >= {one, two}
    with counted() as passes:
        assert_same(encode(models.vae, pictures, CPU, [path]), expected)
    assert len(passes) == 2


def test_a_full_disk_is_said_and_the_older_file_stays(models, config, photos, small_disk, capsys):
    path = small_disk / FILE
    encode(models.vae, pictures_of(config)[:1], CPU, [path])
    whole = path.read_bytes()
    (small_disk / "rest").write_bytes(bytes(64 * 1024 - 4096 * 3))
    for number in range(8):
        draw_photo(photos / f"{number}.png", colour=(number, 0, 0))
    assert_same(encode(models.vae, pictures_of(config), CPU, [path]), encode(models.vae, pictures_of(config), CPU))
    said = capsys.readouterr().out
    assert f"the latents could not be kept: the disk of {small_disk} is full" in said
    assert "; training goes on, and the next run encodes them again" in said
    assert path.read_bytes() == whole and sorted(found.name for found in small_disk.iterdir()) == [FILE, "rest"]


def test_a_place_that_cannot_be_written_is_said_and_training_goes_on(config, capsys):
    (config.output_dir / f"{FILE}.partial").mkdir(parents=True)
    train(config)
    assert "the latents could not be kept: " in capsys.readouterr().out
    assert not (config.output_dir / FILE).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a process is forked and killed by a signal")
@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_a_kill_while_the_file_is_written_leaves_the_older_one(event, models, config, photos, tmp_path):
    path = tmp_path / FILE
    encode(models.vae, pictures_of(config), CPU, [path])
    whole = path.read_bytes()
    draw_photo(photos / "new.png", colour="navy")
    pictures = pictures_of(config)

    def kill(name, arguments):
        """When its writer has opened the file and nothing is in it yet, or all is and it is about to take its name."""
        if name == event and str(arguments[0]).endswith(f"{FILE}.partial") and arguments[1] != "w":
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        sys.addaudithook(kill)
        encode(models.vae, pictures, CPU, [path])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == whole and path.with_name(f"{FILE}.partial").exists()
    with counted() as passes:
        encode(models.vae, pictures, CPU, [path])
    assert len(passes) == 1 and [found.name for found in tmp_path.glob("*latents*")] == [FILE]


def test_a_batch_has_always_the_same_number_of_pictures(models, config, photos, tmp_path, monkeypatch):
    """The last one is filled up, so that what a picture becomes does not depend on what else is encoded."""
    assert [at_once(size, "cuda") for size in ((512, 512), (704, 320), (256, 256), (1024, 1024))] == [4, 4, 16, 1]
    assert at_once((64, 64), "cpu") == 1
    for number in range(3):
        draw_photo(photos / f"{number}.png", (128, 64), colour=(40 * number, 0, 0))
    pictures = pictures_of(replace(config, use_aspect_ratio_bucket=True))
    alone = encode(models.vae, pictures, CPU)
    monkeypatch.setitem(encoding.PIXELS_AT_ONCE, "cpu", 2 * 80 * 80)
    with counted() as passes:
        together = encode(models.vae, pictures, CPU)
    assert passes == [2, 2, 2, 2]
    for one, other in zip(alone, together):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    encode(models.vae, pictures[1:3], CPU, [tmp_path / FILE])
    assert_same(encode(models.vae, pictures[::-1], CPU, [tmp_path / FILE])[::-1], together)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_a_picture_becomes_the_same_in_any_company(model, config, photos, tmp_path):
    for number in range(10):
        draw_photo(photos / f"{number}.png", colour=(20 * number, 0, 0))
    pictures, vae, gpu = pictures_of(replace(config, resolution=256)), load_models(model).vae, torch.device("cuda")
    expected = encode(vae, pictures, gpu)
    encode(vae, pictures[3:8], gpu, [tmp_path / FILE])
    assert_same(encode(vae, pictures[::-1], gpu, [tmp_path / FILE])[::-1], expected)


def test_latents_are_looked_for_in_the_run_then_at_home_then_in_the_newest_runs_beside_them(tmp_path):
    run, home = tmp_path / "local" / "run", tmp_path / "home" / "run"
    others = [folder.parent / str(number) for number in range(7) for folder in (run, home)]
    for number, folder in enumerate((run, home, *others)):
        folder.mkdir(parents=True)
        (folder / FILE).touch()
        os.utime(folder / FILE, (number, number))
    newest = [folder / FILE for folder in others[::-1]]
    assert files_near(run, home) == [run / FILE, home / FILE, *newest[:10]]
    shutil.rmtree(home.parent)
    assert files_near(run, home)[:3] == [run / FILE, home / FILE, newest[1]]
    assert files_near(tmp_path / "no" / "run", tmp_path / "no" / "run") == [tmp_path / "no" / "run" / FILE]


@pytest.fixture
def small(config, smaller_model):
    return replace(config, pretrained_model_name_or_path=str(smaller_model), hflip=True, log_interval=1)


def apart(config, tmp_path: Path):
    """A training that finds nothing of other runs."""
    return replace(config, output_dir=tmp_path / "apart" / "run")


def test_the_next_run_encodes_nothing_and_learns_the_same(small, prior, tmp_path, capsys):
    config = replace(small, **prior)
    other = replace(config, output_dir=tmp_path / "other")
    for run, changes, found in ((config, {}, 0), (other, {}, 8), (config, {"start_over": True}, 8)):
        with counted() as passes:
            train(run, **changes)
        assert len(passes) == 8 - found and f"latents, {found} of 8 found" in capsys.readouterr().out
    straight = apart(config, tmp_path)
    train(straight)
    for run in (config.output_dir, other.output_dir):
        assert_same_run(run, straight.output_dir)
        assert (run / FILE).read_bytes() == (straight.output_dir / FILE).read_bytes()


@pytest.mark.parametrize("lost", [False, True], ids=["found", "lost"])
def test_a_run_that_goes_on_is_the_one_that_would_have_been_with_the_file_and_without(lost, small, tmp_path):
    straight = apart(replace(small, max_train_steps=4), tmp_path)
    train(straight)
    config = replace(small, max_train_steps=4)
    stop_in_pass(config, 2, 2)
    if lost:
        (config.output_dir / FILE).unlink()
    with counted() as passes:
        train(config)
    assert len(passes) == (6 if lost else 0)
    assert_same_run(config.output_dir, straight.output_dir)


def test_after_the_machine_is_gone_the_file_comes_from_home(small, tmp_path):
    config = replace(small, local_dir=tmp_path / "machine" / "disk")
    stop_in_pass(config, 1, 1)
    shutil.rmtree(tmp_path / "machine")
    assert (config.output_dir / FILE).is_file()
    with counted() as passes:
        train(config)
    assert passes == []
    straight = apart(small, tmp_path)
    train(straight)
    assert_equal(state_of(config.output_dir), state_of(straight.output_dir))


def test_a_changed_picture_or_caption_is_noticed_by_the_next_run(small, photos, tmp_path):
    config = replace(small, instance_prompt=None, use_txt_as_label=True)

    def learnt(name, expected):
        """What a run beside those before it learns; it is what it would learn alone."""
        made = [
            read_weights(train(config, output_dir=tmp_path / folder), "unet")
            for folder in (name, f"apart from {name}/run")
        ]
        assert_equal(*made)
        return made[0]

    with counted() as passes:
        first = learnt("first", passes)
        assert len(passes) == 2 * 6
        for path in photos.glob("*.txt"):
            path.write_text("something else")
        second = learnt("second", passes)
        assert len(passes) == 3 * 6
        for path in photos.glob("*.png"):
            draw_photo(path, colour="black")
        third = learnt("third", passes)
        assert len(passes) == 3 * 6 + 2 * 2  # three equal pictures now
    for one, other in ((first, second), (second, third)):
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_file_of_an_earlier_form_is_no_error(models, config, tmp_path):
    """Whatever was written: what is not found under its address is encoded."""
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(3, 4)}, tmp_path / FILE, {"version": json.dumps(0)})
    with counted() as passes:
        encode(models.vae, pictures_of(config), CPU, [tmp_path / FILE])
    assert len(passes) == 3
