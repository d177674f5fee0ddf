"""What all vision encoders here have in common: pixels [V, 3, H, W] in, the selected layer's `VisionFeatures` out.

An encoder is a subclass of a few lines, listed in `builder.VISION_TOWERS`; called by `llava_arch`.
V views, N patches, E width.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_sv.errors import UserError
from llava_sv.model.compression.select import VisionFeatures

FEATURES = ("patch", "cls_patch")


class VisionTower(nn.Module):
    """Holds transformers' vision model; parameter names are LLaVA's (`vision_tower.vision_tower.vision_model.*`)."""

    config_class: ClassVar[Any]
    model_class: ClassVar[Any]
    other_weights: ClassVar[tuple[str, ...]]
    """Prefixes of a published checkpoint's keys that are not the vision model's."""
    extra_tokens: ClassVar[int] = 0
    """Tokens before the patches: 1 where there is a CLS token."""
    embedding_parts: ClassVar[tuple[str, ...]] = ("embeddings.",)
    """Prefixes of the parameters that `embed` runs."""

    def __init__(
        self,
        model: Any,
        select_layer: int = -2,
        select_feature: str = "patch",
        feature_levels: list[int] | None = None,
    ):
        super().__init__()
        self.check_selected_state(model.config.to_dict(), select_layer, select_feature, feature_levels)
        self.vision_tower = nn.ModuleDict({"vision_model": model})
        self.select_feature = select_feature
        self.feature_levels = feature_levels
        layers = model.config.num_hidden_layers
        # hidden state 0 is the embedding, so state i is the output of block i - 1
        self.num_blocks = select_layer if select_layer >= 0 else layers + 1 + select_layer
        if feature_levels:
            self.num_blocks = feature_levels[-1] + 1

    @classmethod
    def from_config(cls, vision_config: dict, attn: str | None, *selected: Any):
        """An encoder with weights still to be loaded (they are part of the checkpoint)."""
        config = cls.config_class.from_dict(vision_config)
        config._attn_implementation = attn or "sdpa"
        return cls(cls.model_class(config), *selected)

    @classmethod
    def provides(cls, vision_config: dict[str, Any]) -> set[str]:
        """What selections may read beside the patches (`select.NEEDS`)."""
        return {"CLS token"} if cls.extra_tokens else set()

    @classmethod
    def check_selected_state(
        cls,
        vision_config: dict[str, Any],
        select_layer: int,
        select_feature: str,
        feature_levels: list[int] | None = None,
    ) -> None:
        """`UserError` for a hidden state or feature that this encoder does not have."""
        if select_feature not in FEATURES:
            raise UserError(f"mm_vision_select_feature: unknown {select_feature!r}; known: {', '.join(FEATURES)}")
        if select_feature == "cls_patch" and not cls.extra_tokens:
            raise UserError(
                f"mm_vision_select_feature: {vision_config['model_type']} has no CLS token for 'cls_patch'; use 'patch'"
            )
        layers = vision_config["num_hidden_layers"]
        if not (1 <= select_layer <= layers or -layers <= select_layer <= -1):
            raise UserError(
                f"mm_vision_select_layer: this encoder has no layer {select_layer}; it has 1 to {layers}, "
                f"or counted from the end -1 to -{layers}"
            )
        if feature_levels is not None:
            rising = all(a < b for a, b in itertools.pairwise(feature_levels))
            if not feature_levels or not rising or not 0 <= feature_levels[0] <= feature_levels[-1] < layers:
                raise UserError(
                    f"mm_vision_feature_levels: expected rising block numbers from 0 to {layers - 1}, "
                    f"got {feature_levels}"
                )

    def embed(self, pixels: Tensor) -> Tensor:
        """pixels [V, 3, H, W] -> hidden state 0, [V, extra + N, E]."""
        return self.model.embeddings(pixels)

    def cls_attention(self, block_input_VTE: Tensor) -> Tensor:
        """Attention of CLS to each patch in the selected block, summed over heads, [V, N]."""
        raise ValueError(f"{type(self).__name__} has no CLS token to attend with")

    def pool_attention(self, hidden_VTE: Tensor) -> Tensor:
        """Attention of the pooling head's probe to each patch, summed over heads, [V, N]."""
        raise ValueError(f"{type(self).__name__} has no pooling head to attend with")

    def used_parameters(self) -> dict[str, tuple[nn.Parameter, int]]:
        """name -> (parameter, depth) of what features depend on: depth 0 is the embedding, block i has depth i + 1.

        Blocks after the selected one, and what comes after the last, are never run for them: they cannot train.
        """
        found = {}
        for name, parameter in self.named_parameters():
            part = name.removeprefix("vision_tower.vision_model.")
            if part.startswith("encoder.layers."):
                depth = int(part.split(".")[2]) + 1
                if depth <= self.num_blocks:
                    found[name] = (parameter, depth)
            elif part.startswith(self.embedding_parts):
                found[name] = (parameter, 0)
        return found

    @property
    def model(self) -> Any:
        """transformers' encoder."""
        return self.vision_tower["vision_model"]

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """E."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """N."""
        return self.num_patches_per_side**2

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def dummy_images(self) -> Tensor:
        """One black view, [1, 3, H, W]: keeps the encoder in step on a rank whose batch has no image."""
        side = self.config.image_size
        return torch.zeros(1, 3, side, side, dtype=self.dtype, device=self.device)

    def forward(
        self, pixels: Tensor, with_cls_attention: bool = False, with_pool_attention: bool = False
    ) -> VisionFeatures:
        """pixels [V, 3, H, W]; the two switches ask for what a selection needs (`select.wants_of`)."""
        trains = any(p.requires_grad for p in self.model.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self._forward(pixels.to(self.device, self.dtype), with_cls_attention, with_pool_attention)

    def _forward(self, pixels: Tensor, with_cls_attention: bool, with_pool_attention: bool) -> VisionFeatures:
        hidden_VTE = self.embed(pixels)
        before_last = hidden_VTE
        levels = []
        for index, block in enumerate(self.model.encoder.layers[: self.num_blocks]):
            before_last = hidden_VTE
            hidden_VTE = block(hidden_VTE, None)
            if self.feature_levels and index in self.feature_levels:
                levels.append(hidden_VTE[:, self.extra_tokens :])
        return VisionFeatures(
            patches=hidden_VTE if self.select_feature == "cls_patch" else hidden_VTE[:, self.extra_tokens :],
            cls=hidden_VTE[:, 0] if self.extra_tokens else None,
            cls_attention=self.cls_attention(before_last) if with_cls_attention else None,
            pool_attention=self.pool_attention(hidden_VTE) if with_pool_attention else None,
            levels=levels or None,
        )
