"""A frozen vision transformer as a backbone: queries read its tokens.

The tokens of an image never see the queries, so their keys and values are computed once, without a
gradient, and kept; only a few queries and their readout have one.

    q_l = pool(block_l(synthesis_l(queries_l + scale q_l-1); keys and values of the frozen tokens))
    feature = norm(mean_i tanh(w_i(q_L)) f_i),   f = q_L, q_1..L, and what attention and MLP added
    log p(class) = log softmax(feature . classes)

Source: SynQT, Zhang et al. 2024, https://arxiv.org/abs/2407.06964, and its published code. Not
taken over: dropout, biases and norms' scales of what is trained, and learned scales. Class rows
start at the class means of the training images, where the paper's are random.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from embedgrad.data.examples import Example
from embedgrad.data.images import PIXELS
from embedgrad.errors import ModelError
from embedgrad.events import Report
from embedgrad.model.backbone import Prompt, join_spans
from embedgrad.model.loading import ModelInfo
from embedgrad.model.loading.vision import load_vision
from embedgrad.model.outcome import Outcome
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache
from embedgrad.prompt.images import Images, ImageSequencer
from embedgrad.prompt.sequence import Target, TokenSequence
from embedgrad.prompt.span import rows_by_span
from embedgrad.prompt.template import Template
from embedgrad.report.terminal.bars import show


def load_vision_model(
    images: Images,
    name: str,
    *,
    prefix_cache_budget: str | float = 0.25,
    report: Report = show,
    **loading: Any,
) -> VisionModel:
    """Load a frozen vision transformer, a Hub id or a folder. Raises `ModelError`."""
    model, info = load_vision(name, report=report, **loading)
    return VisionModel(model, info, images, prefix_cache_budget=prefix_cache_budget)


@final
@dataclass(frozen=True)
class Queried:
    """What the rows [P, D] of a prompt are, with the L layers, n queries and C classes."""

    queries: Tensor  # [L, n, D]
    synthesis: Tensor  # [L, 4 h + 8 a, D]
    adapter: Tensor  # [2 h, D]
    weights: Tensor  # [3 L, D]
    classes: Tensor  # [C, D]


@final
class VisionModel:
    """A frozen `transformers.ViTModel` that chooses among classes by a prompt's rows."""

    why_not_reusable = None

    def __init__(
        self,
        model: Any,
        info: ModelInfo,
        images: Images = Images(),
        *,
        prefix_cache_budget: str | float = 0.25,
    ):
        self.model, self.info, self.images = model.eval().requires_grad_(False), info, images
        self.device, self.dtype = model.device, model.dtype
        self.heads: int = model.config.num_attention_heads
        self.shape = tuple(model.embeddings.patch_embeddings.projection.weight.shape[1:2])
        self.shape += tuple(model.embeddings.image_size)
        self.prefix_cache = PrefixCache.on(self.device, prefix_cache_budget)
        self.width: int = model.config.hidden_size

    @property
    def layers(self) -> int:
        """How many layers the transformer has."""
        return len(self.model.layers)

    def sequencer(
        self,
        template: Template,
        target: Target,
        rows: Sequence[Example] = (),
        *,
        date: datetime.date | None = None,
        **text: Any,
    ) -> ImageSequencer:
        """What turns images into this model's sequences; the template is always `TEMPLATE`.

        What else a `LanguageModel` is given for text has no meaning here.
        """
        numbers = self.shape[0] * self.shape[1] * self.shape[2]
        day = date or datetime.date.today()
        return ImageSequencer(self.images, target, layers=self.layers, numbers=numbers, date=day)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Start rows [T, D] by number, in the order of a prompt's rows; the same in every call."""
        own, width = self.images, self.width
        in_h, out_h, out_a = width**-0.5, own.hidden**-0.5, own.mixing**-0.5
        h, a = own.hidden, own.mixing
        layer = [in_h] * h + [out_h] * h + [in_h] * h + [out_h] * h + ([in_h] * a + [out_a] * a) * 4
        bounds = [1.0] * (self.layers * own.queries) + layer * self.layers
        bounds += [in_h] * h + [out_h] * h + [in_h] * 3 * self.layers
        bounds += [in_h] * (max(ids, default=-1) + 1 - len(bounds))  # classes
        generator = torch.Generator().manual_seed(own.seed)
        rows = torch.rand(len(bounds), width, generator=generator, dtype=torch.float64) * 2 - 1
        rows *= torch.tensor(bounds, dtype=torch.float64)[:, None]
        found = rows[list(ids)].to(self.device)
        return found if self.dtype == torch.float64 else found.float()

    @torch.no_grad()
    def start(self, sequencer: ImageSequencer, train: Sequence[TokenSequence]) -> Prompt:
        """The start rows of a prompt, its classes at the means of the images of each."""
        rows_PD = self.embed(sequencer.prompt_ids)
        parts = [train[i : i + 64] for i in range(0, len(train), 64)]
        asked = self.split(rows_PD.to(self.dtype))
        features_ND = torch.cat([self._features(asked, part) for part in parts]).to(rows_PD)
        classes = slice(sequencer.spans[-1].ids[0], None)
        gold_N = torch.tensor([s.gold for s in train], device=self.device)
        rows_PD[classes] = class_means(features_ND, gold_N, rows_PD[classes])
        return rows_by_span(rows_PD, sequencer.spans)

    def outcome(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        *,
        choices: bool = True,
        normalize: bool = False,
    ) -> Outcome:
        """Log-probabilities of the classes, differentiable (also twice) in the prompt's rows."""
        rows = self.split(join_spans(prompt).to(self.dtype))
        logits_BC = self._features(rows, batch) @ rows.classes.T
        logprobs_BC = torch.log_softmax(
            logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float(), dim=1
        )
        gold_B = torch.tensor([s.gold for s in batch], device=self.device)
        if not choices:
            logprobs_BC, gold_B = logprobs_BC.gather(1, gold_B[:, None]), torch.zeros_like(gold_B)
        examples = [s.example for s in batch]
        columns = dict.fromkeys(name for e in examples for name in e.extra if name != PIXELS)
        return Outcome(
            logprobs_BC,
            torch.ones_like(logprobs_BC, dtype=torch.long),
            gold_B,
            tuple(example.group for example in examples),
            normalize,
            tuple(example.task or None for example in examples),
            {name: [example.extra.get(name) for example in examples] for name in columns},
            (0,) * len(examples),
        )

    def generate(self, *arguments: Any, **options: Any) -> NoReturn:
        """Raises `ModelError`: there is nothing to write with."""
        raise ModelError("a vision transformer writes no text; it chooses among target.choices")

    def attend(self, rows: Queried, batch: Sequence[TokenSequence]) -> Tensor:
        """What the queries find in the images: [B, 3 L + 1, D], the last mean query first."""
        own, h, a = self.images, self.images.hidden, self.images.mixing
        keys_BLHTS, values_BLHTS = self._read(batch)
        pooled, attended, computed = list[Tensor](), list[Tensor](), list[Tensor]()
        for i, layer in enumerate(self.model.layers):
            down1, up1, down2, up2, *mixing = torch.split(rows.synthesis[i], [h] * 4 + [a] * 8)
            q_BND = rows.queries[i].expand(len(batch), -1, -1)
            if i:
                q_BND = q_BND + own.feature_scale * pooled[-1][:, None]
            q_BND = adapt(q_BND, down1, up1)
            q_BND = q_BND + own.attention_scale * mix(norm(norm(q_BND)), mixing)
            q_BND = q_BND + own.adapter_scale * adapt(norm(q_BND), down2, up2)
            attention = layer.attention
            asked = self._heads(attention.q_proj(layer.layernorm_before(q_BND)))
            shares = torch.softmax(asked @ keys_BLHTS[:, i].mT * attention.scaling, dim=-1)
            h_BND = attention.o_proj((shares @ values_BLHTS[:, i]).transpose(1, 2).flatten(2))
            q_BND = q_BND + h_BND
            m_BND = layer.mlp(layer.layernorm_after(q_BND))
            pooled.append((q_BND + m_BND).mean(1))
            attended.append(h_BND.mean(1))
            computed.append(m_BND.mean(1))
        return torch.stack([pooled[-1], *pooled, *attended, *computed], dim=1)

    def _features(self, rows: Queried, batch: Sequence[TokenSequence]) -> Tensor:
        """One feature of each image, [B, D]."""
        found_BFD = self.attend(rows, batch)
        found_BFD = found_BFD + adapt(norm(found_BFD), *rows.adapter.chunk(2))
        weights_BF = torch.tanh(gelu(found_BFD[:, 0] @ rows.weights.T))
        ones = torch.ones_like(weights_BF[:, :1])
        feature_BD = (torch.cat([ones, weights_BF], dim=1)[..., None] * found_BFD).mean(1)
        normed: Tensor = self.model.layernorm(feature_BD)
        return normed

    def split(self, rows_PD: Tensor) -> Queried:
        """What the rows of a prompt are. Raises `ModelError` for too few or of another width."""
        own, width, layers = self.images, rows_PD.shape[1], self.layers
        each = 4 * own.hidden + 8 * own.mixing
        sizes = [layers * own.queries, layers * each, 2 * own.hidden, 3 * layers]
        if len(rows_PD) <= sum(sizes) or width != self.width:
            raise ModelError(
                f"a prompt of {list(rows_PD.shape)} rows; expected {sum(sizes)} of {self.width} "
                "numbers and one for each class: use the model and the [images] it was made with"
            )
        queries, synthesis, *rest = torch.split(rows_PD, [*sizes, len(rows_PD) - sum(sizes)])
        shape = (layers, -1, width)
        return Queried(queries.view(shape), synthesis.view(shape), *rest)

    def _heads(self, rows_BTD: Tensor) -> Tensor:
        return rows_BTD.view(*rows_BTD.shape[:2], self.heads, -1).transpose(1, 2)

    @torch.no_grad()
    def _read(self, batch: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, heads, T, S] of the frozen tokens.

        Images are read one at a time, so that their bits do not depend on their neighbors.
        """
        read = []
        for sequence in batch:
            prefix = self.prefix_cache.get(sequence.prefix)
            if prefix is None:
                prefix = self.prefix_cache.put(sequence.prefix, self._tokens(sequence.example))
            read.append(prefix)
        keys, values = zip(*read, strict=True)
        return torch.stack(keys), torch.stack(values)

    def pixels(self, example: Example) -> Tensor:
        """An example's image, [1, channels, height, width]."""
        numbers = torch.frombuffer(bytearray(example.extra[PIXELS]), dtype=torch.float32)
        return numbers.view(1, *self.shape).to(self.device, self.dtype)

    def _tokens(self, example: Example) -> CachedPrefix:
        x_BTD = self.model.embeddings(self.pixels(example))
        keys, values = [], []
        for layer in self.model.layers:
            normed = layer.layernorm_before(x_BTD)
            keys.append(self._heads(layer.attention.k_proj(normed))[0])
            values.append(self._heads(layer.attention.v_proj(normed))[0])
            x_BTD = layer(x_BTD)
        return CachedPrefix(torch.stack(keys), torch.stack(values))


def class_means(features_ND: Tensor, gold_N: Tensor, rows_CD: Tensor) -> Tensor:
    """Rows [C, D] that tell classes apart by the means of their features.

    A row is the way from the mean of all features to that of the class, without its part along the
    mean, as no bias could take that off again. Logits are scaled to a standard deviation of 1.
    Where no feature is of a class, its row is that of `rows_CD`.
    """
    middle_D = features_ND.mean(0)
    along_D = torch.nn.functional.normalize(middle_D, dim=0)
    seen = [k for k in range(len(rows_CD)) if (gold_N == k).any()]
    ways_KD = torch.stack([features_ND[gold_N == k].mean(0) - middle_D for k in seen])
    ways_KD -= (ways_KD @ along_D)[:, None] * along_D
    rows_CD = rows_CD.clone()
    rows_CD[seen] = ways_KD / (features_ND @ ways_KD.T).std().clamp(min=1e-12)
    return rows_CD


def norm(x: Tensor) -> Tensor:
    """Layer norm without a scale."""
    return layer_norm(x, x.shape[-1:])


def adapt(x: Tensor, down_HD: Tensor, up_HD: Tensor) -> Tensor:
    """x and what a bottleneck of H numbers adds to it."""
    return x + gelu(x @ down_HD.T) @ up_HD


def mix(x_BND: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Attention of queries to each other with one head, whose maps are adapters."""
    q, k, v = (adapt(x_BND, *rows[i : i + 2]) for i in (0, 2, 4))
    shares = torch.softmax(q @ k.mT * x_BND.shape[-1] ** -0.5, dim=-1)
    return adapt(shares @ v, *rows[6:8])
