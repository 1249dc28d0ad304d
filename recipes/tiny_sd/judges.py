"""Stage 4, the feature networks: a small CLIP, whose text encoder the U-Net is trained with, and a small image encoder.

    torchrun --nproc_per_node 2 recipes/tiny_sd/judges.py --out build/tiny_sd

CLIP (arXiv:2103.00020) learns which caption belongs to which picture. The image encoder, a ViT in the place that DINO
has in the DreamBooth paper, learns which object is the same one wherever it stands. A quarter of what both see has been
through the VAE, because what they judge later has been through it too.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, ViTConfig, ViTModel

from common import Log, arguments, as_tensor, average_gradients, load_images, start, steps
from world import COLOURS, NOUNS, SETTINGS, article, phrase

TOKENS = 18  # the longest caption of the world has 16


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 77, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "image_size": 32, "patch_size": 4, "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def make_encoder() -> ViTModel:
    return ViTModel(
        ViTConfig(
            image_size=32, patch_size=4, hidden_size=96, intermediate_size=288, num_hidden_layers=4,
            num_attention_heads=4,
        ),
        add_pooling_layer=False,
    )  # fmt: skip


def text_encoder_of(clip: CLIPModel) -> CLIPTextModel:
    """The text half of CLIP by itself, as Stable Diffusion has it."""
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval()


class Heads(nn.Module):
    """Classifiers that teach the two image encoders and are thrown away afterwards; compared by cosine."""

    def __init__(self, width: int, **counts: int):
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.randn(n, width) * 0.1) for name, n in counts.items()})

    def forward(self, features: torch.Tensor, **labels: torch.Tensor) -> torch.Tensor:
        features = F.normalize(features, dim=-1)
        loss = features.new_zeros(())
        for name, label in labels.items():
            logits = 12 * features @ F.normalize(self.weights[name], dim=-1).T
            loss = loss + F.cross_entropy(logits, label, ignore_index=-1)
        return loss


def contrastive(images: torch.Tensor, texts: torch.Tensor, captions: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss, in which two pictures of one caption are both right."""
    logits = scale.exp().clamp(max=50) * images @ texts.T
    right = (captions[:, None] == captions[None]).float()
    right = right / right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def shifted(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    x, y = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return F.pad(pixels, (2, 2, 2, 2), mode="reflect")[..., 2 + y : 34 + y, 2 + x : 34 + x]


@torch.no_grad()
def name_contents(clip: CLIPModel, tokenizer: CLIPTokenizer, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each picture (N, 3, 32, 32) the noun and the place that CLIP finds in it, by number: the nearest text.

    The text of a noun is the mean over all places, and that of a place the mean over all nouns.
    """
    places = [*SETTINGS, *COLOURS]
    prompts = [f"a photo of {article(noun)} {noun} {phrase(place)}" for noun in NOUNS for place in places]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt").to(pixels.device)
    texts = F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1).view(len(NOUNS), len(places), -1)
    images = torch.cat([clip.get_image_features(pixel_values=part).pooler_output for part in pixels.split(250)])
    by_noun, by_place = (F.normalize(texts.mean(axis), dim=-1) for axis in (1, 0))
    return (images @ by_noun.T).argmax(1).cpu().numpy(), (images @ by_place.T).argmax(1).cpu().numpy()


def main() -> None:
    args = arguments(__doc__, steps=1_000, batch=128, rate=1.5e-3)
    rank, world, device = start(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    data = load_images(args.out / "train.npz")
    decoded = load_images(args.out / "decoded.npz")["images"]
    images = data["images"]
    captions, caption_numbers = np.unique(data["captions"], return_inverse=True)
    tokens = tokenizer(captions.tolist(), padding="max_length", max_length=TOKENS, return_tensors="pt")
    arts, art_numbers = np.unique([art.split()[0] for art in data["arts"]], return_inverse=True)
    labels = {
        "noun": torch.from_numpy(data["nouns"]), "place": torch.from_numpy(data["places"]),
        "tint": torch.from_numpy(data["tints"] + 1), "art": torch.from_numpy(art_numbers),
    }  # fmt: skip
    clip, encoder = make_clip(tokenizer).to(device), make_encoder().to(device)
    clip_heads = Heads(64, noun=len(NOUNS), place=len(SETTINGS) + len(COLOURS), tint=len(COLOURS) + 1).to(device)
    heads = Heads(96, art=len(arts), tint=len(COLOURS) + 1).to(device)
    modules = {"clip": clip, "encoder": encoder, "clip_heads": clip_heads, "heads": heads}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    log = Log("judges", args, rank)
    judged = load_images(args.out / "judge.npz")
    for step, generator in steps("judges", args, rank, modules, optimizer):
        chosen = torch.randint(len(images), (args.batch // world,), generator=generator)
        through = (chosen < len(decoded)) & (torch.rand(len(chosen), generator=generator) < 0.8)
        pixels = as_tensor(images[chosen])
        pixels[through] = as_tensor(decoded[chosen[through]])
        pixels = shifted(pixels, generator).to(device)
        numbers = torch.from_numpy(caption_numbers)[chosen]
        seen = {name: label[chosen].to(device) for name, label in labels.items()}
        out = clip(
            input_ids=tokens.input_ids[numbers].to(device),
            attention_mask=tokens.attention_mask[numbers].to(device),
            pixel_values=pixels,
        )
        matching = contrastive(out.image_embeds, out.text_embeds, numbers.to(device), clip.logit_scale)
        naming = clip_heads(out.image_embeds, noun=seen["noun"], place=seen["place"], tint=seen["tint"])
        telling = heads(encoder(pixels).last_hidden_state[:, 0], art=seen["art"], tint=seen["tint"])
        loss = matching + 0.3 * naming + telling
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.add(step, loss=loss, matching=matching, naming=naming, telling=telling)
        if rank == 0 and (step + 1) % 500 == 0:
            clip.eval()
            nouns, places = name_contents(clip, tokenizer, as_tensor(judged["images"]).to(device))
            clip.train()
            plain = judged["tints"] < 0
            right = (nouns == judged["nouns"])[plain].mean(), (places == judged["places"]).mean()
            print(f"judges: noun {right[0]:.3f}, place {right[1]:.3f} of pictures not trained on", flush=True)
            log.draw()
    if rank == 0:
        clip.eval().save_pretrained(args.out / "clip")
        tokenizer.save_pretrained(args.out / "clip")
        encoder.eval().save_pretrained(args.out / "encoder")


if __name__ == "__main__":
    main()
