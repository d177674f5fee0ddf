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

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from llava_sv.data.sampler import LengthGroupedSampler, in_pieces
from llava_sv.data.streaming import ShardSampler, shard_starts
from llava_sv.errors import UserError
from llava_sv.model.checkpoint_io import load_projector
from llava_sv.train import checkpoint
from llava_sv.train.best import Patience, best_checkpoint, owed
from llava_sv.train.distributed import check_engine
from llava_sv.train.evaluation import Evaluator
from llava_sv.train.faults import FaultsCallback
from llava_sv.train.metrics import MetricsCallback, Window, window_metrics
from llava_sv.train.nonfinite import Nonfinite
from llava_sv.train.saving import Saving
from llava_sv.train.step_flops import Counter
from llava_sv.train.stopping import spare_workers
from llava_sv.train.throughput import flop_rates, peak_of, timed, wait_rates

OWN_GROUPS = {"params", "model", "optimizer_dict"}
"""Options by which some of the library's optimizers (GaLore, LOMO, ...) bring parameter groups of their own."""


@dataclass
class SampleLengths:
    """What grouping needs: tokens of each sample in the spliced sequence, and whether it has an image."""

    lengths: np.ndarray
    modalities: np.ndarray


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
        return in_pieces([torch.randperm(self.size, generator=generator).numpy()])


class _EpochCallback(TrainerCallback):
    """Tells the sampler which epoch begins; a resumed run has skipped the earlier ones."""

    def __init__(self, trainer: LLaVATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        check_engine(self.trainer.model_wrapped, args)
        self.trainer.start_window(state.global_step)
        if owed(args, state):
            found = self.trainer.evaluate()
            self.trainer._determine_best_metric(metrics=found, trial=None)

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

    saves = "model"
    """In words, what OUTPUT holds."""
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
        evaluator: Evaluator | None = None,
        **kwargs: Any,
    ):
        self.evaluator = evaluator
        # transformers wants a data set where it is to evaluate; what is evaluated is the evaluator's affair
        kwargs |= {} if evaluator is None else {"eval_dataset": evaluator.dataset or ()}
        self.image_processor = image_processor
        self.settings = settings
        self.samples = samples
        self.projector_only = projector_only
        self.sampler: Any = None
        self.window = Window()
        super().__init__(**kwargs)
        self._steps_logged = 0
        self.counter = Counter(self.model, recompute=self.args.gradient_checkpointing)
        self.peak = peak_of(self.args.peak_tflops, self.args.device, torch.bfloat16)
        self.metrics_callback = MetricsCallback(self.args.output_dir)
        self.add_callback(self.metrics_callback)
        self.add_callback(_EpochCallback(self))
        if self.args.early_stopping_patience is not None:
            metric, greater = str(self.args.metric_for_best_model), bool(self.args.greater_is_better)
            self.add_callback(Patience(self.args.early_stopping_patience, metric, greater))
        self.args.logging_nan_inf_filter = False  # it would log the mean of earlier losses in place of a NaN
        self.nonfinite = Nonfinite(self)
        self.saving = Saving(self)
        self.faults = FaultsCallback(self)
        self.add_callback(self.faults)

    # -- order of the data ------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        size = len(train_dataset if train_dataset is not None else self.train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        by_length = self.args.train_sampling_strategy == "group_by_length"
        if getattr(self.train_dataset.data_args, "streaming", False):
            window = self.train_dataset.data_args.streaming_window
            self.sampler = ShardSampler(shard_starts(self.train_dataset.records), window, seed)
        elif self.samples is not None and (by_length or self.args.group_by_modality_length):
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
        self.nonfinite.add(inputs.pop("ids", None))
        loss = super().training_step(model, inputs, *args, **kwargs)
        seen = self.model
        self.window.add(*self.counter.of(inputs, seen.last_roles, seen.last_supervised, seen.last_sample_lengths))
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))  # `log` leaves the step out

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The library's loss; one that is not finite poisons the step, which is then dropped everywhere."""
        loss = super().compute_loss(*args, **kwargs)
        return loss if isinstance(loss, tuple) else self.nonfinite.loss(loss)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.nonfinite.grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.nonfinite.grad_norm

    def get_train_dataloader(self) -> Any:
        """The library's, whose workers leave signals to their parent. Batches stay on the host until their own step:
        those of an accumulated step do not take the device's memory all at once, what is counted of them costs no wait
        for the device, and no copy is mistaken for waiting for data."""
        loader = spare_workers(super().get_train_dataloader())
        loader.device = None
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> Any:
        """The library's window of batches; the time that they are waited for is kept."""
        return super().get_batch_samples(timed(epoch_iterator, self.window.wait), *args, **kwargs)

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
        seconds, totals = self.window.seconds(), self.window.totals()
        mine = torch.tensor([*(totals[name] for name in Window.NAMES), self.window.waited], dtype=torch.float64)
        every = mine.unsqueeze(0)
        if self.args.world_size > 1:
            every = self.accelerator.gather(every.to(self.args.device)).cpu()
        totals = dict(zip(Window.NAMES, every[:, :-1].sum(dim=0).tolist()))
        steps = self.state.global_step - self._steps_logged
        self.start_window(self.state.global_step)
        return (
            window_metrics(totals, seconds, steps)
            | wait_rates(every[:, -1].tolist(), seconds, steps)
            | flop_rates(self.counter.flops(totals), seconds, self.peak, self.args.world_size)
        )

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """What the evaluator finds of the model as it is; logged, and shown to the callbacks, as the library does."""
        assert self.evaluator is not None
        began = time.perf_counter()
        found = self.evaluator.run(self, metric_key_prefix)
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        self.window.exclude(time.perf_counter() - began)
        return found

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """The library's; a run that was asked to stop saves under `--save_strategy best` too, better or not."""
        better = super()._determine_best_metric(*args, **kwargs)
        return better or bool(self.faults.stopper.reason)

    def _load_best_model(self) -> None:
        """The library's, and a projector's own checkpoint, which it does not know."""
        best = str(self.state.best_model_checkpoint)
        if self.projector_only and not self.is_deepspeed_enabled:
            load_projector(self.model, best)
        else:
            super()._load_best_model()

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
            best = best_checkpoint(folder.parent, self.args, self.state.log_history)
            checkpoint.rotate(folder.parent, limit, keep=folder, best=best)
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
