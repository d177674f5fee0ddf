"""Every setting of a model, declared: `LlavaConfig` is config.json, with one nested `skip_vision` block.

`LlavaFields` are the settings that every LLaVA has, whatever its decoder; `language_model` has the configs of decoders
other than LLaMA. Read by every room of the model; written by the builders. Holds no tensor and imports no other room.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from llava_sv.errors import UserError
from llava_sv.model.retained_budget import AUTO, check_most, complete
from llava_sv.model.retained_budget import FIELDS as ONLY_AUTO
from llava_sv.model.token_counts import count_tokens, most_tokens
from llava_sv.model.token_groups import KV_LEVELS

SUMMARY_NORMS = ("none", "layernorm")


@dataclass
class SkipVisionConfig:
    """The switches of Skip-Vision (the paper's section 4; Tables 4, 6 and 7). One field, one ablation."""

    skip_ffn: bool = True
    """Skipped tokens bypass the FFN (equations 4 and 5)."""
    num_retained: int | str = 100
    """Nr: retained visual tokens an image. The recipes of LLaVA-HD (the overview) and CoS (all scales but the finest)
    set their own default. `auto`: as many as the image's content asks for (`retained_budget`)."""
    num_skipped: int | None = 156
    """Ns: skipped visual tokens an image after merging. Without `merge` it is not read: all the others are skipped."""
    merge: bool = True
    """Merge the tokens that are not retained down to `num_skipped` (section 4.1)."""
    selection: str = "cls_similarity"
    """How retained tokens are chosen: a key of `compression.select.SELECTORS`."""
    former_summary: bool = True
    """Put a summary of the retained tokens after them (equation 6)."""
    latter_summary: bool = True
    """Put a summary of the skipped tokens after them (equation 6)."""
    summary_norm: str = "none"
    """`layernorm` normalises tokens before they are scored; the unnormalised ones are pooled. `none` does not."""
    last_visual_ffn: bool = False
    """The last skipped token passes the FFN too, and counts as retained (Table 6, LV)."""
    skip_layers: str | list[int] = "all"
    """Decoder layers that skip: `all`, a list of indices, or a range `first-last` (inclusive; commas join several)."""
    skip_kv: str = "skipped"
    """Default level of the skip KV-cache at inference (Table 7): a key of `KV_LEVELS`."""
    retained_mean: int | None = None
    """`auto`: retained tokens an image on average; Nr + Ns is `retained_mean` + `num_skipped` for every image [100]."""
    retained_min: int | None = None
    """`auto`: the fewest that an image retains [half the average]."""
    retained_max: int | None = None
    """`auto`: the most that an image retains [twice the average]."""
    retained_threshold: float | None = None
    """`auto`: the share of an image's scores that its retained patches hold; training finds it on its images."""

    def __post_init__(self) -> None:
        for name in ("skip_ffn", "merge", "former_summary", "latter_summary", "last_visual_ffn"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"skip_vision.{name}: expected true or false, got {getattr(self, name)!r}")
        if self.num_retained != AUTO and not _is_count(self.num_retained):
            raise UserError(
                f"skip_vision.num_retained: expected a whole number of 1 or more, got {self.num_retained!r}; or 'auto'"
            )
        if self.merge and not _is_count(self.num_skipped):
            raise UserError(
                f"skip_vision.num_skipped: expected a whole number of 1 or more, got {self.num_skipped!r}; "
                "to skip without merging, set merge to false"
            )
        for name in ("selection", "summary_norm", "skip_kv"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"skip_vision.{name}: expected a name, got {getattr(self, name)!r}")
        if not isinstance(self.skip_layers, (str, list)):
            raise UserError(
                f"skip_vision.skip_layers: expected 'all', a range or a list of layers, got {self.skip_layers!r}"
            )
        if self.skip_kv not in KV_LEVELS:
            raise UserError(f"skip_vision.skip_kv: unknown level {self.skip_kv!r}; known: {', '.join(KV_LEVELS)}")
        if self.summary_norm not in SUMMARY_NORMS:
            raise UserError(
                f"skip_vision.summary_norm: unknown value {self.summary_norm!r}; known: {', '.join(SUMMARY_NORMS)}"
            )
        complete(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SkipVisionConfig:
        """Build from config.json's block; an unknown key is a `UserError` that lists the known ones."""
        if not isinstance(values, dict):
            raise UserError(f"skip_vision: expected a block of settings, or null for a dense model, got {values!r}")
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise UserError(f"skip_vision: unknown key {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As stored in config.json; what belongs to `num_retained: auto` only with it."""
        only_auto = () if self.adaptive else ONLY_AUTO
        return {name: value for name, value in asdict(self).items() if name not in only_auto}

    @property
    def adaptive(self) -> bool:
        """Whether an image's content says how many of its tokens are retained."""
        return self.num_retained == AUTO

    @property
    def mean_retained(self) -> int:
        """Nr, or what it is on average where it follows the content."""
        return int(self.retained_mean or 0) if self.adaptive else int(self.num_retained)

    def at(self, num_retained: int) -> SkipVisionConfig:
        """The same with a fixed Nr, and as many more or fewer skipped: an image of `num_retained` by its content."""
        skipped = self.num_skipped if self.num_skipped is None else self.num_skipped + self.mean_retained - num_retained
        without: dict[str, Any] = dict.fromkeys(ONLY_AUTO)
        return replace(self, num_retained=num_retained, num_skipped=skipped, **without)

    def layers_that_skip(self, num_layers: int) -> list[int]:
        """Indices of the decoder layers that skip, out of `num_layers`."""
        if not self.skip_ffn:
            return []
        if self.skip_layers == "all":
            return list(range(num_layers))
        chosen = self.skip_layers if isinstance(self.skip_layers, list) else _parse_layers(self.skip_layers)
        wrong = [i for i in chosen if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < num_layers]
        if wrong:
            raise UserError(
                f"skip_vision.skip_layers: no layer {wrong[0]!r}; this model has layers 0 to {num_layers - 1}"
            )
        return sorted(set(chosen))

    def summaries(self) -> int:
        """Summary tokens an image."""
        return int(self.former_summary) + int(self.latter_summary)

    def skipped_of(self, num_tokens: int) -> int:
        """Skipped tokens of an image of `num_tokens`: those that are not retained, after merging at most Ns of them."""
        rest = num_tokens - self.mean_retained
        return min(int(self.num_skipped or rest), rest) if self.merge else rest

    def check_budget(self, num_tokens: int, what: str) -> None:
        """`UserError` where an image's `num_tokens` (`what` names them) do not hold Nr and Ns, or none is skipped."""
        if self.merge and self.mean_retained + int(self.num_skipped or 0) > num_tokens:
            raise UserError(
                f"skip_vision: {self.retained_said} + num_skipped {self.num_skipped} is more than the "
                f"{num_tokens} {what}; lower one of them"
            )
        if self.mean_retained >= num_tokens:
            raise UserError(
                f"skip_vision: {self.retained_said} leaves nothing to skip of the {num_tokens} {what}; lower it"
            )
        check_most(self, num_tokens - 1, f"the {num_tokens} {what} that leaves one to skip")

    @property
    def retained_said(self) -> str:
        """The field that says how many tokens are retained, on average, and its value."""
        return f"retained_mean {self.retained_mean}" if self.adaptive else f"num_retained {self.num_retained}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def patches_of(vision_config: dict[str, Any]) -> int:
    """N: patches of one square view of the encoder that `vision_config` describes."""
    try:
        return (vision_config["image_size"] // vision_config["patch_size"]) ** 2
    except (KeyError, TypeError) as error:
        raise UserError("vision_config: image_size and patch_size are needed, in pixels") from error


def _parse_layers(text: str) -> list[int]:
    """`"2,8-15"` -> [2, 8, ..., 15]."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UserError(f"skip_vision.skip_layers: cannot read {text!r}; write 'all', '8-31' or '0,4,8-15'")
        layers.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    return layers


Stock: Any = object
"""Stands for the class of transformers that a mixin is put in front of; the type checker then asks nothing of it."""


@dataclass(init=False, repr=False, eq=False)
class LlavaFields(Stock):
    """Mixed into a decoder's config: LLaVA's `mm_*` fields and the `skip_vision` block, beside the decoder's own."""

    mm_family: str = "llava"
    """Which recipe of `model.builders.BUILDERS` this model follows."""
    mm_vision_tower: str | None = None
    """Name or path of the vision encoder that the weights came from."""
    vision_config: dict | None = None
    """The encoder's own config: present when its weights are part of this checkpoint."""
    mm_projector_type: str = "mlp2x_gelu"
    """`linear`, `identity`, `mlp{k}x_gelu`; CoS: a preset (`cos_80`, `cos_80_448`, `cos_336`, `cos_1296`) or `cos`."""
    cos_windows: list[int] | None = None
    """Projector type `cos`: window size of each scale in cells of the encoder's grid, coarse to fine."""
    cos_queries: list[int] | None = None
    """Projector type `cos`: learned queries of each scale over all of its windows."""
    mm_hidden_size: int | None = None
    """E: width of the encoder's features."""
    mm_vision_select_layer: int = -2
    """Index into the encoder's hidden states (0 is the embedding, -1 the last layer)."""
    mm_vision_select_feature: str = "patch"
    """`patch` drops the CLS token, `cls_patch` keeps it (dense models only)."""
    mm_vision_feature_levels: list[int] | None = None
    """Encoder blocks (counted from 0) whose outputs the CoS resampler reads in sequence; the last is the features."""
    mm_vision_image_size: int | None = None
    """Side of the encoder's square input in pixels where it is not the encoder's own: positions are interpolated."""
    image_aspect_ratio: str | None = "pad"
    """How an image is made square: `pad` or `square`. LLaVA-HD: the overview and the canvas of tiles; or `anyres`."""
    hd_max_tiles: int = 4
    """LLaVA-HD: most tiles that an image is cut into, besides its overview."""
    hd_fixed_grid: str | None = None
    """LLaVA-HD: this grid (columns x rows, such as `2x2`) for every image, instead of the closest aspect ratio."""
    image_grid_pinpoints: list[list[int]] | None = None
    """`anyres`: resolutions (width, height) to choose from; None: LLaVA-NeXT's five, in tiles of the encoder's size."""
    tokenizer_model_max_length: int | None = None
    """The spliced sequence is cut here, never inside an image."""
    tokenizer_padding_side: str = "right"
    """Side on which training batches are padded; generation always pads left."""
    conv_template: str | None = None
    """Conversation template the model was trained with: a key of `conversation.CONV_TEMPLATES`."""
    skip_vision: Any = None
    """`SkipVisionConfig` (a dict is accepted and checked), or None for a dense model."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "skip_vision" and value is not None and not isinstance(value, SkipVisionConfig):
            value = SkipVisionConfig.from_dict(value)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """As stored in config.json."""
        output = super().to_dict()
        if isinstance(self.skip_vision, SkipVisionConfig):
            output["skip_vision"] = self.skip_vision.to_dict()
        return output

    @property
    def num_patches(self) -> int:
        """N: patches of one view of the encoder. `ValueError` before an encoder is attached."""
        if self.vision_config is None:
            raise ValueError("config.vision_config is empty: no vision encoder is attached yet")
        return patches_of(self.vision_config)

    def dense_tokens_per_image(self, image_size: tuple[int, int] | None = None) -> int:
        """What `visual_tokens_per_image` would be without `skip_vision`."""
        dense = copy.copy(self)
        dense.skip_vision = None
        return dense.visual_tokens_per_image(image_size)

    def visual_tokens_per_image(self, image_size: tuple[int, int] | None = None) -> int:
        """Tokens that an image of `image_size` (width, height in pixels) takes in the spliced sequence; without a size,
        the most that an image of any size takes."""
        return most_tokens(self) if image_size is None else count_tokens(self, image_size).total


@strict
class LlavaConfig(LlavaFields, LlamaConfig):
    """config.json of a LLaVA over LLaMA (or Vicuna): LLaMA's fields and LLaVA's."""

    model_type = "llava_llama"
