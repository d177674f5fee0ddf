"""What makes a language model a LLaVA: the encoder and projector it holds, and the splice of images into text.

`LlavaMetaModel` is mixed into the decoder, `LlavaMetaForCausalLM` into the model with a head (`language_model/`).
B batch, T0 prompt length, T spliced length, V views, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.model.compression.select import wants_of
from llava_sv.model.config import LlavaFields
from llava_sv.model.multimodal_encoder.builder import build_vision_tower
from llava_sv.model.multimodal_encoder.vision_tower import VisionTower
from llava_sv.model.multimodal_projector.builder import build_vision_projector
from llava_sv.model.splice import SplicedBatch, labels_after_cut, splice
from llava_sv.model.token_counts import selects
from llava_sv.model.token_groups import TokenGroups

Images = Tensor | list[Tensor] | None
"""All images of a batch, in order of their marks: [n, 3, H, W], or a list of [3, H, W] or [views, 3, H, W]."""


class LlavaMetaModel:
    """The decoder's side: owns `vision_tower` and `mm_projector`."""

    def init_multimodal(self, config: LlavaFields) -> None:
        """Called once, at the end of the decoder's `__init__`."""
        if config.vision_config is not None:
            self.vision_tower = build_vision_tower(config)
            self.vision_tower.requires_grad_(False)
        if config.mm_hidden_size is not None:
            self.mm_projector = build_vision_projector(config)

    def get_vision_tower(self) -> VisionTower | None:
        """The encoder, or None before one is attached."""
        return getattr(self, "vision_tower", None)

    def attach_vision_tower(self, tower: VisionTower) -> None:
        """Take over a loaded encoder, frozen; the config then describes it, and checkpoints hold its weights."""
        tower.requires_grad_(False)
        self.vision_tower = tower
        self.config.vision_config = tower.config.to_dict()  # type: ignore[attr-defined]


class LlavaMetaForCausalLM:
    """The side with the head: images to token groups, prompts and groups to a `SplicedBatch`."""

    config: Any
    training: bool

    def get_model(self) -> Any:
        """The decoder (`model.model`), which holds encoder and projector."""
        return self.model  # type: ignore[attr-defined]

    def get_vision_tower(self) -> VisionTower | None:
        """The encoder, or None."""
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Images, image_sizes: list[tuple[int, int]] | None = None) -> list[TokenGroups]:
        """Each image's visual tokens with their roles. The encoder runs all views of the batch in one call."""
        tower = self.get_vision_tower()
        if tower is None:
            raise ValueError("images were given, but this model has no vision tower")
        if isinstance(images, Tensor) and images.dim() == 3:
            images = images.unsqueeze(0)
        views = [image if image.dim() == 4 else image.unsqueeze(0) for image in ([] if images is None else images)]
        if not views:
            return []
        pixels = torch.cat([view.to(tower.device, tower.dtype) for view in views])
        features = tower(pixels, **(wants_of(self.config.skip_vision.selection) if selects(self.config) else {}))
        projector = self.get_model().mm_projector
        features = features.to(next(iter(projector.parameters()), pixels).device)  # layers may be spread over devices
        return projector(features, [view.shape[0] for view in views], image_sizes)

    def surviving_labels(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """labels [B, T0] of a training batch without those that the cut to `tokenizer_model_max_length` takes away."""
        marks = int((input_ids == IMAGE_TOKEN_INDEX).sum())
        sizes = image_sizes if image_sizes else [None] * marks
        lengths = [self.config.visual_tokens_per_image(size) for size in sizes]
        return labels_after_cut(input_ids, labels, attention_mask, lengths, self.config.tokenizer_model_max_length)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Images = None,
        image_sizes: list[tuple[int, int]] | None = None,
        padding_side: str | None = None,
        packs: list[int] | None = None,
    ) -> SplicedBatch:
        """Splice images into prompts. input_ids, attention_mask, labels: [B, T0] with `IMAGE_TOKEN_INDEX` marks.

        packs: see `splice`: how many of the B samples share each row of the result.

        With labels, a sequence is cut to `config.tokenizer_model_max_length`; a prompt for generation never is.
        While training, encoder and projector run in a batch without images too, on a black one that weighs nothing:
        every rank then takes part in every collective. Raises `ValueError` where marks and images disagree in number.
        """
        groups = self.encode_images(images, image_sizes)
        anchor: Tensor | None = None
        if self.training and not groups and self.get_vision_tower() is not None:
            dummy = self.encode_images(self.get_vision_tower().dummy_images())  # type: ignore[union-attr]
            anchor = (torch.cat([group.tokens for group in dummy]) * 0.0).sum()
        batch = splice(
            input_ids,
            groups,
            self.get_model().embed_tokens,
            attention_mask=attention_mask,
            labels=labels,
            max_length=self.config.tokenizer_model_max_length if labels is not None else None,
            padding_side=padding_side or self.config.tokenizer_padding_side,
            packs=packs,
        )
        if anchor is not None:
            batch.inputs_embeds = batch.inputs_embeds + anchor.to(batch.inputs_embeds)
        return batch
