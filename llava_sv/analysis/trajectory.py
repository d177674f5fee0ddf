"""The decoder taken apart, for the theory of section 5: one spliced sequence in, each layer's two halves as functions.

`error_bound` and `layer_plan` walk a sequence through them twice, with the whole FFN and without it for skipped tokens.
B is 1 throughout. T sequence length, C width, L layers, K vocabulary.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava_sv.analysis.common import Job, Sample, open_job
from llava_sv.errors import UserError
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.loading import check_config
from llava_sv.model.retained_budget import over
from llava_sv.model.token_counts import with_family_budget
from llava_sv.model.token_groups import TokenRole, passes_ffn

LAYER_INPUTS = ("attention_mask", "position_ids", "position_embeddings")
"""What the model hands each layer, and a layer its attention."""


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which tokens skip, where it is not the checkpoint that says so."""
    parser.set_defaults(dtype="float32")
    for action in parser._actions:
        if action.dest == "dtype":
            action.help = "precision of the computation (default: float32, whatever the checkpoint's)"
    parser.add_argument("--num-retained", type=int, help="Nr (default: the checkpoint's; dense: its family's)")
    parser.add_argument("--num-skipped", type=int, help="Ns after merging (default: the checkpoint's, or its family's)")


def open_skipping(args: argparse.Namespace) -> Job:
    """`open_job`, and the tokens that skip: by `--num-retained` and `--num-skipped`, or else the checkpoint's own, or
    for a dense one its family's, without summaries, whose weights it lacks. Weights no longer take gradients.

    Raises `UserError` for budgets that the family cannot give.
    """
    job = open_job(args)
    config, projector = job.model.config, job.model.get_model().mm_projector
    given = {name: getattr(args, name) for name in ("num_retained", "num_skipped")}
    given = {name: count for name, count in given.items() if count is not None}
    if config.skip_vision is None:
        block = with_family_budget(config, {"former_summary": False, "latter_summary": False, **given})
    else:
        block = over(config.skip_vision.to_dict(), given)
        if args.num_skipped is not None and not config.skip_vision.merge:
            raise UserError(f"--num-skipped {args.num_skipped}: {args.model_path} skips without merging")
    if given or config.skip_vision is None:
        try:
            config.skip_vision = projector.skip = SkipVisionConfig.from_dict(block)
            check_config(config, config.vision_config)
        except UserError as error:
            raise UserError(f"--model-path {args.model_path}: {error} (--num-retained, --num-skipped)") from error
    job.model.requires_grad_(False)
    job.model.set_attn_implementation("sdpa")
    return job


def parse_layers(flag: str, text: str, num_layers: int) -> list[int]:
    """`all`, `8-31` or `0,4,8-15` as indices; `UserError` names `flag`."""
    try:
        return SkipVisionConfig(skip_layers=text).layers_that_skip(num_layers)
    except UserError as error:
        raise UserError(f"{flag} {text}: {str(error).removeprefix('skip_vision.skip_layers: ')}") from error


@dataclass
class Walk:
    """One sequence and the decoder that reads it. embeds [T, C]; roles [T]; inputs: `LAYER_INPUTS` of each layer."""

    model: Any
    embeds: Tensor
    roles: Tensor
    inputs: list[dict[str, Any]]

    @property
    def layers(self) -> Any:
        """The decoder's layers, L of them."""
        return self.model.get_model().layers

    @property
    def passes(self) -> Tensor:
        """bool [T]: rows whose FFN runs in a layer that skips."""
        return passes_ffn(self.roles)

    @property
    def skipped(self) -> Tensor:
        """bool [T]."""
        return self.roles == TokenRole.SKIPPED

    def attend(self, index: int, hidden: Tensor) -> Tensor:
        """[T, C] -> [T, C]: the first half of a layer, residual included."""
        layer = self.layers[index]
        attended, *_ = layer.self_attn(layer.input_layernorm(hidden.unsqueeze(0)), **self.inputs[index])
        return hidden + attended.squeeze(0)

    def ffn(self, index: int, attended: Tensor) -> Tensor:
        """[R, C] -> [R, C]: the second half without its residual: what a skipped token misses."""
        layer = self.layers[index]
        return layer.mlp(layer.post_attention_layernorm(attended.unsqueeze(0))).squeeze(0)

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """[T, C] -> [T, C]: the whole layer, every row through the FFN."""
        attended = self.attend(index, hidden)
        return attended + self.ffn(index, attended)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] after the last layer -> [..., K]."""
        return self.model.lm_head(self.model.get_model().norm(hidden))


@torch.no_grad()
def walk_of(job: Job, sample: Sample) -> Walk:
    """The sample's sequence, with what each layer is given along with it: read off the model's own forward, so that
    masks (sliding windows too) and positions are the model's."""
    spliced = job.splice(sample)
    inputs: list[dict[str, Any]] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs.append({name: kwargs[name] for name in LAYER_INPUTS if name in kwargs})

    decoder = job.model.get_model()
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder.layers]
    try:
        decoder(inputs_embeds=spliced.inputs_embeds, position_ids=spliced.position_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Walk(job.model, spliced.inputs_embeds[0], spliced.token_roles[0], inputs)


def differentiable_attention() -> Any:
    """A context in which attention has derivatives of every kind: fused kernels lack forward ones."""
    return sdpa_kernel(SDPBackend.MATH)


def length_of(error: Tensor) -> float:
    """The Euclidean norm over all entries, summed in float64."""
    return float(error.double().norm())
