"""Prompts become what diffusers' pipeline would make of them, at every clip_skip."""

import pytest
import torch

from dbkit import DbkitError
from dbkit.embedded import MODEL
from dbkit.models import load_models
from dbkit.text import check_clip_skip, clip_skip_of, encode_prompts, own_tokens, tokenize, unused_layers


@pytest.fixture(scope="module")
def models():
    return load_models(MODEL)


def test_states_are_those_of_the_layer_that_clip_skip_names(models):
    ids = tokenize(models.tokenizer, ["photo of a dog", ""])
    inner = getattr(models.text_encoder, "text_model", models.text_encoder)
    layers, seen = list(inner.encoder.layers), []
    for clip_skip in (1, 2, 3):
        models.text_encoder.config.clip_skip = clip_skip
        with torch.no_grad():
            states = encode_prompts(models.text_encoder, ids)
            outputs = models.text_encoder(ids, output_hidden_states=True).hidden_states
            expected = inner.final_layer_norm(outputs[1 + len(layers) - clip_skip])
        assert torch.equal(states, expected)
        assert unused_layers(models.text_encoder) == layers[len(layers) - clip_skip + 1 :]
        seen.append(states)
    models.text_encoder.config.clip_skip = 1
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])


def test_a_model_that_says_nothing_is_read_from_its_last_layer(models):
    del models.text_encoder.config.clip_skip
    assert clip_skip_of(models.text_encoder.config) == 1


def test_own_tokens_end_with_the_end_of_the_prompt(models):
    own = own_tokens(models.tokenizer, ["photo of a dog", ""])
    assert own.shape == (2, 77)
    assert own.sum(1).tolist() == [6, 2]
    assert own[0, :6].all()


def test_states_of_a_prompt_do_not_depend_on_its_padding(models):
    """CLIP reads from left to right, so leaving the padding out is the same as never having had it."""
    ids = tokenize(models.tokenizer, ["photo of a dog"])
    with torch.no_grad():
        whole, short = encode_prompts(models.text_encoder, ids), encode_prompts(models.text_encoder, ids[:, :6])
    torch.testing.assert_close(whole[:, :6], short)


def test_what_suits_a_text_encoder():
    for fine in ((None, 2), (1, 23), (2, 12), (5, None)):
        check_clip_skip(*fine)
    with pytest.raises(DbkitError, match="clip_skip is 13 and the text encoder has 12 layers; lower it"):
        check_clip_skip(13, 12)
    with pytest.raises(DbkitError, match="leave clip_skip at 1 for this model"):
        check_clip_skip(2, 23)
