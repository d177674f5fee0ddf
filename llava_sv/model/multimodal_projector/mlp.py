"""LLaVA's projectors, E -> C, token by token: `linear`, `identity`, `mlp{k}x_gelu`. Parameter names are LLaVA's.

Each owns the summary weights (`summary.*`) and turns `VisionFeatures` into the images' `TokenGroups`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from llava_sv.model.compression.select import VisionFeatures
from llava_sv.model.compression.summary import SummaryTokens
from llava_sv.model.multimodal_projector.families import get_grouping
from llava_sv.model.multimodal_projector.grouping import Sizes
from llava_sv.model.multimodal_projector.scaling import Weights, refuse_resampler
from llava_sv.model.token_groups import TokenGroups
from llava_sv.tiling import ANYRES


class Projector(nn.Module, ABC):
    """Projects, then groups as the config's family and `skip_vision` block say."""

    summary: SummaryTokens | None
    image_newline: Tensor | None
    """[C]: ends each row of a dense `anyres` map (LLaVA-NeXT)."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.skip = config.skip_vision
        self.grouping = get_grouping(config.mm_family)
        self.summary = None
        self.register_parameter("image_newline", None)
        if self.skip is not None:
            self.summary = SummaryTokens(
                config.hidden_size, self.skip.former_summary, self.skip.latter_summary, self.skip.summary_norm
            )
        elif config.mm_family == "llava_hd" and config.image_aspect_ratio == ANYRES:
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size))
            self.reset_newline()

    @abstractmethod
    def tokens_of(self, features: VisionFeatures) -> Tensor:
        """[V, n, C]: what the encoder gave, in the language model's width."""

    def reset_newline(self) -> None:
        """A fresh `image_newline`, scaled as LLaVA-NeXT scales it."""
        if self.image_newline is not None:
            nn.init.normal_(self.image_newline, std=self.image_newline.shape[0] ** -0.5)

    def reset_projection(self) -> None:
        """Fresh weights for the projection, as torch initialises its layers."""
        self.reset_newline()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("summary"):
                module.reset_parameters()

    def adapted(self, weights: Weights, where: str) -> Weights:
        """`weights` of the file `where` (keys without prefix) as this projector can take them; here, as they are.

        Raises `UserError` for a file of another kind of projector.
        """
        refuse_resampler(weights, where, self.config.mm_projector_type)
        return weights

    def forward(
        self, features: VisionFeatures, views_per_image: list[int], image_sizes: Sizes = None
    ) -> list[TokenGroups]:
        """One `TokenGroups` an image; `views_per_image` tells how many of the V views each image has.

        image_sizes: (width, height) of each image as it came; only `anyres` needs them.
        """
        return self.grouping(self, self.tokens_of(features), features, views_per_image, image_sizes)


class TokenwiseProjector(Projector):
    """Projects each patch by itself."""

    @abstractmethod
    def project(self, features_VNE: Tensor) -> Tensor:
        """[V, N, E] -> [V, N, C]."""

    def tokens_of(self, features: VisionFeatures) -> Tensor:
        return self.project(features.patches)


class IdentityProjector(TokenwiseProjector):
    """The features as they are: E must equal C."""

    def project(self, features_VNE: Tensor) -> Tensor:
        return features_VNE


class LinearProjector(TokenwiseProjector):
    """One linear layer (`weight`, `bias` without a number, as LLaVA has it)."""

    def __init__(self, config: Any):
        super().__init__(config)
        layer = nn.Linear(config.mm_hidden_size, config.hidden_size)
        self.weight, self.bias = layer.weight, layer.bias

    def project(self, features_VNE: Tensor) -> Tensor:
        return nn.functional.linear(features_VNE, self.weight, self.bias)

    def reset_projection(self) -> None:
        super().reset_projection()
        fresh = nn.Linear(self.weight.shape[1], self.weight.shape[0], device=self.weight.device)
        self.weight.data.copy_(fresh.weight.data)
        self.bias.data.copy_(fresh.bias.data)


class MlpProjector(TokenwiseProjector):
    """`depth` linear layers with GELU between, named 0, 2, 4, ... as in LLaVA's `nn.Sequential`."""

    def __init__(self, config: Any, depth: int):
        super().__init__(config)
        width = config.mm_hidden_size
        self.names = [str(2 * i) for i in range(depth)]
        for name in self.names:
            self.add_module(name, nn.Linear(width, config.hidden_size))
            width = config.hidden_size
        self.act = nn.GELU()

    def project(self, features_VNE: Tensor) -> Tensor:
        hidden = self.get_submodule(self.names[0])(features_VNE)
        for name in self.names[1:]:
            hidden = self.get_submodule(name)(self.act(hidden))
        return hidden
