"""Models are read whatever spelling, copy and precision their tensors come in; what they predict must be stated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dbkit import ConvertConfig, DbkitError, convert, keys
from dbkit.models import WEIGHTS, load_models, read_weights
from dbkit.stored_models import read_file, read_folder
from dbkit.tensor_files import open_tensors

UNET, VAE, TEXT = (keys.PREFIXES[part] for part in ("unet", "vae", "text_encoder"))


@pytest.fixture(scope="module")
def sd2_file(sd2_model, tmp_path_factory) -> Path:
    """The narrow Stable Diffusion 2 as dbkit writes it. Do not change it."""
    return convert(sd2_model, tmp_path_factory.mktemp("files") / "sd2.safetensors")


@pytest.fixture
def stranger(sd2_file, tmp_path) -> Path:
    """Its tensors in a file that says nothing more. A test may change it."""
    save_file(load_file(sd2_file), tmp_path / "stranger.safetensors")
    return tmp_path / "stranger.safetensors"


@pytest.fixture(scope="module")
def file(model, tmp_path_factory) -> Path:
    """The small model as an original file. Do not change it."""
    return convert(model, tmp_path_factory.mktemp("files") / "small.safetensors")


def settings(source: Path, **changes) -> ConvertConfig:
    return ConvertConfig(source=source, destination=source.with_name("made"), **changes)


def predicts(source: Path, **changes) -> str:
    return read_file(settings(source, **changes)).configs["scheduler"]["prediction_type"]


def assert_weights(model, folder: Path):
    for part in WEIGHTS:
        expected = read_weights(folder, part)
        assert model.weights[part].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(model.weights[part][name].read(), tensor), name


def changed(path: Path, change) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


# Stable Diffusion 2 from strangers.


def test_a_file_of_stable_diffusion_2_that_says_nothing_becomes_the_same_model(sd2_model, stranger, tmp_path):
    tokenizer = str(sd2_model / "tokenizer")
    back = convert(stranger, tmp_path / "back", prediction_type="epsilon", tokenizer_name=tokenizer)
    assert_weights(read_folder(settings(back)), sd2_model)
    made, expected = load_models(back), load_models(sd2_model)
    for name in ("attention_head_dim", "use_linear_projection", "cross_attention_dim", "block_out_channels"):
        assert made.unet.config[name] == expected.unet.config[name]
    for name in ("hidden_act", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        assert getattr(made.text_encoder.config, name) == getattr(expected.text_encoder.config, name)
    assert made.tokenizer.pad_token_id == expected.tokenizer.pad_token_id == 0
    assert made.tokenizer("a dog", padding="max_length").input_ids == (
        expected.tokenizer("a dog", padding="max_length").input_ids
    )


def test_prompts_of_stable_diffusion_2_are_filled_up_with_the_first_word_whatever_the_tokenizer_says(
    model, stranger, tmp_path
):
    tokenizer = str(model / "tokenizer")
    assert load_models(model).tokenizer.pad_token_id != 0
    back = convert(stranger, tmp_path / "back", prediction_type="epsilon", tokenizer_name=tokenizer)
    assert load_models(back).tokenizer("a", padding="max_length").input_ids[-1] == 0


def test_the_last_layer_that_nobody_reads_may_be_missing(sd2_model, stranger):
    def thin(tensors):
        for name in [name for name in tensors if ".resblocks.23." in name]:
            del tensors[name]
        del tensors[keys.OPEN_CLIP + "text_projection"], tensors[keys.OPEN_CLIP + "logit_scale"]

    assert_weights(read_file(settings(changed(stranger, thin), prediction_type="epsilon")), sd2_model)


def test_a_text_encoder_of_stable_diffusion_2_under_the_names_of_transformers_is_read(sd2_model, stranger):
    def rename(tensors):
        for name in [name for name in tensors if name.startswith(keys.OPEN_CLIP)]:
            del tensors[name]
        weights = read_weights(sd2_model, "text_encoder")
        tensors.update({TEXT + name: tensor for name, tensor in weights.items()})

    assert_weights(read_file(settings(changed(stranger, rename), prediction_type="epsilon")), sd2_model)


def test_an_unknown_tensor_of_the_text_encoder_is_named(stranger):
    name = "transformer.resblocks.3.attn.bias_k"
    path = changed(stranger, lambda tensors: tensors.update({keys.OPEN_CLIP + name: torch.zeros(1)}))
    with pytest.raises(DbkitError, match=rf"has tensors that Stable Diffusion 2 does not know: {name}$"):
        read_file(settings(path, prediction_type="epsilon"))


# epsilon or v.


def test_of_stable_diffusion_2_that_says_nothing_the_user_is_asked(stranger, tmp_path):
    expected = r"nothing says whether .*stranger\.safetensors predicts noise or v, .* set prediction_type to v_predic"
    with pytest.raises(DbkitError, match=expected):
        convert(stranger, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert predicts(stranger, prediction_type="v_prediction") == "v_prediction"
    assert predicts(stranger, prediction_type="epsilon") == "epsilon"


def test_stable_diffusion_1_that_says_nothing_predicts_noise(file, tmp_path):
    save_file(load_file(file), tmp_path / "plain.safetensors")
    assert predicts(tmp_path / "plain.safetensors") == "epsilon"


@pytest.mark.parametrize(("said", "meant"), [("v", "v_prediction"), (None, "epsilon"), ("eps", "epsilon")])
def test_a_yaml_beside_the_file_says_what_it_predicts(stranger, said, meant):
    params = {"timesteps": 1000, **({"parameterization": said} if said else {})}
    stranger.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    assert predicts(stranger) == meant


@pytest.mark.parametrize("text", ["learning_rate: 1.0e-6\n", "model: v2.safetensors\n"])
def test_a_yaml_of_something_else_says_nothing(stranger, text):
    stranger.with_suffix(".yaml").write_text(text)
    with pytest.raises(DbkitError, match="nothing says whether"):
        predicts(stranger)


@pytest.mark.parametrize(("said", "meant"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_model_spec_says_what_a_file_predicts(stranger, said, meant):
    save_file(load_file(stranger), stranger, metadata={"modelspec.prediction_type": said})
    assert predicts(stranger) == meant


@pytest.mark.parametrize("kind", ["sd2_model", "sd2_v_model"])
def test_what_dbkit_writes_says_what_it_predicts_by_its_metadata_and_by_its_yaml(request, tmp_path, kind):
    meant = "v_prediction" if kind == "sd2_v_model" else "epsilon"
    made = convert(request.getfixturevalue(kind), tmp_path / "made.safetensors")
    save_file(load_file(made), tmp_path / "bare.safetensors")
    shutil.copy(made.with_suffix(".yaml"), tmp_path / "bare.yaml")
    assert predicts(tmp_path / "bare.safetensors") == meant
    made.with_suffix(".yaml").unlink()
    assert predicts(made) == meant


def test_statements_that_differ_are_an_error_until_the_user_decides(sd2_v_model, tmp_path):
    made = convert(sd2_v_model, tmp_path / "made.safetensors")
    made.with_suffix(".yaml").write_text("model: {params: {timesteps: 1000}}\n")
    expected = r"predicts v_prediction by the settings in it and .* and epsilon by .*made\.yaml; set prediction_type to"
    with pytest.raises(DbkitError, match=expected):
        predicts(made)
    assert predicts(made, prediction_type="epsilon") == "epsilon"


def test_a_folder_can_be_told_what_it_predicts(model, tmp_path):
    made = convert(model, tmp_path / "made.safetensors", prediction_type="v_prediction")
    assert yaml.safe_load(made.with_suffix(".yaml").read_text())["model"]["params"]["parameterization"] == "v"
    assert predicts(made) == "v_prediction"


# EMA.


def with_ema(tensors):
    for name in [name for name in tensors if name.startswith(UNET)]:
        tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1
    tensors["model_ema.decay"], tensors["model_ema.num_updates"] = (
        torch.tensor(0.99),
        torch.tensor(7, dtype=torch.int32),
    )


def test_of_two_copies_of_the_weights_either_can_be_taken(model, file, tmp_path):
    path = changed(Path(shutil.copy(file, tmp_path / "both.safetensors")), with_ema)
    plain, averaged = (read_file(settings(path, extract_ema=wanted)).weights for wanted in (False, True))
    for name, tensor in read_weights(model, "unet").items():
        assert torch.equal(plain["unet"][name].read(), tensor)
        assert torch.equal(averaged["unet"][name].read(), tensor + 1)
    for name, tensor in read_weights(model, "vae").items():
        assert torch.equal(averaged["vae"][name].read(), tensor)


def test_a_copy_that_is_not_there_or_not_whole_is_said(file, tmp_path):
    with pytest.raises(DbkitError, match=r"small\.safetensors has no EMA copy of its U-Net; turn extract_ema off"):
        read_file(settings(file, extract_ema=True))

    def lacking(tensors):
        with_ema(tensors)
        del tensors["model_ema.diffusion_modelout2bias"]

    path = changed(Path(shutil.copy(file, tmp_path / "both.safetensors")), lacking)
    with pytest.raises(DbkitError, match=r"has no model_ema\.diffusion_modelout2bias in its EMA copy; turn"):
        read_file(settings(path, extract_ema=True))


# Another VAE.


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory):
    """A folder with another VAE of the same size, and the tensors of its original file."""
    from conftest import make_random_model

    folder = make_random_model(tmp_path_factory.mktemp("models") / "other", seed=9)
    tensors, _ = open_tensors(convert(folder, folder.parent / "other.safetensors"))
    settings = folder / "vae" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "scaling_factor": 0.5}))
    return folder, {name: tensor.read() for name, tensor in tensors.items() if name.startswith(VAE)}


def vae_file(folder: Path, form: str, other) -> Path:
    """The other VAE in each form that people have it in."""
    model, tensors = other
    bare = {name.removeprefix(VAE): tensor for name, tensor in tensors.items()}
    if form == "folder":
        return model / "vae"
    if form == "model folder":
        return model
    if form == "diffusers file":
        return model / "vae" / WEIGHTS["vae"]
    if form == "prefixed":
        save_file(tensors, folder / "vae.safetensors")
        return folder / "vae.safetensors"
    if form == "bare":
        save_file(bare, folder / "vae.safetensors")
        return folder / "vae.safetensors"
    path = folder / ("vae.ckpt" if form == "ckpt" else "some.vae.pt")
    # With what the training of a VAE leaves in its file.
    torch.save({"state_dict": {**bare, "loss.logvar": torch.zeros(())}}, path)
    return path


@pytest.mark.parametrize("form", ["folder", "model folder", "diffusers file", "prefixed", "bare", "ckpt", "vae.pt"])
@pytest.mark.parametrize("direction", ["folder", "file"])
def test_another_vae_takes_the_place_of_the_one_inside(model, file, other_vae, tmp_path, form, direction):
    path = vae_file(tmp_path, form, other_vae)
    read, source = (read_folder, model) if direction == "folder" else (read_file, file)
    found = read(settings(source, pretrained_vae_name_or_path=str(path)))
    for part, folder in (("vae", other_vae[0]), ("unet", model), ("text_encoder", model)):
        expected = read_weights(folder, part)
        assert found.weights[part].keys() == expected.keys()
        assert all(torch.equal(found.weights[part][name].read(), expected[name]) for name in expected)
    assert found.configs["vae"]["scaling_factor"] == (0.5 if "folder" in form else 0.18215)


def test_a_file_without_a_vae_gets_one(file, other_vae, tmp_path):
    def strip(tensors):
        for name in [name for name in tensors if name.startswith(VAE)]:
            del tensors[name]

    path = changed(Path(shutil.copy(file, tmp_path / "without.safetensors")), strip)
    with pytest.raises(DbkitError, match=r"without\.safetensors lacks its vae"):
        read_file(settings(path))
    found = read_file(settings(path, pretrained_vae_name_or_path=str(other_vae[0])))
    assert found.weights["vae"].keys() == read_weights(other_vae[0], "vae").keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("notes.txt", r"notes\.txt is no \.safetensors, \.ckpt or \.pt file; choose one"),
        ("unet.safetensors", r"unet\.safetensors is not a VAE \(conv_in\.bias, .*\); give a file or diffusers folder"),
        ("part.safetensors", r"part\.safetensors is not a whole VAE; it lacks '.+'"),
        ("nowhere.pt", r"there is no file or folder .*nowhere\.pt; check the path"),
    ],
)
def test_what_is_no_vae_is_said(model, file, other_vae, tmp_path, name, expected):
    (tmp_path / "notes.txt").touch()
    save_file(read_weights(model, "unet"), tmp_path / "unet.safetensors")
    part = {name: tensor for name, tensor in other_vae[1].items() if "post_quant" not in name}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(DbkitError, match=expected):
        read_file(settings(file, pretrained_vae_name_or_path=str(tmp_path / name)))


def test_a_vae_that_does_not_fit_is_named_in_a_short_sentence(model, file, other_vae, tmp_path):
    name = "decoder.mid_block.attentions.0.to_q.weight"
    weights = {key: tensor for key, tensor in read_weights(other_vae[0], "vae").items() if ".up_blocks.1." not in key}
    save_file({**weights, name: torch.zeros(8, 8)}, tmp_path / "odd.safetensors")
    for source, destination in ((file, "made"), (model, "made.ckpt")):
        with pytest.raises(
            DbkitError, match=r"^the VAE .*odd\.safetensors is not a whole one of .* 1: Missing"
        ) as raised:
            convert(source, tmp_path / destination, pretrained_vae_name_or_path=str(tmp_path / "odd.safetensors"))
        assert len(str(raised.value)) < 400 + len(str(tmp_path))


def test_a_vae_of_other_latents_is_refused(model, other_vae, tmp_path):
    from diffusers import AutoencoderKL

    config = AutoencoderKL.load_config(other_vae[0] / "vae")
    AutoencoderKL.from_config({**config, "latent_channels": 16}).save_pretrained(tmp_path / "wide")
    with pytest.raises(DbkitError, match=r"the VAE .*wide has 16 latent channels and .* 4; choose one of Stable Diff"):
        convert(model, tmp_path / "made.ckpt", pretrained_vae_name_or_path=str(tmp_path / "wide"))


def test_it_is_said_which_vae_was_put_in(file, other_vae, tmp_path, capsys):
    path = vae_file(tmp_path, "bare", other_vae)
    convert(file, tmp_path / "made", pretrained_vae_name_or_path=str(path))
    assert f"the VAE in it is {path}\n" in capsys.readouterr().out


# What dbkit noted in a file.


@pytest.mark.parametrize("noted", ["{", "[]", '{"configs": {}}', '{"configs": 1, "tokenizer": 1}', "[" * 100_000])
def test_damaged_notes_are_said(file, tmp_path, noted):
    save_file(load_file(file), tmp_path / "f.safetensors", metadata={"dbkit": noted})
    with pytest.raises(DbkitError, match=r"is damaged or not a checkpoint \(what dbkit noted in it: .+\); download"):
        read_file(settings(tmp_path / "f.safetensors"))
