"""FLOPs of real steps against torch's own counter, waiting for data, and what is said of both."""

import json
from types import SimpleNamespace

import pytest
import torch

from llava_sv.bench.clock import count_flops
from llava_sv.bench.exact import Tokens, compression_flops
from llava_sv.errors import UserError
from llava_sv.train import build, throughput
from llava_sv.train.flags import parse
from llava_sv.train.metrics import read_metrics
from llava_sv.train.step_flops import ON_DEVICE, Counter
from llava_sv.train.train import train
from tests.train.tiny import FAMILIES

torch.set_num_threads(1)

STAGES = {
    "pretrain": ("pretrain",),
    "dense": ("sft",),
    "skip": ("skip",),
    "skip, some layers": ("skip", "--sv_skip_layers", "1"),
    "skip, encoder trains": ("skip", "--unfreeze_mm_vision_tower", "True"),
    "skip, language model frozen": ("skip", "--freeze_backbone", "True"),
    "dense, projector frozen": ("sft", "--freeze_mm_mlp_adapter", "True"),
}
BATCHES = {
    "images": ([[5, -200, 6, 7], [5, -200, 6, 8]], 2),
    "an image and a text": ([[5, -200, 6, 7], [5, 6, 7]], 1),
    "texts": ([[5, 6, 7], [5, 6, 8, 9]], 0),
}


def built(world, family, stage):
    of_family, budget = FAMILIES[family]
    flags = ["--model_max_length", "512", *of_family, *(budget if stage[0] == "skip" else ()), *stage[1:]]
    model_args, data_args, args = parse(world.flags(stage[0], world.folder / "unused", *flags))
    _, model, _ = build.build(model_args, data_args, args)
    build.choose_trainable(model, model_args)
    return model.train()


def batch_of(model, rows, images):
    """As the collator makes it; an image of LLaVA-HD has four tiles."""
    side = model.config.vision_config["image_size"]
    views = (5,) if model.config.mm_family == "llava_hd" else ()
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(~mask | (ids < 0), -100),
        "images": [torch.randn(*views, 3, side, side) for _ in range(images)],
        "image_sizes": [(2 * side, 2 * side) if views else (side, side)] * images,
    }


def counted(counter, model, batch):
    host, device = counter.of(batch, model.last_roles, model.last_supervised, model.last_sample_lengths)
    return host | dict(zip(ON_DEVICE, device.tolist()))


def of_angles(model, width):
    """What transformers' rotary angles of `width` positions take: older versions make them by a matrix product."""
    embeds, positions = torch.zeros(1, width, model.config.hidden_size), torch.arange(width)[None]
    return count_flops(lambda: model.model.rotary_emb(embeds, positions))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_hardware_flops_are_what_torch_counts(world, family, stage):
    """Forward and backward of real batches: equal, but for the summaries' scores, a matrix times a vector, which
    torch's counter passes over."""
    model = built(world, family, STAGES[stage])
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        counter = Counter(model, recompute)
        for name, (rows, images) in BATCHES.items():
            batch = batch_of(model, rows, images)
            found = count_flops(lambda b=batch: model(**b, use_cache=False).loss.backward())
            model.zero_grad()
            counts = counted(counter, model, batch)
            flops = counter.flops(counts)
            scores = compression_flops(Tokens(0, 0, pooled=1), model.config.hidden_size)["summaries"] / 2
            unseen = counts["pooled_run"] * scores * counter.factors["summaries"]
            # without tiles, LLaVA-HD's latter summary pools one row of zeros, so that its weight has a gradient; it
            # is merged with itself before: one product with the sum of all, and one with what stays
            idle = (0, 4 * model.config.hidden_size) if family == "llava_hd" and name == "texts" else (0,)
            found -= of_angles(model, int(counts["positions"] / counts["samples"]))
            assert found - (flops["hardware"] - unseen) in idle, (name, recompute)
            assert flops["model"] <= flops["hardware"]
            if name == "images" and not recompute:
                assert flops["model"] == flops["hardware"], "nothing is padded"


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_flops_are_what_the_dense_model_takes(world, family):
    """The skipping model's figure for `dense` against the dense model's own on the same batch, padding left out."""
    skip, dense = (built(world, family, STAGES[stage]) for stage in ("skip", "dense"))
    rows, images = BATCHES["an image and a text"]
    flops = []
    for model in (skip, dense):
        batch = batch_of(model, rows, images)
        model(**batch, use_cache=False)
        flops.append(Counter(model).flops(counted(Counter(model), model, batch)))
    assert flops[0]["dense"] == flops[1]["dense"] == flops[1]["model"]
    assert flops[0]["model"] < flops[0]["dense"]


def test_real_lengths_by_hand(world):
    """Samples of 3 + 11 and 3 tokens in rows of 14."""
    model = built(world, "llava", STAGES["skip"])
    batch = batch_of(model, *BATCHES["an image and a text"])
    model(**batch, use_cache=False)
    counts = counted(Counter(model), model, batch)
    wanted = {"samples": 2, "tokens": 17, "positions": 28, "squares": 14**2 + 3**2, "padded_squares": 2 * 14**2}
    wanted |= {"visual_tokens": 11, "skipped": 5, "dense_tokens": 19 + 3, "dense_squares": 19**2 + 9, "views": 1}
    wanted |= {"supervised": 2 + 2, "merged_pairs": 12 * (5 + 1), "pooled": 9, "images_run": 1}
    assert {name: counts[name] for name in wanted} == wanted


def test_packed_rows_count_each_sample(world):
    """Two samples in one row of 17: torch's count of the run, and the work of the same samples apart."""
    model = built(world, "llava", STAGES["skip"])
    counter = Counter(model)
    batch = batch_of(model, *BATCHES["an image and a text"])
    model(**batch, use_cache=False)
    apart = counter.flops(counted(counter, model, batch))
    model.set_attn_implementation("sdpa_varlen")
    found = count_flops(lambda: model(**batch, packs=[2], use_cache=False).loss.backward())
    counts = counted(counter, model, batch)
    packed = counter.flops(counts)
    assert (counts["samples"], counts["positions"], counts["padded_squares"]) == (2, 17, 14**2 + 3**2)
    scores = compression_flops(Tokens(0, 0, pooled=1), model.config.hidden_size)["summaries"] / 2
    unseen = counts["pooled_run"] * scores * counter.factors["summaries"]
    assert found - of_angles(model, 17) == packed["hardware"] - unseen
    assert packed["model"] == packed["hardware"] == apart["model"]


def test_counting_asks_the_device_for_nothing(world):
    """What the device knows leaves as a tensor; on the meta device, any question for a value would raise."""
    model = built(world, "llava", STAGES["skip"])
    batch = batch_of(model, *BATCHES["images"])
    _, on_device = Counter(model).of(batch, torch.zeros(2, 14, dtype=torch.int8, device="meta"), 4)
    assert on_device.device.type == "meta"


def test_waiting_is_timed_batch_by_batch(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    waits = []
    assert list(throughput.timed(iter("ab"), waits.append)) == ["a", "b"]
    assert waits == [1.0, 2.0, 0.5], "the end was waited for too"


def test_wait_rates_are_the_worst_ranks():
    rates = throughput.wait_rates([0.1, 0.3], seconds=2.0, steps=4)
    assert rates == pytest.approx(
        {"step_ms": 500, "data_wait_ms": 75, "data_wait_share": 0.15, "data_wait_share_mean": 0.1}
    )
    assert "data_wait_share_mean" not in throughput.wait_rates([0.1], 2.0, 4)


def test_the_summary_weighs_steps_and_passes_over_a_gap():
    rows = [
        {"step": 2, "loss": 1.0, "step_ms": 100.0, "data_wait_ms": 50.0, "mfu": 0.2},
        {"step": 3, "loss": 1.0},
        {"step": 6, "loss": 1.0, "step_ms": 200.0, "data_wait_ms": 10.0, "mfu": 0.4},
    ]
    found = throughput.summary(rows)
    assert found["data_wait_share"] == pytest.approx((100 + 30) / (200 + 600))
    assert found["data_wait_ms"] == pytest.approx(130 / 5)
    assert found["mfu"] == pytest.approx((200 * 0.2 + 600 * 0.4) / 800)
    assert throughput.summary([]) == {}


@pytest.mark.parametrize(
    ("share", "workers", "cores", "said"),
    [
        (0.05, 0, 8, ""),
        (0.20, 0, 8, "20% of its time; images are read in the training process: raise --dataloader_num_workers"),
        (0.20, 4, 8, "raise --dataloader_num_workers (now 4), or --dataloader_prefetch_factor (now 2)"),
        (0.20, 8, 8, "8 workers share 8 cores: store images smaller"),
    ],
)
def test_the_hint_names_what_to_raise(share, workers, cores, said):
    args = SimpleNamespace(dataloader_num_workers=workers, dataloader_prefetch_factor=None)
    line = throughput.hint(share, args, cores)
    assert said in line
    assert bool(line) is bool(said)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA A10", 125),
        ("Tesla K80", None),
    ],
)
def test_known_peaks(name, tflops):
    assert throughput.known_peak(name) == (None if tflops is None else tflops * 1e12)


def test_rates_against_a_peak_of_several_devices():
    flops = {"model": 8e12, "hardware": 12e12, "dense": 16e12}
    rates = throughput.flop_rates(flops, seconds=2.0, peak=4e12, ranks=2)
    assert rates == {"flops_per_second": 4e12, "mfu": 0.5, "hfu": 0.75, "dense_flops_share": 0.5}
    assert "mfu" not in throughput.flop_rates(flops, 2.0, None, 2), "nobody knows this device's peak"


@pytest.mark.parametrize("text", ["0", "-3", "fast", "nan", "inf"])
def test_a_peak_that_is_none_is_refused(world, text):
    with pytest.raises(UserError, match="--peak_tflops: expected TFLOP/s of one device, above 0, or measure"):
        parse(world.flags("sft", world.folder / "unused", "--peak_tflops", text))


def test_a_measured_peak_is_a_rate():
    assert throughput.measured_peak(torch.device("cpu"), torch.float32, side=64, seconds=0.0) > 0


def test_what_a_resumed_run_skips_is_not_read(world, tmp_path, monkeypatch):
    """Batches passed over are neither loaded nor waited for."""
    from llava_sv.data.dataset import LazySupervisedDataset as Dataset

    flags = world.flags("skip", tmp_path, "--save_strategy", "steps", "--save_steps", "6")
    assert train(argv=flags) == 0
    for name in ("train_summary.json", "checkpoint-8/complete.json"):
        (tmp_path / name).unlink()
    read, get = [], Dataset.__getitem__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, index: read.append(index) or get(self, index))
    assert train(argv=flags) == 0
    assert len(read) == 4, "two steps of two samples are left"
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    assert 0 < json.loads((tmp_path / "train_summary.json").read_text())["data_wait_share"] <= 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_logs_waiting_and_flops(world, tmp_path, workers):
    """With accumulated steps, whatever loads the data; and again after an interruption."""
    flags = ["--gradient_accumulation_steps", "3", "--dataloader_num_workers", workers, "--peak_tflops", "0.1"]
    assert train(argv=world.flags("skip", tmp_path, *flags)) == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert 0 <= row["data_wait_share"] <= 1
        assert row["data_wait_ms"] <= row["step_ms"]
        assert row["flops_per_second"] > 0
        assert 0 < row["mfu"] <= row["hfu"]
        assert 0 < row["dense_flops_share"] < 1
        # the same steps' FLOPs by another way: the share is of one step, the rate of its time
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / 0.1e12)
    summary = json.loads((tmp_path / "train_summary.json").read_text())
    assert summary["data_wait_share"] == pytest.approx(throughput.waited(rows)["data_wait_share"])
    assert {"mfu", "hfu", "flops_per_second", "dense_flops_share", "data_wait_ms"} <= set(summary)
