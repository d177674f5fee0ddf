"""What a recipe of the model zoo costs: FLOPs of a whole training, hours, bytes of a checkpoint and of an image's KV.

Called by `release.zoo`; plain arithmetic on `bench.exact`'s counts. FLOPs are two a multiply-add. `model`: what the
samples need; `run`: with the layers that gradient checkpointing runs again. No padding is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llava_sv.bench.answer import cached_tokens, kv_bytes_per_token
from llava_sv.bench.counts import Question, train_flops
from llava_sv.bench.exact import Tokens, llm_flops, recomputed_flops, skipping_tokens
from llava_sv.bench.parameters import parameters
from llava_sv.bench.presets import Budget, Setting
from llava_sv.release.zoo_recipes import DEVICES, Checkpoint, Device, Stage, Zoo

BF16 = 2
"""Bytes of a number."""


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample or of many."""

    model: float = 0.0
    run: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.model + other.model, self.run + other.run)

    def times(self, factor: float) -> Work:
        """The work of so many of them."""
        return Work(self.model * factor, self.run * factor)


def pictures(zoo: Zoo, stage: Stage) -> list[tuple[float, Setting]]:
    """(share of the pictures, setting). LLaVA-HD's mean picture lies between two whole numbers of views."""
    setting = stage.setting
    if stage.family != "llava_hd":
        return [(1.0, setting)]
    patches = setting.encoder.patches
    mean = zoo.assumptions.hd_dense_tokens / patches if stage.views is None else float(stage.views)
    fewer = int(mean)
    shares = [(1 - (mean - fewer), fewer), (mean - fewer, fewer + 1)]
    return [
        (share, replace(setting, views=views, dense_tokens=views * patches)) for share, views in shares if share > 0
    ]


def sample_with_image(zoo: Zoo, stage: Stage, text: float, setting: Setting) -> Work:
    """One training step's work on a record with one picture. text: its tokens."""
    budget = stage.budget(setting)
    question = Question(
        stage.family,
        None,
        setting,
        stage.llm,
        budget or Budget(setting.dense_tokens, 0, 0, 0, 0),
        text_tokens=text,  # type: ignore[arg-type]
        supervised_tokens=text * zoo.assumptions.supervised_share,  # type: ignore[arg-type]
        trains=stage.trains,
    )
    side = "dense" if budget is None else "skip"
    return Work(*(replace(question, recompute=again).training(side)["total"] for again in (False, True)))


def sample_of_text(zoo: Zoo, stage: Stage, text: float) -> Work:
    """The same of a record without a picture; what a batch without one runs besides is not counted."""
    tokens = Tokens(text, 0)  # type: ignore[arg-type]
    forward = llm_flops(stage.llm, tokens, text * zoo.assumptions.supervised_share)  # type: ignore[arg-type]
    model = train_flops(forward, train_llm=stage.trains == "sft")["total"]
    return Work(model, model + sum(recomputed_flops(forward, stage.setting.encoder, 1.0).values()))


def training_work(zoo: Zoo, stage: Stage, text_tokens: float | None = None) -> Work:
    """The whole stage: records x epochs. text_tokens: of a record with an image, in place of the assumed mean."""
    data = zoo.data[stage.data]
    text = data.text_tokens if text_tokens is None else text_tokens
    with_image = sum(
        (sample_with_image(zoo, stage, text, setting).times(share) for share, setting in pictures(zoo, stage)), Work()
    )
    whole = with_image.times(data.records - data.text_only)
    if data.text_only:
        whole += sample_of_text(zoo, stage, data.text_only_tokens).times(data.text_only)
    return whole.times(stage.epochs)


def hours(flops: float, device: Device, share: float, devices: int = DEVICES) -> float:
    """Wall-clock hours. share: of the devices' peak, that `flops` are done at."""
    return flops / (devices * device.flops * share) / 3600


def implied_share(flops: float, device: Device, took: float, devices: int = DEVICES) -> float:
    """The share of the peak that `took` hours stand for: `hours` turned round."""
    return hours(flops, device, 1.0, devices) / took


def control_of(zoo: Zoo, checkpoint: Checkpoint) -> Checkpoint:
    """The dense checkpoint that this one is held against; itself where it is dense."""
    return zoo.checkpoints[checkpoint.dense] if checkpoint.dense else checkpoint


PAPERS = "a100-80gb"
"""What the paper trained on."""


def calibrated_mfu(zoo: Zoo, checkpoint: Checkpoint) -> tuple[float, str]:
    """(MFU, name of the dense row whose hours in the paper imply it): the control's; the family's where it has none."""
    control = control_of(zoo, checkpoint)
    if control.paper.hours is None:
        control = next(
            one
            for one in zoo.checkpoints.values()
            if one.dense is None and one.paper.hours and one.sft.family == checkpoint.sft.family
        )
    work = training_work(zoo, control.sft).model
    assert control.paper.hours is not None
    return implied_share(work, zoo.devices[PAPERS], control.paper.hours, control.paper.gpus), control.name


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """Of the weights in bfloat16, the encoder's included."""
    stage = checkpoint.sft
    budget = stage.budget()
    counts = parameters(stage.llm, stage.setting, budget.summaries if budget else 0)
    return BF16 * sum(counts.values())


def kv_of_image(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes in bfloat16 that the largest picture keeps in the cache while an answer is made, and before: after the
    prefill, and what a dense model keeps."""
    stage = checkpoint.sft
    setting, budget = stage.setting, stage.budget()
    each = kv_bytes_per_token(stage.llm, "bfloat16")
    dense = Tokens(0, setting.dense_tokens)
    tokens = dense if budget is None else skipping_tokens(0, budget)
    level = "none" if budget is None else budget.skip_kv
    return {
        "dense": dense.sequence * each,
        "prefill": tokens.sequence * each,
        "kept": cached_tokens(tokens, level) * each,
    }


def cost_of(
    zoo: Zoo, checkpoint: Checkpoint, mfu: float | None = None, text_tokens: float | None = None
) -> dict[str, Any]:
    """One row: FLOPs of both stages, hours of both on each device, the MFU that they assume, bytes."""
    sft = training_work(zoo, checkpoint.sft, text_tokens)
    pretrain = training_work(zoo, zoo.pretraining[checkpoint.pretrain])
    control = replace(control_of(zoo, checkpoint).sft, data=checkpoint.sft.data)
    dense = training_work(zoo, control, text_tokens)
    share, source = (mfu, "given") if mfu is not None else calibrated_mfu(zoo, checkpoint)
    return {
        "records": zoo.data[checkpoint.sft.data].records,
        "flops": {"sft": sft.model, "sft_run": sft.run, "pretrain": pretrain.model, "pretrain_run": pretrain.run},
        "flops_of_dense": sft.model / dense.model,
        "mfu": share,
        "mfu_from": source,
        "hours": {
            name: {"sft": hours(sft.model, device, share), "pretrain": hours(pretrain.model, device, share)}
            for name, device in zoo.devices.items()
        },
        "bytes": checkpoint_bytes(checkpoint),
        "kv_bytes": kv_of_image(checkpoint),
    }


def saved_in_time(dense_hours: float, ratio: float, share: float) -> float:
    """Hours where `share` of the FLOPs that are saved becomes time; `ratio`: FLOPs, skipping over dense."""
    return dense_hours * (1 - share * (1 - ratio))


def checks(zoo: Zoo) -> dict[str, list[dict[str, Any]]]:
    """The estimate against hours that are known. `dense`: what MFU each dense row implies, and its hours by LLaVA's.
    `skipping`: hours from the dense row's and the FLOPs. `data`: from the same model's on fewer records. `reported`:
    others' runs, at the MFU of the paper's."""
    timed = [one for one in zoo.checkpoints.values() if one.paper.hours]
    work = {one.name: training_work(zoo, one.sft) for one in timed}
    skipping = [one for one in timed if one.dense and one.sft.data == control_of(zoo, one).sft.data]
    rows = [
        _of_flops(zoo, one, work[one.name], work[control.name])
        for one in skipping
        if (control := control_of(zoo, one)).paper.hours
    ]
    for row in rows:
        # the share of the FLOPs saved that became time, off the paper's other budget of the same family
        rest = [other for other in rows if other is not row and other["family"] == row["family"]]
        if rest:
            row["hours_by_other"] = saved_in_time(row["dense_hours"], row["flops_of_dense"], rest[0]["papers_share"])
            row["error_by_other"] = row["hours_by_other"] / row["paper_hours"] - 1
    return {
        "dense": _of_dense(zoo, [one for one in timed if one.dense is None], work),
        "skipping": rows,
        "data": _of_data(zoo, [one for one in timed if one.dense and one not in skipping], skipping),
        "reported": _of_others(zoo),
    }


def _of_dense(zoo: Zoo, rows: list[Checkpoint], work: dict[str, Work]) -> list[dict[str, Any]]:
    a100 = zoo.devices[PAPERS]
    first = calibrated_mfu(zoo, rows[0])[0]
    found = []
    for one in rows:
        took, flops = float(one.paper.hours or 0), work[one.name]
        by_first = hours(flops.model, a100, first)
        found.append(
            {
                "name": one.name,
                "paper_hours": took,
                "mfu": implied_share(flops.model, a100, took),
                "hfu": implied_share(flops.run, a100, took),
                "hours_by_first": by_first,
                "error": by_first / took - 1,
            }
        )
    return found


def _of_data(zoo: Zoo, rows: list[Checkpoint], known: list[Checkpoint]) -> list[dict[str, Any]]:
    by_method = {_method(one): one for one in known}
    found = []
    for one in rows:
        other, took = by_method[_method(one)], float(one.paper.hours or 0)
        ratio = zoo.data[one.sft.data].records / zoo.data[other.sft.data].records
        estimate = float(other.paper.hours or 0) * ratio * other.paper.gpus / one.paper.gpus
        row = {"name": one.name, "from": other.name, "gpus": one.paper.gpus, "paper_hours": took}
        found.append(row | {"hours": estimate, "error": estimate / took - 1})
    return found


def _of_others(zoo: Zoo) -> list[dict[str, Any]]:
    found = []
    for one in zoo.reported:
        checkpoint = zoo.checkpoints[one.checkpoint]
        stage = checkpoint.sft if one.trains == "sft" else zoo.pretraining[checkpoint.pretrain]
        flops = training_work(zoo, replace(stage, decoder=one.decoder)).model
        estimate = hours(flops, zoo.devices[PAPERS], calibrated_mfu(zoo, checkpoint)[0])
        found.append({**vars(one), "estimate": estimate, "error": estimate / one.hours - 1})
    return found


def _method(checkpoint: Checkpoint) -> tuple[Any, ...]:
    stage = checkpoint.sft
    return stage.family, stage.preset, stage.retained, stage.skipped


def _of_flops(zoo: Zoo, one: Checkpoint, work: Work, dense: Work) -> dict[str, Any]:
    took, ratio = float(one.paper.hours or 0), work.model / dense.model
    dense_hours = float(control_of(zoo, one).paper.hours or 0)
    by_flops = dense_hours * ratio
    by_share = saved_in_time(dense_hours, ratio, zoo.assumptions.time_share[one.sft.family])
    return {
        "name": one.name,
        "family": one.sft.family,
        "paper_hours": took,
        "dense_hours": dense_hours,
        "flops_of_dense": ratio,
        "hours": by_flops,
        "error": by_flops / took - 1,
        "hours_by_share": by_share,
        "error_by_share": by_share / took - 1,
        "papers_share": (1 - took / dense_hours) / (1 - ratio),
    }
