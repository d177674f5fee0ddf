"""LLaVA over any decoder of transformers with LLaMA's block shape: the model that is trained, saved and asked.

Two mixins, put in front of a stock decoder and of the stock model with its head; `llava_llama` and its neighbours do
so, a few lines each, and `decoders` lists them.
B batch, T0 prompt length, T spliced length, S supervised positions, K vocabulary, C width.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.errors import UserError
from llava_sv.model.compression.summary import SummaryToken
from llava_sv.model.config import LlavaFields, Stock
from llava_sv.model.language_model.loss import LMHead, supervised_positions
from llava_sv.model.language_model.packed_attention import packed_inputs
from llava_sv.model.language_model.skip_cache import cache_to_shrink, drops_any, kept_after_prefill, shrink_cache
from llava_sv.model.language_model.skip_ffn import enable_skip_ffn, rows_through_ffn
from llava_sv.model.llava_arch import Images, LlavaMetaForCausalLM, LlavaMetaModel
from llava_sv.model.multimodal_encoder.builder import VISION_TOWERS
from llava_sv.model.multimodal_projector.mlp import LinearProjector, Projector
from llava_sv.model.multimodal_projector.resampler import ResamplerScale
from llava_sv.model.splice import SplicedBatch
from llava_sv.model.token_counts import check_has_middle
from llava_sv.model.token_groups import KV_LEVELS

DEFAULT_NEW_TOKENS = 20
"""What transformers' `generate` makes where neither `max_new_tokens` nor `max_length` is given."""


class LlavaDecoder(LlavaMetaModel, Stock):
    """Over a stock decoder: Skip-FFN layers, a vision tower and a projector.

    A class that uses it sets `config_class` and `skip_layer_class`.
    """

    skip_layer_class: type[torch.nn.Module]
    """The stock decoder's layer with `SkipFFNMixin` in front."""

    def __init__(self, config: LlavaFields):
        super().__init__(config)
        skip = config.skip_vision
        chosen = skip.layers_that_skip(config.num_hidden_layers) if skip else []
        enable_skip_ffn(self.layers, self.skip_layer_class, chosen)
        # modules that stay on one device when a model is spread over several
        towers = {tower.__name__ for tower in VISION_TOWERS.values()}
        self._no_split_modules: Any = {self.skip_layer_class.__name__, *towers}
        self.init_multimodal(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Projector) and module.image_newline is not None:
            init.normal_(module.image_newline, std=module.image_newline.shape[0] ** -0.5)
        if isinstance(module, SummaryToken):
            init.zeros_(module.weight)
        elif isinstance(module, LinearProjector):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, ResamplerScale):
            init.normal_(module.queries, std=self.config.initializer_range)


class LlavaCausalLM(LlavaMetaForCausalLM, Stock):
    """Over a stock model with its head: it takes images, skips, and forgets what it skipped.

    A class that uses it sets `config_class` and `decoder_class`.
    """

    decoder_class: type[LlavaDecoder]

    def __init__(self, config: LlavaFields):
        # not the stock model's own __init__, which would make a second decoder
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self._last_roles: Tensor | None = None
        self.last_supervised = 0
        """Positions of the latest batch with labels that carried loss."""
        self.last_sample_lengths: list[list[int]] | None = None
        """Of the latest spliced batch, where its rows are packs: positions of each sample of each row."""
        self.post_init()
        # no plan of the decoder's covers encoder and projector: transformers would list all their weights at each load
        self._tp_plan: Any = None

    @property
    def last_roles(self) -> Tensor | None:
        """Roles [B, T] of the latest training batch as spliced; None where there is nothing to splice."""
        return self._last_roles

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Images = None,
        image_sizes: list[tuple[int, int]] | None = None,
        token_roles: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        packs: list[int] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Loss and logits of prompts with images, or of the decoder alone.

        input_ids, labels [B, T0] with `IMAGE_TOKEN_INDEX` marks and `images`; or inputs_embeds [B, T, C] with
        position_ids and token_roles [B, T]. The loss is the mean over supervised positions, or their sum over
        `num_items_in_batch` where given. Logits [B, T, K] are None while training with labels.
        packs: how many of the samples, one after another, share each row that the decoder reads, without seeing each
        other; logits are those of the rows then.
        """
        written = input_ids if inputs_embeds is None else None
        if written is not None and self._wants_splice(written, past_key_values, images, packs):
            batch = self.prepare_inputs_labels_for_multimodal(
                written, attention_mask, labels, images, image_sizes, packs=packs
            )
            input_ids, inputs_embeds, labels, token_roles = None, batch.inputs_embeds, batch.labels, batch.token_roles
            self.last_sample_lengths = batch.sample_lengths
            use_cache = False if batch.sample_lengths else use_cache  # transformers looks for restarts without one
            kwargs |= self._attended(batch)
            attention_mask, position_ids = kwargs.pop("attention_mask"), kwargs.pop("position_ids")
        if self.training:
            self._last_roles = token_roles
        skipping = token_roles if self.config.skip_vision else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            ffn_rows=None if skipping is None else rows_through_ffn(skipping, self.training),
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        return CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(hidden, labels, num_items_in_batch),
            logits=self._logits(hidden, logits_to_keep) if labels is None or not self.training else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _attended(self, batch: SplicedBatch) -> dict[str, Any]:
        """`attention_mask` and `position_ids` of a spliced batch, and what its backend needs to keep packs apart."""
        if batch.sample_lengths is not None:
            return packed_inputs(batch.position_ids, batch.sample_lengths, str(self.config._attn_implementation))
        if self.training and self.config.tokenizer_padding_side == "right":
            # nothing real attends to padding on its right: without a mask, the plain causal kernels serve
            return {"attention_mask": None, "position_ids": None}
        return {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}

    def _wants_splice(
        self, input_ids: Tensor, past: Cache | None, images: Images, packs: list[int] | None = None
    ) -> bool:
        if past is not None and past.get_seq_length() > 0:
            return False
        if images is not None or packs is not None or (self.training and self.get_vision_tower() is not None):
            return True
        return bool((input_ids == IMAGE_TOKEN_INDEX).any())

    def _logits(self, hidden_BTC: Tensor, to_keep: int | Tensor) -> Tensor:
        """Of the last `to_keep` positions (0: of all), or of those that a tensor lists."""
        if isinstance(to_keep, int):
            return self.lm_head(hidden_BTC[:, slice(-to_keep if to_keep else None, None)])
        return self.lm_head(hidden_BTC[:, to_keep])

    def _loss(self, hidden_BTC: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Cross entropy of the supervised positions only; the head is called once, however few there are."""
        rows, targets = supervised_positions(labels)
        self.last_supervised = targets.numel()
        total = self.lm_head(hidden_BTC.flatten(0, 1).index_select(0, rows), labels=targets)
        if num_items is None:
            return total / max(targets.numel(), 1)
        return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images = None,
        image_sizes: list[tuple[int, int]] | None = None,
        skip_kv: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` on prompts with images; returns the new tokens only, as for `inputs_embeds`.

        inputs: [B, T0] with `IMAGE_TOKEN_INDEX` marks, padded on either side as `attention_mask` says.
        skip_kv: level of the skip KV-cache, a key of `KV_LEVELS`; default: the config's. Sampling, beams, streamers
        and stopping criteria are transformers' own; `max_length` counts the spliced prompt. Raises `UserError` for an
        unknown level, `ValueError` for what cannot be combined with images.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        level = self._kv_level(skip_kv)
        self._check_generate(level, kwargs)
        if inputs is None:
            if images is not None or (skip_kv not in (None, "none") and kwargs.get("token_roles") is None):
                raise ValueError("images go with `inputs`, and skip_kv with `inputs` or with `token_roles`")
            if kwargs.get("token_roles") is not None:
                kwargs |= self._cache_for(kwargs["token_roles"], level, kwargs)
            return super().generate(skip_kv=level, **kwargs)
        check_has_middle(self.config, level)
        inputs = inputs.unsqueeze(0) if inputs.dim() == 1 else inputs
        mask = kwargs.pop("attention_mask", None)
        mask = self._mask_of_padding(inputs, kwargs) if mask is None else mask
        batch = self.prepare_inputs_labels_for_multimodal(
            inputs, mask, images=images, image_sizes=image_sizes, padding_side="left"
        )
        kwargs |= self._cache_for(batch.token_roles, level, kwargs)
        return super().generate(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
            token_roles=batch.token_roles,
            skip_kv=level,
            **kwargs,
        )

    def _check_generate(self, level: str, kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config")
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            raise ValueError("generate starts from an empty cache: pass the whole conversation in `inputs`")
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise ValueError("prefill_chunk_size does not work with images: the prompt is spliced as a whole")
        if level != "none" and kwargs.get("assistant_model") is not None:
            raise ValueError("skip KV-cache does not work with an assistant model; pass skip_kv='none'")

    def _cache_for(self, roles: Tensor, level: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The cache to give to transformers' `generate` where its own could not shrink; see `cache_to_shrink`."""
        settings = kwargs.get("generation_config") or self.generation_config
        uses_cache = kwargs.get("use_cache", settings.use_cache) is not False
        if not uses_cache or kwargs.get("past_key_values") is not None or not drops_any(roles, level):
            return {}
        cache = cache_to_shrink(self.config, roles.shape[1] + self._new_tokens(roles.shape[1], kwargs), level)
        return {} if cache is None else {"past_key_values": cache}

    def _new_tokens(self, prompt: int, kwargs: dict[str, Any]) -> int:
        """The most tokens that transformers' `generate` adds to `prompt` positions, as `_prepare_generated_length` has
        it."""
        configs = [config for config in (kwargs.get("generation_config"), self.generation_config) if config is not None]

        def said(name: str) -> int | None:
            values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        new, longest = said("max_new_tokens"), said("max_length")
        if new is not None:
            return new
        return DEFAULT_NEW_TOKENS if longest is None else max(longest - prompt, 1)

    def _mask_of_padding(self, inputs: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The mask of prompts that come without one, as transformers infers it: a pad token that ends nothing."""
        config = kwargs.get("generation_config") or self.generation_config
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        ends = kwargs.get("eos_token_id", config.eos_token_id)
        if pad is None or pad in (ends if isinstance(ends, (list, tuple)) else [ends]):
            return None
        return inputs != pad

    def _kv_level(self, skip_kv: str | None) -> str:
        default = self.config.skip_vision.skip_kv if self.config.skip_vision else "none"
        level = default if skip_kv is None else skip_kv
        if level not in KV_LEVELS:
            raise UserError(f"skip_kv: unknown level {level!r}; known: {', '.join(KV_LEVELS)}")
        return level

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, called as a checkpoint loads, without the checkpoint's custom_generate/generate.py: with
        `trust_remote_code` that file would run, and stand in for `generate`."""
        given = inspect.signature(super().adjust_generation_fn).bind(*args, **kwargs)
        given.arguments["trust_remote_code"] = False
        super().adjust_generation_fn(*given.args, **given.kwargs)

    # transformers reads this signature to learn what `generate` may be given
    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, skip_kv: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own; `skip_kv` is for `_update_model_kwargs_for_generation`, not for the forward pass."""
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ):
        """After each step; after the first, which is the prefill, skipped tokens leave the cache (equation 7)."""
        roles = model_kwargs.pop("token_roles", None)
        level = model_kwargs.get("skip_kv", "none")
        if roles is not None and drops_any(roles, level) and outputs.past_key_values is not None:
            mask = shrink_cache(outputs.past_key_values, kept_after_prefill(roles, level))
            # transformers leaves the mask out where nothing is masked
            model_kwargs["attention_mask"] = None if bool(mask.all()) else mask.long()
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
