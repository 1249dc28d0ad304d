"""Prompts as the U-Net reads them: token ids, and the states that the text encoder gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbkit.errors import DbkitError

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids of shape (N, 77), padded and cut as at generation time."""
    return _tokenized(tokenizer, prompts).input_ids


def own_tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Which of those ids are the prompt's own and not padding, shape (N, 77), 1 or 0."""
    return _tokenized(tokenizer, prompts).attention_mask


def _tokenized(tokenizer: CLIPTokenizer, prompts: list[str]):
    length = min(tokenizer.model_max_length, 77)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def encode_prompts(text_encoder: CLIPTextModel, token_ids: torch.Tensor) -> torch.Tensor:
    """Text states of shape (N, 77, D) for token ids of shape (N, 77): of the last layer, or where clip_skip says."""
    skip = clip_skip_of(text_encoder.config)
    if skip == 1:
        return text_encoder(token_ids).last_hidden_state
    states = text_encoder(token_ids, output_hidden_states=True).hidden_states[-skip]
    return _layers(text_encoder).final_layer_norm(states)


def clip_skip_of(config: CLIPTextConfig) -> int:
    """Which layer gives the text states, counted from the end: 1 is the last one. The model's settings keep it."""
    return getattr(config, "clip_skip", None) or 1


def check_clip_skip(clip_skip: int | None, layers: int | None) -> None:
    """Raise DbkitError where clip_skip does not suit a text encoder of so many layers; None is not known."""
    if not clip_skip or clip_skip == 1 or layers is None:
        return
    if clip_skip > layers:
        raise DbkitError(f"clip_skip is {clip_skip} and the text encoder has {layers} layers; lower it")
    if layers == 23:
        raise DbkitError(
            f"clip_skip is {clip_skip}, and the text encoder of Stable Diffusion 2 ends at its second-to-last layer "
            "already; leave clip_skip at 1 for this model"
        )


def unused_layers(text_encoder: CLIPTextModel) -> list[torch.nn.Module]:
    """The layers that clip_skip passes over: they get no gradient."""
    skip = clip_skip_of(text_encoder.config)
    return list(_layers(text_encoder).encoder.layers)[1 - skip :] if skip > 1 else []


def _layers(text_encoder: CLIPTextModel) -> torch.nn.Module:
    # Up to version 4 of transformers they lie one level further down.
    return getattr(text_encoder, "text_model", text_encoder)
