"""transformers' Trainer with LLaVA's needs: parameter groups, sampling by length, marked checkpoints, metrics.

`train.train` builds it; everything else (loop, precision, DeepSpeed, resumption) is the library's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from llava_sv.data.sampler import LengthGroupedSampler
from llava_sv.errors import UserError
from llava_sv.model.checkpoint_io import load_projector
from llava_sv.train import checkpoint
from llava_sv.train.distributed import check_engine
from llava_sv.train.faults import FaultsCallback
from llava_sv.train.metrics import MetricsCallback, Window, window_metrics
from llava_sv.train.nonfinite import Nonfinite
from llava_sv.train.saving import Saving
from llava_sv.train.stopping import spare_workers

OWN_GROUPS = {"params", "model", "optimizer_dict"}
"""Options by which some of the library's optimizers (GaLore, LOMO, ...) bring parameter groups of their own."""


@dataclass
class SampleLengths:
    """What grouping needs: tokens of each sample in the spliced sequence, and whether it has an image."""

    lengths: list[int]
    modalities: list[bool]


class EpochRandomSampler(Sampler[int]):
    """A permutation of `size` indices that depends on the seed and the epoch alone, whatever was drawn before."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class _EpochCallback(TrainerCallback):
    """Tells the sampler which epoch begins; a resumed run has skipped the earlier ones."""

    def __init__(self, trainer: LLaVATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        check_engine(self.trainer.model_wrapped, args)
        self.trainer.start_window(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))


def split_parameters(model: Any, decay: set[str], args: Any) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that train: by part of the model, with weight decay or not; none is empty.

    Each has a `name`. With `--mm_vision_tower_lr_decay` below 1 the vision tower has a group for each depth d up to the
    selected block D, at the tower's rate times decay^(D - d).
    """
    groups: dict[tuple[int, int, bool], dict[str, Any]] = {}
    tower = model.get_vision_tower()
    depths = {} if tower is None else {id(p): depth for p, depth in tower.used_parameters().values()}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        part, place, rate, depth = "language model", 0, None, 0
        if f"{checkpoint.PROJECTOR}." in name:
            part, place, rate = "projector", 1, args.mm_projector_lr
        elif id(value) in depths:
            part, place, rate = "vision tower", 2, args.mm_vision_tower_lr
            if args.mm_vision_tower_lr_decay != 1:
                depth = depths[id(value)]
                part += f", block {depth - 1}" if depth else ", embedding"
                rate = args.learning_rate if rate is None else rate
                rate *= args.mm_vision_tower_lr_decay ** (tower.num_blocks - depth)
        decays = name in decay
        key = (place, depth, not decays)
        if key not in groups:
            label = part if decays else f"{part}, no weight decay"
            groups[key] = {"params": [], "weight_decay": args.weight_decay if decays else 0.0, "name": label}
            groups[key] |= {} if rate is None else {"lr": rate}
        groups[key]["params"].append(value)
    return [groups[key] for key in sorted(groups)]


class LLaVATrainer(Trainer):
    """See the module's head. `projector_only`: checkpoints hold the projector instead of the whole model.

    `settings` are kept with each checkpoint, so that a resumption can tell what has changed.
    """

    model: Any
    args: Any
    train_dataset: Any

    def __init__(
        self,
        *,
        image_processor: Any,
        samples: SampleLengths | None,
        projector_only: bool,
        settings: dict[str, Any],
        **kwargs: Any,
    ):
        self.image_processor = image_processor
        self.settings = settings
        self.samples = samples
        self.projector_only = projector_only
        self.sampler: Any = None
        self.window = Window()
        super().__init__(**kwargs)
        self._steps_logged = 0
        self.metrics_callback = MetricsCallback(self.args.output_dir)
        self.add_callback(self.metrics_callback)
        self.add_callback(_EpochCallback(self))
        self.args.logging_nan_inf_filter = False  # it would log the mean of earlier losses in place of a NaN
        self.nonfinite = Nonfinite(self)
        self.saving = Saving(self)
        self.add_callback(FaultsCallback(self))

    def get_train_dataloader(self) -> Any:
        """The library's; its workers leave signals to their parent."""
        return spare_workers(super().get_train_dataloader())

    # -- order of the data ------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        size = len(train_dataset if train_dataset is not None else self.train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        by_length = self.args.train_sampling_strategy == "group_by_length"
        if self.samples is not None and (by_length or self.args.group_by_modality_length):
            self.sampler = LengthGroupedSampler(
                self.args.train_batch_size,
                self.args.world_size * self.args.gradient_accumulation_steps,
                self.samples.lengths,
                self.samples.modalities if self.args.group_by_modality_length else None,
                seed,
            )
        elif self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        else:
            self.sampler = EpochRandomSampler(size, seed)
        return self.sampler

    # -- optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The library's optimizer over LLaVA's groups, each at its rate; norms and biases without weight decay."""
        model = self.model if model is None else model
        if self.optimizer is None:
            groups = split_parameters(model, set(self.get_decay_parameter_names(model)), self.args)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if OWN_GROUPS & set(options):
                if self.args.own_rates():
                    flag = self.args.own_rates()[0]
                    raise UserError(f"{flag}: --optim {self.args.optim} chooses its own groups; drop one")
                return super().create_optimizer(model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    # -- metrics ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward; what the model spliced is counted."""
        samples = inputs["input_ids"].shape[0]
        self.nonfinite.add(inputs.pop("ids", None))
        loss = super().training_step(model, inputs, *args, **kwargs)
        stats = self.model.last_splice_stats
        if stats is not None:
            self.window.add(stats, samples)
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))  # `log` leaves the step out

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The library's loss; one that is not finite poisons the step, which is then dropped everywhere."""
        loss = super().compute_loss(*args, **kwargs)
        return loss if isinstance(loss, tuple) else self.nonfinite.loss(loss)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.nonfinite.grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.nonfinite.grad_norm

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The library's count of supervised tokens, without those that the cut to `--model_max_length` takes away."""
        counted = [
            {
                "labels": self.model.surviving_labels(
                    batch["input_ids"], batch["labels"], batch["attention_mask"], batch["image_sizes"]
                )
            }
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add rates and shares, summed over all ranks, to a training step's log. Called on every rank."""
        if "loss" in logs:
            step = self.state.global_step
            logs["loss"] = self.nonfinite.honest(logs["loss"], step - self._steps_logged, step)
            logs.update(self._measure(), skipped_steps=len(self.nonfinite.steps))
        elif "train_loss" in logs:
            logs["train_loss"] = self.nonfinite.honest_in_all(logs["train_loss"], self.state.global_step)
        super().log(logs, start_time)

    def start_window(self, step: int) -> None:
        """Measure from here on; `step` is the last one done."""
        self._steps_logged = step
        self.window.reset()

    def _measure(self) -> dict[str, float]:
        seconds = self.window.seconds()
        counts = torch.tensor([float(self.window.counts[name]) for name in Window.NAMES], dtype=torch.float64)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts.to(self.args.device, torch.float32), reduction="sum")
        totals = dict(zip(Window.NAMES, counts.tolist()))
        steps = self.state.global_step - self._steps_logged
        self.start_window(self.state.global_step)
        return window_metrics(totals, seconds, steps)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """The library's checkpoint, then its marker, then the removal of older ones: there is always a complete one."""
        began = time.perf_counter()
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        self.saving = Saving(self)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self.saving.collected(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.saving.agree(folder, folder)
        with self.saving.collected(folder):
            if self.args.should_save:
                checkpoint.mark_complete(folder, self.state.global_step, self.args.world_size, self.settings)
        self.saving.agree(folder, folder)
        if self.args.should_save:
            checkpoint.rotate(folder.parent, limit, keep=folder)
        self.window.exclude(time.perf_counter() - began)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A self-describing folder: weights, config, tokenizer, image and generation settings; or a projector."""
        with self.saving.deferred():
            self._write(output_dir, state_dict)

    def _write(self, output_dir: str | None, state_dict: dict | None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        use_cache, self.model.config.use_cache = self.model.config.use_cache, True
        try:
            if not self.projector_only:
                super()._save(str(folder), state_dict)
                if self.args.should_save:
                    self.image_processor.save_pretrained(folder)
            elif self.args.should_save:
                checkpoint.save_projector(folder, state_dict if state_dict is not None else self.model.state_dict())
                self.model.config.save_pretrained(folder)
        finally:
            self.model.config.use_cache = use_cache

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.projector_only:
            load_projector(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that a checkpoint lacks or has too many are an error here, not a warning; tied ones may be absent."""
        self.model.tie_weights()
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        missing = sorted(set(load_result.missing_keys) - tied)
        unexpected = sorted(load_result.unexpected_keys)
        if missing or unexpected:
            raise UserError(
                f"the checkpoint to resume from is of another model: weights missing: {missing[:5]}; unexpected: "
                f"{unexpected[:5]}; give the flags it was trained with, or choose another --output_dir"
            )
