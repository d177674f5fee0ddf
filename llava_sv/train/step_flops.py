"""FLOPs of training batches from their real lengths: counts are added up a step, products are taken once a log.

`Counter.of` is called for each forward (`train.llava_trainer`), `Counter.flops` where the window is logged. The
arithmetic is `bench.exact`'s, checked there and here against torch's own counter. Nothing waits for the device: what
only the device knows (roles of the tokens) is summed there, in whole numbers.

Three figures: `model`, the work that the samples need (real tokens, no padding, nothing twice); `hardware`, the work
that is run (padding, a black image where a batch has none, layers run again by gradient checkpointing); `dense`, what
the same samples would need without skipping. An adapter's own small products are left out.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from llava_sv.bench.checkpoint import budget_of, llm_of, setting_of
from llava_sv.bench.exact import (
    Tokens,
    compression_flops,
    encoder_flops,
    llm_flops,
    mlp_projector_flops,
    resampler_flops,
    train_factors,
)
from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.model.language_model.packed_attention import BY_BOUNDS
from llava_sv.model.token_groups import TokenRole, is_visual

ON_DEVICE = ("tokens", "visual_tokens", "skipped", "squares")
"""Counted from the roles: real positions, those of images, those that skip, and the squares of samples' lengths."""

ON_HOST = (
    "samples",
    "positions",
    "padded_squares",
    "supervised",
    "shown",
    "shown_run",
    "images",
    "images_run",
    "views",
    "views_run",
    "merged_pairs",
    "merged_pairs_run",
    "pooled",
    "pooled_run",
    "dense_tokens",
    "dense_squares",
)
"""Counted from the batch as it was loaded; `shown`: forwards with an image; `_run` and `padded` include what fills a
batch up."""

FILLED = ("shown", "images", "views", "merged_pairs", "pooled")
"""Counts that the black image of a batch without images adds to, as `_run`."""


def count_roles(roles: Tensor, packed: list[list[int]] | None = None) -> Tensor:
    """`ON_DEVICE` of token roles [B, T], as int64 on their device. packed: lengths of the samples of each row."""
    lengths = (roles > 0).sum(dim=1)
    squares = (lengths * lengths).sum() if packed is None else lengths.new_tensor(_squares(packed))
    skipped = roles == int(TokenRole.SKIPPED)
    return torch.stack([lengths.sum(), is_visual(roles).sum(), skipped.sum(), squares])


def _squares(packed: list[list[int]]) -> int:
    return sum(length * length for row in packed for length in row)


class Counter:
    """Counts and FLOPs of one model. recompute: gradient checkpointing is on."""

    def __init__(self, model: Any, recompute: bool = False) -> None:
        self.config, self.recompute = model.config, recompute
        self.has_vision = model.get_vision_tower() is not None
        self.factors = factors_of(model)
        self._image = lru_cache(maxsize=4096)(self._image_counts)

    def of(
        self,
        batch: dict[str, Any],
        roles: Tensor | None,
        supervised: int,
        packed: list[list[int]] | None = None,
    ) -> tuple[dict[str, float], Tensor]:
        """(`ON_HOST` as numbers, `ON_DEVICE` as a tensor) of one forward.

        batch: as the collator made it; roles [B, T] as spliced, None for a model without images; supervised: positions
        that carried loss; packed: lengths of the samples of each row, where rows are packs.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        if roles is None:
            roles = mask.to(torch.int8) * int(TokenRole.TEXT)
        rows, width = roles.shape
        counts = dict.fromkeys(ON_HOST, 0.0)
        counts |= {"samples": ids.shape[0], "positions": rows * width, "padded_squares": rows * width * width}
        if packed is not None and str(self.config._attn_implementation) in BY_BOUNDS:
            counts["padded_squares"] = _squares(packed)
        counts["supervised"] = supervised
        marks = ((ids == IMAGE_TOKEN_INDEX) & mask).sum(dim=1).tolist()
        lengths = [total - images for total, images in zip(mask.sum(dim=1).tolist(), marks)]
        self._add_images(counts, batch, marks, lengths)
        counts["dense_tokens"] = sum(lengths)
        counts["dense_squares"] = sum(length * length for length in lengths)
        return counts, count_roles(roles, packed)

    def _add_images(
        self, counts: dict[str, float], batch: dict[str, Any], marks: list[int], lengths: list[int]
    ) -> None:
        """What the batch's images add to `counts`, and to each sample's dense length."""
        owners = [sample for sample, images in enumerate(marks) for _ in range(images)]
        counts["shown"] = float(bool(owners))
        for owner, pixels, size in zip(owners, batch["images"], batch["image_sizes"]):
            dense, pairs, pooled = self._image(tuple(size))
            lengths[owner] += dense
            counts["views"] += pixels.shape[0] if pixels.dim() == 4 else 1
            counts["images"] += 1
            counts["merged_pairs"] += pairs
            counts["pooled"] += pooled
        filler = self._filler() if self.has_vision and not owners else {}
        counts |= {f"{name}_run": counts[name] + filler.get(name, 0) for name in FILLED}

    def _filler(self) -> dict[str, float]:
        """What the black image that stands in where a batch has none adds: one view."""
        one: dict[str, float] = {"shown": 1, "images": 1, "views": 1}
        if self.config.mm_family == "llava_hd":
            skip = self.config.skip_vision  # without tiles, the whole overview is retained and nothing merged
            return one | {"pooled": self.config.num_patches if skip is not None and skip.former_summary else 0}
        _, pairs, pooled = self._image((1, 1))
        return one | {"merged_pairs": pairs, "pooled": pooled}

    def _image_counts(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(dense tokens, similarities of the merge, tokens pooled) of one image of `size`."""
        dense = self.config.dense_tokens_per_image(size)
        if self.config.skip_vision is None:
            return dense, 0, 0
        budget = budget_of(self.config, size)
        return dense, budget.merged_from * (budget.skipped + 1), budget.pooled

    def flops(self, counts: dict[str, float]) -> dict[str, float]:
        """`model`, `hardware` and `dense` FLOPs, forward and backward, of counts summed over forwards and ranks."""
        c = counts
        seen = self._seen(c)
        # padding passes no FFN in a layer that skips
        real = self._decoder(c["tokens"], c["squares"], c["tokens"] - c["skipped"], c["tokens"])
        run = self._decoder(c["positions"], c["padded_squares"], c["tokens"] - c["skipped"], c["positions"])
        dense = self._decoder(c["dense_tokens"], c["dense_squares"], c["dense_tokens"], c["dense_tokens"])
        head = self._trained(self._head(c["supervised"]))
        return {
            "model": self._trained(seen | real) + head,
            "hardware": self._trained(self._seen(c, "_run") | run) + head + self._again(run, c),
            "dense": self._trained({**seen, "merge": 0.0, "summaries": 0.0} | dense) + head,
        }

    def _trained(self, forward: dict[str, float]) -> float:
        return sum(value * self.factors[name] for name, value in forward.items())

    def _seen(self, counts: dict[str, float], run: str = "") -> dict[str, float]:
        """Encoder, projector and compression, forward; run: `_run` for what was run."""
        if not self.has_vision:
            return {}
        shown, images, views, pairs, pooled = (counts[name + run] for name in FILLED)
        width, setting = self.config.hidden_size, self._setting
        one = compression_flops(Tokens(0, 0, merged_from=1, pooled=1), width)
        parts = {name: views * value for name, value in encoder_flops(setting.encoder).items()}
        parts |= {"merge": pairs * one["merge"], "summaries": pooled * one["summaries"]}
        if not setting.windows:
            rows = setting.encoder.patches + int(setting.projects_cls)
            each = mlp_projector_flops(rows, setting.encoder.hidden_size, width, setting.projector_depth)
            return parts | {name: views * value for name, value in each.items()}
        each = resampler_flops(setting.encoder, setting.windows, setting.levels, width)
        parts |= {name: images * value for name, value in each.items()}
        # learned queries are projected once at the first level, whatever the batch
        queries = sum(count for _, count in setting.windows)
        parts["resampler_linear"] -= (images - shown) * 2 * queries * setting.encoder.hidden_size**2
        return parts

    @cached_property
    def _setting(self) -> Any:
        return setting_of(self.config)

    def _decoder(self, tokens: float, squares: float, rows: float, every: float) -> dict[str, float]:
        """All layers, forward: `rows` pass the FFN where a layer skips, `every` elsewhere."""
        one = llm_flops(llm_of(self.config), Tokens(text=1, retained=0), head_tokens=0)
        layers = self.config.num_hidden_layers
        skipping = self.skipping_layers
        ffn = one["llm_ffn"] / layers * (skipping * rows + (layers - skipping) * every)
        return {
            "llm_projections": tokens * one["llm_projections"],
            "llm_attention": squares * one["llm_attention"],
            "llm_ffn": ffn,
        }

    @property
    def skipping_layers(self) -> int:
        """Decoder layers whose FFN skips."""
        skip = self.config.skip_vision
        return 0 if skip is None else len(skip.layers_that_skip(self.config.num_hidden_layers))

    def _head(self, supervised: float) -> dict[str, float]:
        one = llm_flops(llm_of(self.config), Tokens(text=0, retained=0), head_tokens=1)
        return {"lm_head": supervised * one["lm_head"]}

    def _again(self, run: dict[str, float], counts: dict[str, float]) -> float:
        """What gradient checkpointing runs forward once more: decoder layers, and an encoder that trains. A layer's
        last product is not run again where nothing after it needs to be."""
        if not self.recompute:
            return 0.0
        config = self.config
        plain = config.num_hidden_layers - self.skipping_layers
        again = sum(run.values()) - plain * counts["positions"] * 2 * config.hidden_size * config.intermediate_size
        if self.factors["encoder_blocks"] > 1:
            encoder, views = self._setting.encoder, counts["views_run"]
            parts = encoder_flops(encoder)
            last = encoder.num_blocks * 2 * encoder.rows * encoder.hidden_size * encoder.intermediate_size
            again += views * (parts["encoder_blocks"] + parts["encoder_attention"] - last)
        return again


def factors_of(model: Any) -> dict[str, float]:
    """`train_factors` for what of `model` trains: each part's forward, times what its backward adds."""
    trains = {part: any(p.requires_grad for p in parameters) for part, parameters in _parts(model).items()}
    factors = train_factors(train_llm=trains["decoder"], train_encoder=trains["encoder"])
    factors["lm_head"] = 3.0 if trains["head"] else 2.0
    if not trains["projector"]:
        through = 1.0 if trains["encoder"] else 0.0  # gradients pass it on their way to the encoder
        linear = dict.fromkeys(("projector_in", "projector_out", "resampler_linear"), 1.0 + through)
        factors |= {**linear, "resampler_attention": 1.0 + 2.5 * through, "summaries": 2.0 + through}
    return factors


def _parts(model: Any) -> dict[str, list[Tensor]]:
    """Parameters of decoder, head, encoder and projector; adapters beside frozen weights and the summaries' own few
    are no part."""
    inner = model.get_model()
    projector = getattr(inner, "mm_projector", None)
    modules = {"decoder": inner.layers, "head": model.lm_head}
    modules |= {"encoder": model.get_vision_tower(), "projector": projector}
    # biases may train beside frozen weights that have adapters: their gradient is a sum, no product
    apart = ("lora_", "summary.", "image_newline", ".bias")
    named = {part: () if module is None else module.named_parameters() for part, module in modules.items()}
    return {part: [p for name, p in all_ if not any(word in name for word in apart)] for part, all_ in named.items()}
