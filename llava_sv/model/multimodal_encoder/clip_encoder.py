"""CLIP's vision transformer, cut at the selected layer: pixels [V, 3, H, W] in, `VisionFeatures` out.

Built by `multimodal_encoder.builder`; called by `llava_arch`. V views, N patches, E width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_sv.errors import UserError
from llava_sv.model.compression.select import VisionFeatures

FEATURES = ("patch", "cls_patch")


def check_selected_state(
    vision_config: dict[str, Any], select_layer: int, select_feature: str, feature_levels: list[int] | None = None
) -> None:
    """`UserError` for a hidden state that this encoder does not have, or an unknown `mm_vision_select_feature`."""
    if select_feature not in FEATURES:
        raise UserError(f"mm_vision_select_feature: unknown {select_feature!r}; known: {', '.join(FEATURES)}")
    layers = vision_config["num_hidden_layers"]
    if not (1 <= select_layer <= layers or -layers <= select_layer <= -1):
        raise UserError(
            f"mm_vision_select_layer: this encoder has no layer {select_layer}; it has 1 to {layers}, "
            f"or counted from the end -1 to -{layers}"
        )
    if feature_levels is not None:
        rising = all(a < b for a, b in zip(feature_levels, feature_levels[1:]))
        if not feature_levels or not rising or not 0 <= feature_levels[0] <= feature_levels[-1] < layers:
            raise UserError(
                f"mm_vision_feature_levels: expected rising block numbers from 0 to {layers - 1}, got {feature_levels}"
            )


class CLIPVisionTower(nn.Module):
    """Holds a `CLIPVisionModel`; parameter names are LLaVA's (`vision_tower.vision_tower.vision_model.*`)."""

    def __init__(
        self,
        model: CLIPVisionModel,
        select_layer: int = -2,
        select_feature: str = "patch",
        feature_levels: list[int] | None = None,
    ):
        super().__init__()
        check_selected_state(model.config.to_dict(), select_layer, select_feature, feature_levels)
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
        config = CLIPVisionConfig.from_dict(vision_config)
        config._attn_implementation = attn or "sdpa"
        return cls(CLIPVisionModel(config), *selected)

    def used_parameters(self) -> dict[str, tuple[nn.Parameter, int]]:
        """name -> (parameter, depth) of what features depend on: depth 0 is the embedding, block i has depth i + 1.

        Blocks after the selected one, and the norm after the last, are never run: they cannot train.
        """
        found = {}
        for name, parameter in self.named_parameters():
            part = name.removeprefix("vision_tower.vision_model.")
            if part.startswith("encoder.layers."):
                depth = int(part.split(".")[2]) + 1
                if depth <= self.num_blocks:
                    found[name] = (parameter, depth)
            elif part.startswith(("embeddings.", "pre_layrnorm.")):
                found[name] = (parameter, 0)
        return found

    @property
    def model(self) -> CLIPVisionModel:
        """transformers' encoder."""
        return self.vision_tower["vision_model"]  # type: ignore[return-value]

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

    def forward(self, pixels: Tensor, with_cls_attention: bool = False) -> VisionFeatures:
        """pixels [V, 3, H, W]. `with_cls_attention` also gives the selected block's CLS row of attention."""
        trains = any(p.requires_grad for p in self.model.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self._forward(pixels.to(self.device, self.dtype), with_cls_attention)

    def _forward(self, pixels: Tensor, with_cls_attention: bool) -> VisionFeatures:
        hidden_VNE = self.model.pre_layrnorm(self.model.embeddings(pixels))
        before_last = hidden_VNE
        levels = []
        for index, block in enumerate(self.model.encoder.layers[: self.num_blocks]):
            before_last = hidden_VNE
            hidden_VNE = block(hidden_VNE, None)
            if self.feature_levels and index in self.feature_levels:
                levels.append(hidden_VNE[:, 1:])
        attention = None
        if with_cls_attention:
            attention = cls_row_of_attention(self.model.encoder.layers[self.num_blocks - 1], before_last)
        patches = hidden_VNE if self.select_feature == "cls_patch" else hidden_VNE[:, 1:]
        return VisionFeatures(patches, cls=hidden_VNE[:, 0], cls_attention=attention, levels=levels or None)


@torch.no_grad()
def cls_row_of_attention(block: Any, hidden_VNE: Tensor) -> Tensor:
    """Attention of the CLS token to each patch in `block`, summed over heads: [V, N].

    Computes one query row from the block's input [V, 1 + N, E]; the full map is never made.
    """
    attn = block.self_attn
    normed = block.layer_norm1(hidden_VNE)
    views, length, _ = normed.shape
    query_VHD = attn.q_proj(normed[:, 0]).view(views, attn.num_heads, attn.head_dim)
    key_VNHD = attn.k_proj(normed).view(views, length, attn.num_heads, attn.head_dim)
    scores_VHN = torch.einsum("vhd,vnhd->vhn", query_VHD, key_VNHD) * attn.scale
    share = scores_VHN.softmax(dim=-1, dtype=torch.promote_types(scores_VHN.dtype, torch.float32))
    return share.sum(dim=1)[:, 1:]
