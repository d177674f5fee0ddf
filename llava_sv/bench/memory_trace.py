"""What one training step allocates, moment by moment: a model's config in, a `Trace` out. Nothing is computed.

The model is built and run on shapes (`ghost`), with torch's own autograd: what each module keeps for the backward pass,
checkpointing, gathered FFN rows and the chunked loss are those of the real run. `memory_states` adds optimizer and
ZeRO. Called by the plan (`train.memory_plan`), by `bench memory`, and by the search for a batch.
B batch, T0 prompt length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from llava_sv.bench.checkpoint import views_of
from llava_sv.bench.ghost import Ghost
from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.model.language_model.decoders import model_class
from llava_sv.model.token_counts import FAMILIES, count_tokens

Prepare = Callable[[Any], Any]
"""Says which parameters of a model train (and may wrap it, as LoRA does); returns what runs."""

PARTS = {
    "inputs": "images, ids and labels",
    "encoder": "vision encoder",
    "projector": "projector, selection, merging and summaries",
    "language model": "decoder's activations",
    "loss": "output layer and loss",
    "backward": "gradients of activations, and layers computed again",
}
"""Labels of what is neither weights nor their gradients, and what they hold."""


@dataclass(frozen=True)
class Work:
    """What runs in one forward and backward pass.

    text_tokens: of each of `batch` samples, all supervised, beside one image. weights: precision of the parameters;
    autocast: precision of the computation where it is another. accumulating: gradients of an earlier micro-batch are
    there already.
    """

    batch: int
    text_tokens: int
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    accumulating: bool = False
    image: bool = True


@dataclass(frozen=True)
class Moment:
    """One point of the step at which no other takes more of both. Bytes.

    gradients: of parameters. activations: all else but parameters; by_part: the same by label.
    """

    gradients: int
    activations: int
    by_part: dict[str, int]


@dataclass
class Trace:
    """One step. parameters: part -> (parameters, those that train). Sizes are in elements; `moments` in bytes."""

    parameters: dict[str, tuple[int, int]]
    weight_bytes: int
    gradient_bytes: int
    tensors: list[tuple[int, bool]]
    """(elements, whether it trains) of each parameter, in order."""
    sequence: int
    """T, tokens of the longest sample as the decoder sees it."""
    moments: list[Moment] = field(default_factory=list)
    buffer_bytes: int = 0
    run_once: int = 0
    """Parameters of a frozen encoder: the backward pass does not read them."""

    @property
    def total(self) -> int:
        """Parameters."""
        return sum(total for total, _ in self.parameters.values())

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return sum(trained for _, trained in self.parameters.values())

    def worst(self, kept: Callable[[int], int] = lambda gradients: gradients) -> Moment:
        """The moment of most memory. kept: bytes of gradients made so far -> those that this process then holds, never
        fewer where more were made."""
        return max(self.moments, key=lambda moment: moment.activations + kept(moment.gradients))


class _Watch:
    """Keeps the moments that no other exceeds in both gradients and activations."""

    def __init__(self, ghost: Ghost) -> None:
        self.ghost, self.moments = ghost, list[Moment]()

    def __call__(self) -> None:
        live = self.ghost.live
        gradients = live["gradients"]
        activations = sum(live[label] for label in PARTS) + live["other"]
        for index in range(len(self.moments) - 1, -1, -1):
            one = self.moments[index]
            if one.gradients >= gradients and one.activations >= activations:
                return
            if one.gradients <= gradients and one.activations <= activations:
                del self.moments[index]
        parts = {label: live[label] for label in (*PARTS, "other") if live[label]}
        self.moments.append(Moment(gradients, activations, parts))


def largest_image(config: Any) -> tuple[int, int] | None:
    """(width, height) of an image that takes most tokens; None where size does not matter."""
    sizes = FAMILIES[config.mm_family].sizes(config)
    return max(sizes, key=lambda size: (count_tokens(config, size).total, views_of(config, size)))


def image_tokens(config: Any) -> int:
    """Tokens of that image in the sequence."""
    return count_tokens(config, largest_image(config)).total


def make_inputs(config: Any, work: Work) -> dict[str, Any]:
    """A batch as the collator makes it, of whole numbers and blank images: each sample has one, of most tokens."""
    ids = torch.ones(work.batch, work.text_tokens, dtype=torch.long)
    labels = ids.clone()
    images: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    if work.image:
        mark = torch.full((work.batch, 1), IMAGE_TOKEN_INDEX)
        ids = torch.cat([mark, ids], dim=1)
        labels = torch.cat([torch.full_like(mark, -100), labels], dim=1)
        side, size = config.vision_config["image_size"], largest_image(config)
        views = views_of(config, size)
        shape = (3, side, side) if views == 1 and config.mm_family != "llava_hd" else (views, 3, side, side)
        images = [torch.zeros(shape) for _ in range(work.batch)]
        sizes = [size or (side, side)] * work.batch
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "images": images,
        "image_sizes": sizes,
    }


def forward(model: Any, inputs: dict[str, Any], work: Work) -> Tensor:
    """The loss, under the precision that training would use."""
    device = inputs["input_ids"].device.type
    narrow = contextlib.nullcontext() if work.autocast is None else torch.autocast(device, dtype=work.autocast)
    with narrow:
        return model(**inputs, num_items_in_batch=work.batch * work.text_tokens, use_cache=False).loss


def enable_checkpointing(model: Any) -> None:
    """Activation checkpointing as training turns it on."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def trace(config: Any, work: Work, prepare: Prepare, part_of: Callable[[str], str]) -> Trace:
    """Follow one step of the model that `config` describes, its encoder included.

    part_of: name of a parameter -> the part of the model it is counted under.
    """
    with Ghost() as ghost, _quiet():
        model = build(config, work.weights, ghost, prepare)
        model.train()
        if work.checkpointing:
            enable_checkpointing(model)
        found = _describe(model, part_of)
        found.buffer_bytes = sum(ghost.bytes_of(buffer) for buffer in model.buffers())
        found.sequence = work.text_tokens + (image_tokens(config) if work.image else 0)
        tower = model.get_vision_tower()
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            found.run_once = sum(parameter.numel() for parameter in tower.parameters())
        watch = _Watch(ghost)
        ghost.on_change = watch
        _label_gradients(model, ghost, work.accumulating)
        _label_parts(model, ghost)
        ghost.label = "inputs"
        inputs = make_inputs(config, work)
        ghost.label = "language model"
        loss = forward(model, inputs, work)
        ghost.label = "backward"
        loss.backward()
        found.moments = watch.moments
    return found


def build(config: Any, dtype: torch.dtype, ghost: Ghost, prepare: Prepare) -> Any:
    """The model that `config` describes, without numbers, inside `ghost`; its bytes are labelled `parameters`."""
    config.tokenizer_model_max_length = None
    if config.skip_vision is not None and config.skip_vision.adaptive:  # the worst: images that retain the most
        config.skip_vision = config.skip_vision.at(config.skip_vision.retained_max)
    with ghost.labelled("parameters"), _moved_by_hand():
        return prepare(model_class(config)._from_config(config, dtype=dtype))


def _describe(model: nn.Module, part_of: Callable[[str], str]) -> Trace:
    parts: dict[str, tuple[int, int]] = {}
    tensors = []
    weights = gradients = 0
    for name, value in model.named_parameters():
        total, trained = parts.get(part_of(name), (0, 0))
        parts[part_of(name)] = (total + value.numel(), trained + value.numel() * value.requires_grad)
        tensors.append((value.numel(), value.requires_grad))
        weights += value.numel() * value.element_size()
        gradients += value.numel() * value.element_size() * value.requires_grad
    return Trace(parts, weights, gradients, tensors, 0)


def _label_gradients(model: nn.Module, ghost: Ghost, accumulating: bool) -> None:
    def settle(parameter: Tensor) -> None:
        if parameter.grad is not None:
            ghost.relabel(parameter.grad, "gradients")

    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if accumulating:
            with ghost.labelled("gradients"):
                parameter.grad = torch.empty_like(parameter)
        parameter.register_post_accumulate_grad_hook(settle)


def _label_parts(model: Any, ghost: Ghost) -> None:
    """Allocations of encoder, projector and output layer on the way forward under their names."""
    decoder = model.get_model()
    for label, module in (
        ("encoder", decoder.vision_tower),
        ("projector", decoder.mm_projector),
        ("loss", model.lm_head),
    ):
        _label_module(module, ghost, label)


def _label_module(module: nn.Module, ghost: Ghost, label: str) -> None:
    before: list[str] = []

    def enter(*_: Any) -> None:
        before.append(ghost.label)
        ghost.label = label

    def leave(*_: Any) -> None:
        ghost.label = before.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


@contextlib.contextmanager
def _moved_by_hand() -> Iterator[None]:
    """`module.to(...)` changes precision only: torch's own swaps tensors, which those without numbers do not allow."""
    own = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        for child in module.modules():
            for name, value in list(child.named_parameters(recurse=False)):
                if dtype is not None and value.dtype != dtype:
                    setattr(child, name, nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad))
        return module

    nn.Module.to = to  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.to = own  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on a model that nobody will use."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
