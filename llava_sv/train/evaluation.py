"""Evaluation while training: the loss on held-out records, and a benchmark's questions asked of the model as it is.

`prepare` is called by `train.run` and takes the held-out records away from the training data; the trainer calls
`Evaluator.run` where transformers would evaluate. Nothing of a run changes by it: random states, modes and the order
of the data are as before. `best` says which checkpoint is kept.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_sv.constants import IGNORE_INDEX
from llava_sv.conversation import get_template
from llava_sv.data.collator import DataCollatorForSupervisedDataset
from llava_sv.data.split import hold_out
from llava_sv.errors import UserError
from llava_sv.eval.answer_loop import AnswerSettings, answer_batch
from llava_sv.eval.tasks import TASKS, get_task
from llava_sv.eval.tasks.base import Question, Task
from llava_sv.generation import Assistant, check_image_paths
from llava_sv.mm_utils import load_image
from llava_sv.train.checkpoint import read_marker


@dataclass
class Benchmark:
    """A benchmark to ask while training."""

    name: str
    task: Task
    questions: list[Question]


@dataclass
class Evaluator:
    """What is evaluated. dataset: held-out records; benchmark: questions; either may be None. note: a line to print."""

    dataset: Any = None
    benchmark: Benchmark | None = None
    note: str = ""

    def run(self, trainer: Any, prefix: str = "eval") -> dict[str, float]:
        """`eval_loss`, `eval_tokens`, `eval_accuracy`, ... of the model as it is; the same on every rank."""
        began = time.perf_counter()
        found: dict[str, float] = {}
        with undisturbed(trainer.model, trainer.optimizer):
            if self.dataset is not None:
                found |= mean_loss(trainer, self.dataset)
            if self.benchmark is not None:
                found |= ask(trainer, self.benchmark)
        found["seconds"] = round(time.perf_counter() - began, 3)
        return {f"{prefix}_{name}": value for name, value in found.items()}


# -- what is evaluated ----------------------------------------------------------------------------------------------


def check(args: Any) -> None:
    """Before anything is loaded: the benchmark can be read, the parallelism can generate. Raises `UserError`."""
    if not args.eval_benchmark:
        return
    if args.fsdp:
        raise UserError(
            "--eval_benchmark does not work with --fsdp, which cannot generate; use DeepSpeed or DDP, or drop it "
            "(--eval_data_path works)"
        )
    open_benchmark(args.eval_benchmark, args.eval_benchmark_limit)


def check_resumption(checkpoint: Path | None, asked: dict[str, Any]) -> None:
    """`UserError` where a resumed run would validate on records that it has trained on: another split than before.

    asked: `resume.settings_of` of this run.
    """
    if checkpoint is None:
        return
    was = read_marker(checkpoint).get("settings", {})
    if not asked["validation_split"] or not was:
        return
    content = was.get("data_content"), asked.get("data_content")
    if None not in content and content[0] != content[1]:
        raise UserError(
            f"--data_path {asked['data_path']}: {checkpoint} was trained on other data there ({content[0]}, now "
            f"{content[1]}), and other records would be held out than were; set it as it was, or start over with "
            "--overwrite_output_dir True"
        )
    names = ("validation_split", "data_path", "seed" if asked["data_seed"] is None else "data_seed")
    for name in names:
        before = was.get(name, 0.0 if name == "validation_split" else None)
        if before != asked[name]:
            raise UserError(
                f"--{name} {asked[name]}: {checkpoint} was trained with {before}, and other records would be held out "
                "than were; set it as it was, or start over with --overwrite_output_dir True"
            )


def prepare(dataset: Any, data_args: Any, args: Any) -> Evaluator | None:
    """The evaluator of this run, or None where nothing is evaluated. `dataset` (training's) loses what is held out.

    Raises `UserError` for data and benchmarks that cannot be read, images included.
    """
    if not args.evaluates():
        return None
    held, said = None, []
    if args.validation_split:
        seed = args.seed if args.data_seed is None else args.data_seed
        total = len(dataset.records)
        dataset.records, records = hold_out(dataset.records, args.validation_split, seed)
        held = _same_way(dataset, records, data_args)
        said.append(f"{len(records):,} of {total:,} records, held out by seed {seed} and never trained on")
    elif args.eval_data_path:
        from llava_sv.data.index import open_records

        held = _same_way(dataset, open_records(args.eval_data_path), data_args)
        said.append(f"{len(held):,} records of {args.eval_data_path}")
    if held is not None:
        _check_readable(held)
    benchmark = open_benchmark(args.eval_benchmark, args.eval_benchmark_limit) if args.eval_benchmark else None
    if benchmark is not None:
        said.append(f"{len(benchmark.questions):,} questions of {benchmark.name}")
    when = f"every {args.eval_steps:g} steps" if args.eval_strategy == "steps" else "after every epoch"
    return Evaluator(held, benchmark, f"evaluation {when}: {'; '.join(said)}; the best is by {args.best_by()}")


def _same_way(dataset: Any, records: Any, data_args: Any) -> Any:
    """`records` prepared as those of `dataset` are; pictures are looked for in the same folder."""
    from llava_sv.data.dataset import LazySupervisedDataset

    return LazySupervisedDataset(
        records, dataset.tokenizer, dataset.image_processor, data_args, dataset.template, dataset.image_config
    )


def _check_readable(held: Any) -> None:
    """The first record with a picture can be made into a sample: a wrong folder is said before training starts."""
    with_image = np.flatnonzero(held.records.num_images)
    if len(with_image) and held.reader.policy == "error":
        try:
            held[int(with_image[0])]
        except UserError as error:
            raise UserError(f"evaluation: {error}") from error


def open_benchmark(where: str, limit: int | None = None) -> Benchmark:
    """The benchmark named `where`: a task's name, `NAME=FOLDER`, or a folder or file in the toy benchmark's format.

    Raises `UserError` where it is none of these, cannot be read, or lacks images.
    """
    name, equals, folder = where.partition("=")
    if where in TASKS:
        name, folder = where, TASKS[where].default_data_path
    elif not equals:
        name, folder = "toy", where
        if not Path(where).exists():
            raise UserError(
                f"--eval_benchmark {where}: neither a benchmark ({', '.join(TASKS)}) nor a folder or file that is there"
            )
    task = get_task(name)
    questions = task.load(Path(folder))[:limit]
    check_image_paths(sorted({str(path) for question in questions for path in question.images}))
    return Benchmark(f"{name} ({folder})", task, questions)


# -- leaving no trace -----------------------------------------------------------------------------------------------


@contextmanager
def undisturbed(model: Any, optimizer: Any = None) -> Iterator[None]:
    """Random states of this process and modes of all modules are afterwards what they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    modes = {module: module.training for module in model.modules()}
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()  # a schedule-free optimizer evaluates other weights than it trains
    try:
        yield
    finally:
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        for module, mode in modes.items():
            module.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def spliced_as_in_training(model: Any) -> Iterator[None]:
    """`model` in evaluation, but for the splice and the loss, which go training's way: no logits are made of positions
    that carry no loss, and a batch without images runs the encoder too, so that ranks stay in step under ZeRO-3."""
    model.training = True
    try:
        yield
    finally:
        model.training = False


# -- the loss -------------------------------------------------------------------------------------------------------


class _Shard(Dataset):
    """Samples of one rank; past its end the first of all, without labels, so that all ranks have as many."""

    def __init__(self, dataset: Any, rank: int, ranks: int) -> None:
        self.dataset, self.rank, self.ranks = dataset, rank, ranks

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.ranks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = index * self.ranks + self.rank
        if place < len(self.dataset):
            return self.dataset[place]
        sample = self.dataset[0]
        return {**sample, "labels": torch.full_like(sample["labels"], IGNORE_INDEX)}


def mean_loss(trainer: Any, dataset: Any) -> dict[str, float]:
    """`loss`: the mean over all supervised tokens of `dataset`, over all ranks, however they are batched; `tokens`,
    their number."""
    args = trainer.args
    loader: DataLoader = DataLoader(
        _Shard(dataset, args.process_index, args.world_size),
        batch_size=args.per_device_eval_batch_size,
        collate_fn=DataCollatorForSupervisedDataset(dataset.tokenizer),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        generator=torch.Generator(),  # or it would draw from the run's own
    )
    model = trainer._wrap_model(trainer.model, training=False)
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=args.device)
    with torch.no_grad(), spliced_as_in_training(trainer.model):
        for batch in loader:
            inputs = trainer._prepare_inputs(batch)
            loss = model(**inputs, num_items_in_batch=1, use_cache=False).loss
            total[0] += loss.double()
            total[1] += trainer.model.last_supervised
    summed, tokens = _over_ranks(trainer, total)
    if not tokens:
        raise UserError(
            f"evaluation: nothing is supervised in the {len(dataset):,} records of {dataset.records.path}; see that "
            "their gpt turns hold text, and that --model_max_length leaves it"
        )
    return {"loss": summed / tokens, "tokens": int(tokens)}


def _over_ranks(trainer: Any, counts: torch.Tensor) -> list[float]:
    """Sums over all ranks."""
    if trainer.args.world_size > 1:
        counts = trainer.accelerator.reduce(counts, reduction="sum")
    return counts.tolist()


# -- the benchmark --------------------------------------------------------------------------------------------------


def ask(trainer: Any, benchmark: Benchmark) -> dict[str, float]:
    """`accuracy` over all questions, and `accuracy_CATEGORY`; greedy answers, with the model's own skip KV-cache.

    Questions are shared out over the ranks. Under ZeRO-3 each token's weights are gathered layer by layer, by all ranks
    together: those with a question less ask one twice, which is not counted.
    """
    args, model = trainer.args, trainer.model
    categories = sorted({question.category for question in benchmark.questions})
    right = torch.zeros(2, len(categories), dtype=torch.float64, device=args.device)
    template = get_template(model.config.conv_template)
    assistant = Assistant(trainer.processing_class, model, trainer.image_processor, template, in_training=True)
    settings = AnswerSettings(batch_size=args.per_device_eval_batch_size)
    model.eval()
    with trainer.accelerator.autocast(), _cached(model):
        for batch, counts in _shares(benchmark.questions, settings.batch_size, args.process_index, args.world_size):
            images = [[load_image(path) for path in question.images] for question in batch]
            with spliced_as_in_training(model):
                texts = answer_batch(assistant, benchmark.task, batch, images, settings)
            for question, text, counted in zip(batch, texts, counts):
                place = categories.index(question.category)
                right[0, place] += counted * benchmark.task.is_correct(question, text)
                right[1, place] += counted
    summed = torch.tensor(_over_ranks(trainer, right))
    correct, asked = summed[0], summed[1]
    found = {"accuracy": float(correct.sum() / asked.sum())}
    if len(categories) > 1:
        found |= {f"accuracy_{name}": float(c / n) for name, c, n in zip(categories, correct, asked)}
    return found


def _shares(questions: list[Question], size: int, rank: int, ranks: int) -> Iterator[tuple[list[Question], list[bool]]]:
    """Batches of one rank's questions, and whether each counts; as many batches on every rank."""
    for start in range(0, -(-len(questions) // ranks), size):
        places = [index * ranks + rank for index in range(start, start + size)]
        own = [(questions[place], True) for place in places if place < len(questions)] or [(questions[0], False)]
        yield [question for question, _ in own], [counts for _, counts in own]


@contextmanager
def _cached(model: Any) -> Iterator[None]:
    """Generation with a cache, which training with gradient checkpointing turns off."""
    use, model.config.use_cache = model.config.use_cache, True
    try:
        yield
    finally:
        model.config.use_cache = use
