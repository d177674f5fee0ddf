"""CLIP's vision transformer: what it has beside a `VisionTower`, which is a CLS token before the patches.

V views, N patches, E width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_sv.model.multimodal_encoder.vision_tower import VisionTower


class CLIPVisionTower(VisionTower):
    """Holds a `CLIPVisionModel`."""

    config_class = CLIPVisionConfig
    model_class = CLIPVisionModel
    other_weights = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    extra_tokens = 1
    embedding_parts = ("embeddings.", "pre_layrnorm.")

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model.pre_layrnorm(self.model.embeddings(pixels))

    def cls_attention(self, block_input_VTE: Tensor) -> Tensor:
        return cls_row_of_attention(self.model.encoder.layers[self.num_blocks - 1], block_input_VTE)


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
