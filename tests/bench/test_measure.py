"""What the benchmarks work out of what they measured, against figures worked out by hand. No test judges a time."""

from __future__ import annotations

import contextlib
import functools
import json
import weakref

import pytest
import torch

from llava_sv import cli
from llava_sv.bench import break_even, cells, clock, infer, matmul, split, table, train
from llava_sv.bench.feed import Feed
from llava_sv.bench.models import freeze_encoder, make_batch, make_pair
from llava_sv.bench.sizes import SIZES

CPU = torch.device("cpu")
SIZE = SIZES["tiny"]["llava"]


@pytest.fixture(scope="module")
def pair():
    return make_pair(SIZE, CPU, torch.float32)


@pytest.mark.parametrize(
    ("prefill", "decode", "when", "tokens"),
    [
        (40.0, 0.5, "always", None),
        (40.0, 0.0, "always", None),
        (-1.0, -0.1, "never", None),
        (0.0, 0.0, "never", None),
        # 10 ms lost first, 0.4 ms won at each of n - 1 further tokens: even after 25, n = 26; faster from the next on
        (-10.0, 0.4, "from", 27),
        # 10 ms won, 0.4 lost: even at n = 26, faster up to the one before
        (10.0, -0.4, "up to", 25),
        (-10.0, 3.0, "from", 5),
        (10.0, -3.0, "up to", 4),
    ],
)
def test_break_even_of_an_answer(prefill, decode, when, tokens):
    assert break_even.of_answer(prefill, decode) == {"when": when, "new_tokens": tokens}
    if tokens is None:
        return
    gains = {n: prefill + (n - 1) * decode for n in range(1, 60)}
    faster = [n for n, gain in gains.items() if gain > 1e-9]
    assert faster == [n for n in gains if (n >= tokens if when == "from" else n <= tokens)]


@pytest.mark.parametrize(
    ("points", "when", "at"),
    [
        ([(16, 0.1), (64, 0.2)], "always", None),
        ([(16, -0.1), (64, 0.0)], "never", None),
        ([(64, 0.3), (16, -0.1)], "from", 28.0),  # a quarter of the way from 16 to 64
        ([(16, 0.3), (64, -0.1)], "up to", 52.0),
        ([(1, 0.1), (2, -0.1), (3, 0.1)], "mixed", None),
    ],
)
def test_break_even_of_a_curve(points, when, at):
    found = break_even.of_curve(points)
    assert (found["when"], found["least"], found["most"]) == (when, min(points)[0], max(points)[0])
    assert found["at"] == (None if at is None else pytest.approx(at))


def test_break_even_in_words():
    assert break_even.in_words({"when": "always", "new_tokens": None}) == "always, from the first token on"
    assert break_even.in_words({"when": "from", "new_tokens": 27}) == "from 27 new tokens on"
    curve = {"when": "never", "at": None, "least": 16, "most": 256}
    assert break_even.in_words(curve, "text tokens") == "never in this range (16 to 256 text tokens)"


def test_matmul_rate_and_mfu():
    """Squares of 1000 are 2 GFLOP: in 4 ms, 0.5 TFLOP/s. A step of 3 GFLOP in 12 ms runs at a quarter: half of it."""
    assert matmul.tflops(2e9, 4.0) == pytest.approx(0.5)
    squares = [{"ms": 4.0}, {"ms": 8.0}, {"ms": 4.0}]
    steps = [{"step_ms": 12.0}, {"step_ms": 12.0}, {"step_ms": 6.0}]
    # 0.25 of 0.5, 0.25 of 0.25, 0.5 of 0.5
    assert matmul.mfu(3e9, steps, 2e9, squares) == pytest.approx(1.0)
    assert matmul.mfu(3e9, steps[:1], 2e9, squares[:1]) == pytest.approx(0.5)
    assert matmul.describe({"side": 1000, "products": 1, "flops": 2e9}, squares)["tflops"] == pytest.approx(0.5)


def test_the_matmul_step_multiplies_what_it_says(monkeypatch):
    """The counter of FLOPs sees as many as the step claims, at a side that doubled until it took long enough."""
    times = {256: 1.0, 512: 4.0, 1024: 20.0}
    monkeypatch.setattr(matmul, "_time", lambda square, out, products, device: times[square.shape[0]] * products)
    _, facts = matmul.matmul_step(CPU, torch.float32)
    assert facts == {"side": 1024, "products": 1, "flops": 2 * 1024**3}
    monkeypatch.undo()
    monkeypatch.setattr(matmul, "LARGEST", 256)
    step, facts = matmul.matmul_step(CPU, torch.float32)
    assert clock.count_flops(step) == facts["flops"] == 2 * 256**3 * facts["products"]


class Ticks:
    """A clock that is read at moments written down beforehand."""

    def __init__(self, moments):
        self.moments = iter(moments)

    def __call__(self, device):
        return next(self.moments)


def test_split_adds_up_to_the_whole(pair, monkeypatch):
    """Read at: start, data, encoder in and out, projector in and out, decoder in and out, loss, backward, optimizer."""
    monkeypatch.setattr(clock, "now_ms", Ticks([0, 3, 4, 14, 15, 20, 22, 61, 62, 162, 169]))
    optimizer = split.make_optimizer(pair[1], CPU)
    parts = split.split_step(pair[0].train(), Feed(SIZE, CPU, torch.float32), optimizer, CPU)()
    expected = {"data": 3, "encoder": 10, "projector": 5, "splice": 4, "llm_forward": 40}
    expected |= {"backward": 100, "optimizer": 7}
    assert {name: parts[f"{name}_ms"] for name in split.PARTS} == expected
    assert parts["whole_ms"] == sum(expected.values()) == 169


def test_the_real_split_has_every_part_and_leaves_no_hook(pair):
    dense, skip = (model.train() for model in pair)
    before = {name: value.clone() for name, value in skip.named_parameters()}
    optimizer = split.make_optimizer(skip, CPU)
    found = split.measure({"dense": dense, "skip": skip}, Feed(SIZE, CPU, torch.float32), optimizer, CPU, repeats=2)
    for name in ("dense", "skip"):
        one = found[name]
        assert all(one[f"{part}_ms"] > 0 for part in split.PARTS)
    step = split.split_step(dense, Feed(SIZE, CPU, torch.float32), optimizer, CPU)()
    assert sum(step[f"{part}_ms"] for part in split.PARTS) == pytest.approx(step["whole_ms"], abs=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    # the optimizer stepped on everything that trains, and left the weights alone
    assert set(optimizer.state) == {p for p in skip.parameters() if p.requires_grad}
    assert all(torch.equal(before[name], value) for name, value in skip.named_parameters())


def test_without_an_optimizer_its_part_is_zero(pair):
    step = split.split_step(pair[0].train(), Feed(SIZE, CPU, torch.float32), None, CPU)()
    assert step["optimizer_ms"] == 0
    assert all(parameter.grad is None for parameter in pair[0].parameters())


@pytest.mark.parametrize("family", ["llava", "llava_hd", "cos"])
def test_the_feed_gives_the_batch_that_is_timed(family):
    """Same ids, labels and shapes of pixels as `make_batch`, from a decoded picture."""
    size = SIZES["tiny"][family]
    fed, made = Feed(size, CPU, torch.bfloat16)(), make_batch(size, CPU, torch.bfloat16)
    assert torch.equal(fed["input_ids"], made.input_ids)
    assert torch.equal(fed["labels"], made.labels)
    assert [image.shape for image in fed["images"]] == [image.shape for image in made.images]
    assert all(image.dtype == torch.bfloat16 and image.float().std() > 0.1 for image in fed["images"])


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_flops_of_an_answer_follow_from_those_of_three_tokens(pair, name):
    model = dict(zip(("dense", "skip"), pair))[name].eval()
    generate = infer.our_generate(model, make_batch(SIZE, CPU, torch.float32), None)
    with torch.inference_mode():
        counted = [clock.count_flops(functools.partial(generate, n)) for n in (1, 2, 3, 9)]
    assert infer.flops_of_answer(counted[:3], 9) == counted[3]
    assert infer.flops_of_answer(counted[:3], 1) == counted[0]


def test_answers_of_several_lengths_are_read_off_one(monkeypatch):
    """Tokens come at 30, 32, 34, 36 ms, the call ends at 37: two tokens take 32, four 37; decode is 2 ms a token."""
    monkeypatch.setattr(clock, "now_ms", Ticks([0, 30, 32, 34, 36, 37]))

    def generate(new_tokens, stopping_criteria):
        for _ in range(new_tokens):
            stopping_criteria[0](torch.zeros(1, 1, dtype=torch.long), None)

    found = infer.timed_answer(generate, [2, 4], CPU)()
    assert found == {
        "prefill_ms": 30,
        "decode_ms_per_token": 2,
        "end_to_end_ms": 37,
        "end_to_end_2_ms": 32,
        "end_to_end_4_ms": 37,
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    target = tmp_path_factory.mktemp("infer")
    argv = ["--size", "tiny", "--dtype", "fp32", "--repeats", "2", "--device", "cpu", "--layers", "1", "--batch", "3"]
    argv += ["--text-tokens", "40", "--num-retained", "20", "--num-skipped", "10", "--new-tokens", "9,3", "--no-peers"]
    argv += ["--json", str(target / "r.json"), "--markdown", str(target / "r.md")]
    assert cli.main(["bench", "infer", *argv]) == 0
    return json.loads((target / "r.json").read_text()), (target / "r.md").read_text()


def test_every_flag_is_in_what_ran(answers):
    report, page = answers
    asked = {"layers": 1, "batch": 3, "text_tokens": 40, "num_retained": 20, "num_skipped": 10, "new_tokens": [3, 9]}
    assert {name: report["settings"][name] for name in asked} == asked
    assert (report["layers"], report["all_layers"], report["slice"]) == (1, 2, "1 of 2 layers")
    assert "| tiny, 1 of 2 layers | 3 | 40 | 20 + 10 |" in page
    llm = SIZE.llm
    a_token = 2 * 1 * 3 * llm.num_key_value_heads * llm.head_dim * 4
    assert report["skip"]["kv_bytes"] == (40 + 20 + 2) * a_token


def test_kv_bytes_are_exactly_the_kept_share(answers):
    check = answers[0]["kv_check"]
    assert (check["kept_tokens"], check["all_tokens"], check["equal"]) == (62, 104, True)
    assert check["bytes_share"] == check["tokens_share"] == 62 / 104
    assert "exactly that share" in table.kv_in_words(check)


def test_kv_bytes_that_are_not_the_kept_share_are_told(pair):
    rows = {"dense": {"kv_bytes": 1000}, "skip": {"kv_bytes": 500}}
    with torch.inference_mode():
        check = infer.check_kv(*pair, make_batch(SIZE, CPU, torch.float32), rows)
    # 16 text tokens, 8 retained and 2 summaries of 16 + 64
    assert (check["kept_tokens"], check["all_tokens"], check["equal"]) == (26, 80, False)
    assert "NOT the kept share" in table.kv_in_words(check)


def test_lengths_of_the_report(answers):
    report, page = answers
    assert [row["new_tokens"] for row in report["lengths"]] == [3, 9]
    assert report["new_tokens"] == 9
    for row in report["lengths"]:
        flops = [report[name]["flops_by_length"][str(row["new_tokens"])] for name in ("dense", "skip")]
        assert row["flops_saved"] == pytest.approx(1 - flops[1] / flops[0])
        assert row["time_saved_per_flops_saved"] == pytest.approx(row["time_saved"] / row["flops_saved"])
    assert report["lengths"][1]["dense_ms"] == report["dense"]["end_to_end_ms"]
    assert report["break_even"]["when"] in ("always", "never", "from", "up to")
    assert "faster end to end" in page


def test_shares_without_any_saving():
    found = clock.savings([{"ms": 9.0}], [{"ms": 10.0}], "ms", flops_saved=0.0)
    assert found["time_saved"] == pytest.approx(0.1)
    assert found["time_saved_per_flops_saved"] is None
    assert cells.percent(None) == "-"


def test_peak_bytes_counts_weights_and_the_worst_moment():
    layer = torch.nn.Linear(100, 100, bias=False)

    def run():
        x = torch.ones(10, 100)
        y = layer(x)
        del x
        return y + 1

    # autograd keeps x for the weight's gradient: x, y and y + 1 beside the weights; without it x is gone by then
    assert clock.peak_bytes(run, CPU, layer) == 4 * (100 * 100 + 3 * 10 * 100)
    with torch.no_grad():
        assert clock.peak_bytes(run, CPU, layer) == 4 * (100 * 100 + 2 * 10 * 100)


def test_a_long_sequence_has_its_positions():
    from dataclasses import replace

    from llava_sv.bench.models import make_config

    long = replace(SIZE, text_tokens=5000)
    assert make_config(long, None, 100).max_position_embeddings == 5000 + 64 + 100
    assert make_config(SIZE, None).max_position_embeddings == 4096


def test_freezing_is_the_recipes(pair):
    assert not any(p.requires_grad for p in freeze_encoder(pair[0], "llava").get_model().vision_tower.parameters())


def test_peak_bytes_on_a_gpu_leave_out_what_others_hold(monkeypatch):
    """7,000 bytes are held before, 400 of them the model's; the run takes 900 at most."""
    layer = torch.nn.Linear(10, 10, bias=False)
    tied = torch.nn.ModuleList([layer, torch.nn.Linear(10, 10, bias=False)])
    tied[1].weight = layer.weight
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7900)
    assert clock.peak_bytes(lambda: done.append("ran"), torch.device("cuda"), layer, tied) == 900 + 400
    assert done == ["reset", "ran"]


def test_weighing_lets_go_of_activations_as_a_step_does(monkeypatch):
    """What the forward pass kept is gone after the backward pass, though all of it was counted."""
    kept, watching, alive = torch.nn.Linear(8, 8), [], []

    class Watched(clock.SavedBytes):
        @contextlib.contextmanager
        def watch(self):
            watching.append(True)
            with super().watch():
                yield self
            watching.pop()

    def forward() -> torch.Tensor:
        hidden = kept(torch.ones(4, 8)).exp()  # keeps its result
        if watching:
            reference = weakref.ref(hidden.untyped_storage())
            kept.weight.register_post_accumulate_grad_hook(lambda _: alive.append(reference()))
        return hidden.sum()

    monkeypatch.setattr(clock, "SavedBytes", Watched)
    found = train.weigh(kept, forward, CPU)
    assert found["activation_bytes"] == 4 * (4 * 8 + 4 * 8)  # the input of the layer, the result of exp
    assert alive[0] is None  # later ones are of the peak, which nobody watches so
