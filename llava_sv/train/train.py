"""Training's entry: a command line in, OUTPUT out (model, checkpoints, metrics, summary). `train_mem.py` runs it too.

The walk: preflight, flags, model and data, what is printed before the first step, the loop, what is saved.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sv.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from llava_sv.arguments import DataArguments, ModelArguments, TrainingArguments
    from llava_sv.train.llava_trainer import LLaVATrainer, SampleLengths


def main(argv: list[str] | None = None) -> int:
    """`llava-sv train`, and `python llava_sv/train/train.py`. Returns the exit code."""
    return exit_on_user_error(train, argv=sys.argv[1:] if argv is None else argv)


def train(attn_implementation: str | Callable[[], str] | None = None, argv: list[str] | None = None) -> int:
    """Run the training that `argv` asks for; `attn_implementation` (or what it returns) is used where no flag says.

    Raises `UserError` for whatever the user can mend: missing inputs (all at once, before heavy imports), flags, data.
    """
    from llava_sv.train import preflight

    argv = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"} & set(argv):
        _prepare_environment(preflight.read_flags(argv, ("cache_dir", "use_cpu", "no_cuda")))
        problems = preflight.missing_inputs(argv)
        if problems:
            raise UserError(preflight.message(problems))

    from llava_sv.train import find_batch
    from llava_sv.train.flags import parse

    argv = find_batch.settle(argv)
    model_args, data_args, args = parse(argv)
    fallback = attn_implementation() if callable(attn_implementation) else attn_implementation
    args.attn_implementation = args.attn_implementation or fallback
    return run(model_args, data_args, args)


def _prepare_environment(flags: dict[str, str]) -> None:
    """What libraries read from the environment as they are imported."""
    if flags.get("cache_dir"):
        os.environ["HF_HUB_CACHE"] = flags["cache_dir"]
    if "true" in (flags.get("use_cpu", "").lower(), flags.get("no_cuda", "").lower()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # it lists the layers that are not split between devices, where nothing is
    logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)


def run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> int:
    """Train as the arguments say. Every rank runs this."""
    from llava_sv.data.collator import DataCollatorForSupervisedDataset
    from llava_sv.train import build, find_batch, resume
    from llava_sv.train.distributed import check_world, leave_together

    check_world(args)
    build.check_names(model_args, args)
    asked = resume.settings_of(model_args, data_args, args)
    plan = resume.plan(args, asked)
    resume.check_agreement(plan, args)
    if plan.finished:
        say(plan.note)
        leave_together()
        return 0
    _prepare_reporting(args)
    from transformers import set_seed

    set_seed(args.seed)
    tokenizer, model, image_processor = build.build(model_args, data_args, args)
    build.choose_trainable(model, model_args)
    dataset = build.build_dataset(tokenizer, image_processor, data_args, str(model_args.version), model.config)
    build.check_room(model.config, dataset, args)
    if args.probe_batch:
        find_batch.probe(model, dataset, DataCollatorForSupervisedDataset(tokenizer), args)
    parts = {"processing_class": tokenizer, "model": model, "image_processor": image_processor}
    trainer = make_trainer(args, parts, dataset, model_args.tune_mm_mlp_adapter, asked)
    _introduce(trainer, dataset, tokenizer, plan.note)
    output = trainer.train(resume_from_checkpoint=str(plan.checkpoint) if plan.checkpoint else None)
    finish(trainer, output.training_loss, asked)
    leave_together()
    return 0


def say(text: str) -> None:
    """Print once a node."""
    if text and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(text, flush=True)


def _prepare_reporting(args: TrainingArguments) -> None:
    """Weights & Biases without a key writes to disk instead of asking."""
    if "wandb" in (args.report_to or ()) and not os.environ.get("WANDB_API_KEY") and "WANDB_MODE" not in os.environ:
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        if not (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")):
            os.environ["WANDB_MODE"] = "offline"
            say("note: no WANDB_API_KEY: wandb writes to ./wandb, to be sent later by `wandb sync`")


def sample_lengths(dataset: Any, config: Any) -> SampleLengths:
    """Length of each sample in the spliced sequence, counting visual tokens after skipping."""
    from llava_sv.train.llava_trainer import SampleLengths

    return SampleLengths(dataset.lengths(config.visual_tokens_per_image), dataset.modalities())


def make_trainer(
    args: TrainingArguments, parts: dict[str, Any], dataset: Any, projector_only: bool, settings: dict[str, Any]
) -> LLaVATrainer:
    """The Trainer of this run. parts: `model`, `processing_class` (the tokenizer) and `image_processor`."""
    from llava_sv.data.collator import DataCollatorForSupervisedDataset
    from llava_sv.train.llava_trainer import LLaVATrainer

    grouped = args.group_by_modality_length or args.train_sampling_strategy == "group_by_length"
    return LLaVATrainer(
        **parts,
        args=args,
        train_dataset=dataset,
        data_collator=DataCollatorForSupervisedDataset(parts["processing_class"]),
        samples=sample_lengths(dataset, parts["model"].config) if grouped else None,
        projector_only=projector_only,
        settings=settings,
    )


def _introduce(trainer: LLaVATrainer, dataset: Any, tokenizer: Any, note: str) -> None:
    """What a user wants to see before the first step. Raises `UserError` when nothing would be supervised."""
    from llava_sv.data.dataset import describe_first_supervised

    shown = describe_first_supervised(dataset, tokenizer)
    if trainer.is_world_process_zero():
        print("\n".join(["", "first sample", shown, "", *summary_lines(trainer, len(dataset)), note, ""]), flush=True)


def summary_lines(trainer: LLaVATrainer, samples: int) -> list[str]:
    """Family, parameters by part, tokens an image before and after, batch and steps."""
    from llava_sv.train.build import count_parameters

    args, config = trainer.args, trainer.model.config
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    lines = ["this run", f"  family            {config.mm_family}, template {config.conv_template}"]
    for part, (total, trained) in count_parameters(trainer.model).items():
        lines.append(
            f"  {part:<17} {total:>14,} parameters, {'all train' if trained == total else f'{trained:,} train'}"
        )
    how = "dense" if config.skip_vision is None else "Skip-Vision"
    most = "up to " if config.mm_family == "llava_hd" else ""
    before, after = config.dense_tokens_per_image(), config.visual_tokens_per_image()
    lines.append(f"  tokens an image   {most}{before} dense -> {after} in the sequence ({how})")
    lines.append(
        f"  batch             {batch} = {args.per_device_train_batch_size} a device x {args.world_size} processes "
        f"x {args.gradient_accumulation_steps} accumulated"
    )
    lines.append(f"  steps             {total_steps(args, samples):,} over {samples:,} samples")
    return lines


def total_steps(args: Any, samples: int) -> int:
    """Optimizer steps of the whole run, as Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(samples / (args.per_device_train_batch_size * args.world_size))
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * per_epoch)


def finish(trainer: LLaVATrainer, loss: float, asked: dict[str, Any]) -> None:
    """Save the final model, and last of all the summary, whose presence says that the run is finished."""
    from llava_sv.files import write_json
    from llava_sv.train.checkpoint import SUMMARY

    args = trainer.args
    trainer.save_model(args.output_dir)
    trainer.accelerator.wait_for_everyone()
    problems = image_problems(trainer)
    if not trainer.is_world_process_zero():
        return
    steps = trainer.state.global_step
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    whole = int(args.num_train_epochs * len(trainer.train_dataset))
    summary = {
        "steps": steps,
        "samples": steps * batch if args.max_steps > 0 else min(steps * batch, whole),
        "train_seconds": round(trainer.metrics_callback.seconds(), 3),
        "train_loss": loss,
        "world_size": args.world_size,
        "image_problems": problems,
        "settings": asked,
    }
    write_json(Path(args.output_dir) / SUMMARY, summary)
    if any(problems.values()):
        said = ", ".join(f"{count:,} {kind}" for kind, count in problems.items())
        print(
            f"images that could not be read: {said} (--missing_images {trainer.train_dataset.data_args.missing_images})"
        )
    what = "projector" if trainer.projector_only else "model"
    print(f"done: {steps:,} steps; the {what} is in {args.output_dir}", flush=True)


def image_problems(trainer: LLaVATrainer) -> dict[str, int]:
    """Images that were missing or corrupt, over all ranks."""
    import torch

    counts = trainer.train_dataset.image_problems()
    if trainer.args.world_size > 1:
        every = torch.tensor(list(counts.values()), device=trainer.args.device)
        counts = dict(zip(counts, trainer.accelerator.reduce(every, reduction="sum").tolist()))
    return counts


if __name__ == "__main__":
    sys.exit(main())
