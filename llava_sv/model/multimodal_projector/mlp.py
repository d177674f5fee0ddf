"""LLaVA's projectors, E -> C, token by token: `linear`, `identity`, `mlp{k}x_gelu`. Parameter names are LLaVA's.

Each owns the summary weights (`summary.*`) and turns `VisionFeatures` into the images' `TokenGroups`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from llava_sv.model.compression.select import VisionFeatures
from llava_sv.model.compression.summary import SummaryTokens
from llava_sv.model.multimodal_projector.grouping import get_grouping
from llava_sv.model.token_groups import TokenGroups


class Projector(nn.Module, ABC):
    """Projects, then groups as the config's family and `skip_vision` block say."""

    summary: SummaryTokens | None

    def __init__(self, config: Any):
        super().__init__()
        self.skip = config.skip_vision
        self.grouping = get_grouping(config.mm_family)
        self.summary = None
        if self.skip is not None:
            self.summary = SummaryTokens(
                config.hidden_size, self.skip.former_summary, self.skip.latter_summary, self.skip.summary_norm
            )

    @abstractmethod
    def project(self, features_VNE: Tensor) -> Tensor:
        """[V, N, E] -> [V, N, C]."""

    def reset_projection(self) -> None:
        """Fresh weights for the projection, as torch initialises its layers."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("summary"):
                module.reset_parameters()

    def forward(self, features: VisionFeatures, views_per_image: list[int]) -> list[TokenGroups]:
        """One `TokenGroups` an image; `views_per_image` tells how many of the V views each image has."""
        return self.grouping(self.project(features.patches), features, views_per_image, self.skip, self.summary)


class IdentityProjector(Projector):
    """The features as they are: E must equal C."""

    def project(self, features_VNE: Tensor) -> Tensor:
        return features_VNE


class LinearProjector(Projector):
    """One linear layer (`weight`, `bias` without a number, as LLaVA has it)."""

    def __init__(self, config: Any):
        super().__init__(config)
        layer = nn.Linear(config.mm_hidden_size, config.hidden_size)
        self.weight, self.bias = layer.weight, layer.bias

    def project(self, features_VNE: Tensor) -> Tensor:
        return nn.functional.linear(features_VNE, self.weight, self.bias)

    def reset_projection(self) -> None:
        fresh = nn.Linear(self.weight.shape[1], self.weight.shape[0], device=self.weight.device)
        self.weight.data.copy_(fresh.weight.data)
        self.bias.data.copy_(fresh.bias.data)


class MlpProjector(Projector):
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
