"""A tiny vision transformer, images for it, and SynQT as it was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from embedgrad.data.images import image_examples
from embedgrad.model.backbone import Prompt
from embedgrad.model.loading.vision import describe_vision
from embedgrad.model.vision import VisionModel
from embedgrad.prompt.images import TEMPLATE, Images, ImageSequencer
from embedgrad.prompt.sequence import Target, TokenSequence

CLASSES = ("dark", "light", "striped")
SMALL = Images(queries=3, hidden=6, mixing=4)


@dataclass(frozen=True)
class VisionKit:
    """A tiny model, its sequencer, images in sequences, and the start rows."""

    model: VisionModel
    sequencer: ImageSequencer
    sequences: list[TokenSequence]
    start: Prompt


def tiny_vit(size: int = 6, width: int = 32, layers: int = 3) -> ViTModel:
    """Random weights in float64, large enough that attention is no mean: size x size patches."""
    settings = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=size,
        patch_size=1,
        num_channels=1,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTModel(settings, add_pooling_layer=False).double().eval()


def pictures(count: int, size: int = 6) -> tuple[Tensor, list[str]]:
    """Noise that is darker, lighter or striped, [count, 1, size, size], with its class."""
    noise = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(1))
    base = [torch.full((size, size), -1.0), torch.full((size, size), 1.0), torch.ones(size, size)]
    base[2][::2] = -1.0
    images = torch.stack([base[i % 3] for i in range(count)])[:, None] + noise
    return images, [CLASSES[i % 3] for i in range(count)]


def vision_kit(
    count: int = 12, images: Images = SMALL, dtype: torch.dtype = torch.float64, **vit: Any
) -> VisionKit:
    built = tiny_vit(**vit).to(dtype)
    model = VisionModel(built, describe_vision(built), images)
    sequencer = model.sequencer(TEMPLATE, Target(choices=CLASSES))
    pixels, labels = pictures(count, model.shape[1])
    sequences = sequencer.build(image_examples(pixels, labels))
    return VisionKit(model, sequencer, sequences, model.start(sequencer, sequences))


class Published(nn.Module):
    """SynQT as its authors' code computes it, in modules, with its biases and scales at rest."""

    def __init__(self, vit: ViTModel, images: Images, classes: int):
        super().__init__()
        width, self.images = vit.config.hidden_size, images
        self.vit = vit

        def adapter(hidden: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

        layers = len(vit.layers)
        self.q = nn.Parameter(torch.empty(layers, images.queries, width))
        self.ffn = nn.ModuleList(adapter(images.hidden) for _ in range(layers))
        self.mlp = nn.ModuleList(adapter(images.hidden) for _ in range(layers))
        self.mix = nn.ModuleList(
            nn.ModuleList(adapter(images.mixing) for _ in range(4)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.LayerNorm(width) for _ in range(4)) for _ in range(layers)
        )
        self.out_norm, self.out_mlp = nn.LayerNorm(width), adapter(images.hidden)
        self.weight = nn.Linear(width, 3 * layers)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in set(vit.modules()):
                nn.init.zeros_(module.bias)

    def take(self, prompt: Prompt) -> None:
        """Set the weights to the rows of a prompt."""
        queries, synthesis, readout, classes = prompt.values()
        h, a, layers = self.images.hidden, self.images.mixing, len(self.q)
        with torch.no_grad():
            self.q.copy_(queries.view_as(self.q))
            for i, rows in enumerate(synthesis.view(layers, 4 * h + 8 * a, -1)):
                adapters = [(self.ffn[i], h), (self.mlp[i], h), *((m, a) for m in self.mix[i])]
                place = 0
                for own, hidden in adapters:
                    own[0].weight.copy_(rows[place : place + hidden])
                    own[2].weight.copy_(rows[place + hidden : place + 2 * hidden].T)
                    place += 2 * hidden
            self.out_mlp[0].weight.copy_(readout[:h])
            self.out_mlp[2].weight.copy_(readout[h : 2 * h].T)
            self.weight.weight.copy_(readout[2 * h :])
            self.head.weight.copy_(classes)

    def forward(self, pixels: Tensor) -> Tensor:
        own, heads = self.images, self.vit.config.num_attention_heads
        x = self.vit.embeddings(pixels)
        pooled: list[Tensor] = []
        inside: list[Tensor] = []
        after: list[Tensor] = []
        for i, block in enumerate(self.vit.layers):
            prompt = self.q[i].unsqueeze(0).expand(len(pixels), -1, -1)
            if pooled:
                prompt = prompt + pooled[-1] * own.feature_scale
            prompt = prompt + self.ffn[i](prompt)
            norm1, norm2, q_norm, kv_norm = self.norms[i]
            to_q, to_k, to_v, to_out = ((lambda y, m=m: y + m(y)) for m in self.mix[i])
            y = norm1(prompt)
            q, k, v = to_q(q_norm(y)), to_k(kv_norm(y)), to_v(kv_norm(y))
            shares = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
            prompt = prompt + own.attention_scale * to_out(shares @ v)
            y = norm2(prompt)
            prompt = prompt + own.adapter_scale * (y + self.mlp[i](y))
            # The frozen block, with the queries of the prompt and keys and values of the tokens.
            attention = block.attention
            normed = block.layernorm_before(x)
            parts = (
                attention.q_proj(block.layernorm_before(prompt)),
                attention.k_proj(normed),
                attention.v_proj(normed),
            )
            q, k, v = (p.unflatten(2, (heads, -1)).transpose(1, 2) for p in parts)
            read = nn.functional.scaled_dot_product_attention(q, k, v)
            h = attention.o_proj(read.transpose(1, 2).flatten(2))
            prompt = prompt + h
            hh = block.mlp(block.layernorm_after(prompt))
            prompt = prompt + hh
            x = block(x)
            for held, new in ((pooled, prompt), (inside, h), (after, hh)):
                held.append(new.mean(1, keepdim=True))
        feat = torch.cat([pooled[-1], *pooled, *inside, *after], dim=1)
        normed = self.out_norm(feat)
        feat = feat + normed + self.out_mlp(normed)
        weight = torch.tanh(nn.functional.gelu(self.weight(feat[:, 0])))
        weight = torch.cat([torch.ones_like(weight[:, :1]), weight], dim=1)
        return self.head(self.vit.layernorm((weight[..., None] * feat).mean(1)))
