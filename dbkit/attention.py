"""Attention with heads of few channels, which torch's fused kernel for CPUs is slow at."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

# Below it that kernel does not use the whole width of the processor's registers. Measured on 1 024 positions with torch
# 2.13 in fp32: 10 channels 52 ms, filled up to 16 with zeros 31 ms; 20 channels 41 ms, filled up to 24 44 ms.
CHANNELS = 16


def widen_heads(unet: UNet2DConditionModel) -> None:
    """On a CPU, let heads of fewer than 16 channels attend with zeros added, which change no score and no sum.

    Narrow models have such heads; those of Stable Diffusion itself have at least 40 channels.
    """
    for module in unet.modules():
        if hasattr(module, "processor") and module.to_q.out_features // module.heads < CHANNELS:
            module.set_processor(WideHeads())


class WideHeads:
    """A processor for diffusers' Attention as Stable Diffusion's U-Nets use it: no norms, no residual of its own."""

    def __call__(
        self,
        attention: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states has shape (B, positions, channels), encoder_hidden_states (B, tokens, their channels)."""
        import torch
        from torch.nn import functional

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, heads = len(context), attention.heads

        def split(states: torch.Tensor) -> torch.Tensor:
            states = states.view(batch, -1, heads, states.shape[-1] // heads)
            if states.dtype == torch.float32:  # in bf16 nothing is gained
                states = functional.pad(states, (0, CHANNELS - states.shape[-1]))
            return states.transpose(1, 2)

        query, key, value = attention.to_q(hidden_states), attention.to_k(context), attention.to_v(context)
        channels = query.shape[-1] // heads
        if attention_mask is not None:
            attention_mask = attention.prepare_attention_mask(attention_mask, context.shape[1], batch)
            attention_mask = attention_mask.view(batch, heads, -1, attention_mask.shape[-1])
        seen = functional.scaled_dot_product_attention(
            split(query), split(key), split(value), attn_mask=attention_mask, scale=attention.scale
        )
        seen = seen[..., :channels].transpose(1, 2).reshape(batch, -1, heads * channels)
        # to_out is the projection and a dropout.
        return attention.to_out[1](attention.to_out[0](seen))
