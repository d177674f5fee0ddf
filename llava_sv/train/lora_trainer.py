"""The Trainer of a LoRA run: OUTPUT and checkpoints hold adapters and what trained beside them, never the base.

`train.make_trainer` chooses it where the model has adapters.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llava_sv.model import adapters
from llava_sv.train.llava_trainer import LLaVATrainer


class LoraTrainer(LLaVATrainer):
    """`LLaVATrainer` whose model has adapters in place."""

    saves = "adapter"

    @property
    def model_wrapped(self) -> Any:
        """What the Trainer trains: the model, or DeepSpeed's engine or DDP around it."""
        return self._model_wrapped

    @model_wrapped.setter
    def model_wrapped(self, wrapped: Any) -> None:
        self._model_wrapped = keep_frozen_out(wrapped)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter folder. Every rank calls it: under ZeRO-3 what trained is gathered, and nothing else."""
        folder = output_dir or self.args.output_dir
        state = adapters.trained_state(self.model, keep=self.args.should_save)
        if self.args.should_save:
            self._save(folder, state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write(self, output_dir: str | None, state_dict: dict[str, Tensor] | None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        use_cache, self.model.config.use_cache = self.model.config.use_cache, True
        try:
            self.model.config.save_pretrained(folder)
        finally:
            self.model.config.use_cache = use_cache
        self.model.generation_config.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
        self.image_processor.save_pretrained(folder)
        adapters.save(folder, self.model, state_dict or {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapters.load_state(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """The library looks for a whole model there, or for a model in peft's wrapper; DeepSpeed reads its own."""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            adapters.load_state(self.model, str(self.state.best_model_checkpoint))


def keep_frozen_out(wrapped: Any) -> Any:
    """DeepSpeed's engine, told to leave frozen weights out of its checkpoints; anything else as it is."""
    if not hasattr(wrapped, "save_checkpoint") or hasattr(wrapped, "_frozen_are_left_out"):
        return wrapped
    wrapped._frozen_are_left_out = True
    wrapped.save_checkpoint = functools.partial(wrapped.save_checkpoint, exclude_frozen_parameters=True)
    load = wrapped.load_checkpoint

    def load_what_is_there(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "load_module_strict": False})

    wrapped.load_checkpoint = load_what_is_there
    return wrapped
