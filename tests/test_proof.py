import dataclasses

import pytest

from dbkit import convert
from dbkit.config import ConvertConfig
from dbkit.errors import DbkitError
from dbkit.proof import prove, table
from dbkit.stored_models import read_folder


@pytest.fixture(params=["model", "sd2_model"])
def stored(request):
    return read_folder(ConvertConfig(request.getfixturevalue(request.param), "unused"))


def with_weights(stored, part, changes):
    return dataclasses.replace(stored, weights={**stored.weights, part: {**stored.weights[part], **changes}})


def swapped(stored, part, one, other):
    weights = stored.weights[part]
    return with_weights(stored, part, {one: weights[other], other: weights[one]})


def test_a_model_computes_what_it_does_itself(stored, tmp_path):
    proofs = prove(stored, stored, tmp_path)

    assert [proof.part for proof in proofs] == ["text_encoder", "unet", "vae"]
    assert all(proof.tensors == len(stored.weights[proof.part]) and not proof.difference for proof in proofs)
    assert table(proofs).count("nothing") == 3


@pytest.mark.parametrize(
    ("part", "one", "other"),
    [
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{}.weight", "qk"),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.{}_proj.weight", "vq"),
        ("vae", "encoder.mid_block.attentions.0.to_{}.weight", "vq"),
        ("vae", "decoder.mid_block.attentions.0.to_{}.weight", "vk"),
    ],
)
def test_tensors_in_each_others_place_are_noticed(stored, tmp_path, part, one, other):
    wrong = swapped(stored, part, *(one.format(letter) for letter in other))

    with pytest.raises(DbkitError, match=f"something else than its source \\(its {part}\\)"):
        prove(stored, wrong, tmp_path)


def test_another_precision_is_compared_with_its_own_values_and_measured(stored, tmp_path):
    import torch

    def cast(name, tensor):
        return tensor.changed(lambda values: values.bfloat16(), dtype=torch.bfloat16)

    weights = {part: {n: cast(n, t) for n, t in tensors.items()} for part, tensors in stored.weights.items()}
    written = dataclasses.replace(stored, weights=weights)

    assert all(0 < proof.difference < 0.1 for proof in prove(stored, written, tmp_path, cast))
    with pytest.raises(DbkitError, match="something else"):
        prove(stored, written, tmp_path)


def test_a_model_that_overflows_is_named(stored, tmp_path):
    weights = stored.weights["vae"]
    huge = {n: t.changed(lambda values: values * 1e38) for n, t in weights.items() if "conv_norm_out" in n}

    with pytest.raises(DbkitError, match="vae of the model computes values that are no numbers"):
        wrong = with_weights(stored, "vae", huge)
        prove(wrong, wrong, tmp_path)


def test_convert_says_how_the_two_compare(model, tmp_path, capsys):
    convert(convert(model, tmp_path / "half.safetensors", save_precision="fp16"), tmp_path / "back")

    first, second = capsys.readouterr().out.split("part ")[1:]
    assert "nothing" not in first and second.count("nothing") == 3
