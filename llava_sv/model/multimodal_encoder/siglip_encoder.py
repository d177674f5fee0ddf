"""SigLIP's vision transformer, and SigLIP 2's of fixed size: no CLS token, and an attention-pooling head.

V views, N patches, E width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from llava_sv.model.gathering import gathered
from llava_sv.model.multimodal_encoder.vision_tower import VisionTower


class SiglipVisionTower(VisionTower):
    """Holds a `SiglipVisionModel`."""

    config_class = SiglipVisionConfig
    model_class = SiglipVisionModel
    other_weights = ("text_model.", "logit_scale", "logit_bias")

    @classmethod
    def provides(cls, vision_config: dict[str, Any]) -> set[str]:
        return {"pooling head"} if vision_config.get("vision_use_head", True) else set()

    @torch.no_grad()
    def pool_attention(self, hidden_VTE: Tensor) -> Tensor:
        """The head reads what it was trained on, the normalised last hidden state: blocks after the selected one (one
        more at the usual layer -2) run for this row alone, without gradient."""
        for block in self.model.encoder.layers[self.num_blocks :]:
            hidden_VTE = block(hidden_VTE, None)
        return probe_row_of_attention(self.model.head, self.model.post_layernorm(hidden_VTE))


@torch.no_grad()
def probe_row_of_attention(head: Any, normed_VNE: Tensor) -> Tensor:
    """Attention of the pooling head's probe to each patch, summed over heads: [V, N]. One query row is computed."""
    attn = head.attention
    views, patches, width = normed_VNE.shape
    # the weights are read here, not by their module's own forward: under ZeRO-3 they are gathered by hand
    with gathered([head.probe, attn.in_proj_weight, attn.in_proj_bias]):
        query_weight, key_weight, _ = attn.in_proj_weight.chunk(3)
        query_bias, key_bias, _ = attn.in_proj_bias.chunk(3)
        query_HD = F.linear(head.probe[0, 0], query_weight, query_bias).view(attn.num_heads, -1)
        key_VNHD = F.linear(normed_VNE, key_weight, key_bias).view(views, patches, attn.num_heads, -1)
    scores_VHN = torch.einsum("hd,vnhd->vhn", query_HD, key_VNHD) * (width // attn.num_heads) ** -0.5
    share = scores_VHN.softmax(dim=-1, dtype=torch.promote_types(scores_VHN.dtype, torch.float32))
    return share.sum(dim=1)
