"""Heads that are filled up with zeros attend as they are: the same output and the same gradients, in less time."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from dbkit.attention import CHANNELS, WideHeads, widen_heads


def gradients_of(unet, mask):
    random = torch.Generator().manual_seed(1)
    latents, text = (
        torch.randn(2, 4, 8, 8, generator=random),
        torch.randn(2, 77, unet.config.cross_attention_dim, generator=random),
    )
    made = unet(latents, torch.tensor([3, 700]), text, encoder_attention_mask=mask).sample
    made.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}
    unet.zero_grad()
    return {"output": made.detach(), **gradients}


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_computed_and_learnt_stays_the_same(model, masked):
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    mask = (torch.arange(77) < torch.tensor([[5], [9]])).float() if masked else None
    before = gradients_of(unet, mask)
    widen_heads(unet)
    assert any(isinstance(processor, WideHeads) for processor in unet.attn_processors.values())
    for name, value in gradients_of(unet, mask).items():
        assert torch.allclose(value, before[name], rtol=1e-4, atol=1e-6), name


def test_heads_that_are_wide_enough_are_left_alone(model):
    # What diffusers calls attention_head_dim is the number of heads here.
    config = UNet2DConditionModel.load_config(model / "unet")
    unet = UNet2DConditionModel.from_config({**config, "attention_head_dim": 1})
    assert all(
        module.to_q.out_features // module.heads >= CHANNELS
        for module in unet.modules()
        if hasattr(module, "processor")
    )
    widen_heads(unet)
    assert not any(isinstance(processor, WideHeads) for processor in unet.attn_processors.values())
