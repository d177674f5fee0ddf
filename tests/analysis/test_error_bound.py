"""`analyze error-bound`: measured numbers against plain loops, and bounds that hold on every model tried."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava_sv import cli
from llava_sv.analysis.bounds import PROVED, Head, bounds_of, checks_of, gains_of
from llava_sv.analysis.divergence import Plan, measure, similarity_error
from llava_sv.analysis.error_bound import layers_of, statement, tally
from llava_sv.analysis.lipschitz import head_norms, layer_constant, norm_constant, norms_of
from llava_sv.analysis.trajectory import walk_of
from llava_sv.errors import UserError
from llava_sv.model.config import SkipVisionConfig
from tests.analysis.families import save_family
from tests.analysis.test_ffn_impact import job_of
from tests.analysis.walks import ROLES, skipping_forward, tiny_walk

DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def checked(walk, skips=(0, 1, 2), iterations=3, sigma=None):
    norms = [norms_of(layer, 50) for layer in walk.layers]
    found = measure(walk, Plan(frozenset(skips), norms, iterations, sigma))
    found["similarity_error"] = np.array(0.3)
    gains = gains_of(found, norms, 8)
    bounds = bounds_of(found, gains, Head(*head_norms(walk.model)))
    return found, gains, bounds, checks_of(found, bounds)


@pytest.mark.parametrize("decoder", DECODERS)
def test_both_walks_are_the_models_own(decoder):
    walk = tiny_walk(decoder, seed=3)
    with torch.no_grad():
        x = y = walk.embeds
        for index in range(3):
            x, attended = walk.layer(index, x), walk.attend(index, y)
            ffn = walk.ffn(index, attended)
            y = attended + ffn * (walk.passes | (index == 1)).unsqueeze(-1)
        torch.testing.assert_close(x, skipping_forward(walk, []), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y, skipping_forward(walk, [0, 2]), rtol=1e-4, atol=1e-4)


def test_skip_error_and_gain_by_hand():
    walk = tiny_walk(seed=2)
    found = measure(walk, Plan(frozenset({0, 2}), None, 0))
    assert found["skip_error"][1] == 0
    assert np.isnan(found["gain_secant"][0])
    assert found["error"][0] == 0
    first = walk.layers[0]
    attended = walk.attend(0, walk.embeds)
    total = tokens = 0.0
    for row in range(len(walk.roles)):
        if walk.roles[row] == 5:
            missed = first.mlp(first.post_attention_layernorm(attended[row]))
            total += float((missed**2).sum())
            tokens += float(missed.norm()) / int(walk.skipped.sum())
    assert found["skip_error"][0] == pytest.approx(total**0.5, rel=1e-5)
    assert found["skip_error_token"][0] == pytest.approx(tokens, rel=1e-5)
    assert found["error"][1] == pytest.approx(total**0.5, rel=1e-5)
    assert found["error_kept"][1] == 0.0
    with torch.no_grad():
        x, y = walk.layer(0, walk.embeds), walk.layer(0, walk.embeds)
        y[walk.skipped] = attended[walk.skipped]
        gap = walk.layer(1, x) - walk.layer(1, y)
    assert found["gain_secant"][1] == pytest.approx(float(gap.norm() / (x - y).norm()), rel=1e-4)
    assert found["error"][2] == pytest.approx(float(gap.norm()), rel=1e-4)
    y_end = skipping_forward(walk, [0, 2])
    z, other = walk.logits(skipping_forward(walk, [])[-1]), walk.logits(y_end[-1])
    kl = torch.nn.functional.kl_div(z.log_softmax(-1), other.softmax(-1), reduction="sum")
    assert float(found["kl"]) == pytest.approx(float(kl), rel=1e-3)
    assert float(found["sigma"]) == pytest.approx(float(z.std(correction=0)), rel=1e-4)
    assert float(found["logit_error"]) == pytest.approx(float((z - other).norm()), rel=1e-3)


@pytest.mark.parametrize("family", list(ROLES))
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("std", [0.02, 0.3, 1.5])
def test_what_is_proved_holds_on_every_model(decoder, family, std):
    for seed in range(3):
        walk = tiny_walk(decoder, family, seed, std)
        for skips in ((0, 1, 2), (1,), (0, 2)):
            _found, gains, _bounds, checks = checked(walk, skips, iterations=0)
            failing = [name for name, check in checks.items() if check.proved and not check.holds]
            assert not failing, (seed, skips, failing)
            known = np.isfinite(gains["secant"])
            assert (gains["operator"][known] >= gains["secant"][known]).all()
            assert (gains["operator"][known] >= 0).all(), "with residuals no constant is below 1"


def test_the_constant_holds_for_any_two_sequences_not_only_these():
    """x and y drawn apart at random, near and far: a sharper trial than trajectories."""
    for decoder in DECODERS:
        for seed in range(10):
            walk = tiny_walk(decoder, seed=seed, std=0.5)
            norms = norms_of(walk.layers[0], 5)
            torch.manual_seed(seed)
            for size in (1e-2, 1.0, 30.0):
                x = walk.embeds
                y = x + size * torch.randn_like(x) * (torch.rand(len(x), 1) < 0.4)
                gap = float((x - y).norm())
                if gap:
                    moved = float((walk.layer(0, x) - walk.layer(0, y)).norm())
                    assert moved <= layer_constant(walk, 0, norms, x, y)["total"] * gap


def test_the_norms_constant_is_reached_by_turning_a_token():
    walk = tiny_walk()
    norm = walk.layers[0].input_layernorm
    norm.weight.fill_(2.0)
    x = torch.zeros(1, 16)
    x[0, 0], step = 3.0, 1e-3
    y = x.clone()
    y[0, 1] = step
    reached = float((norm(x) - norm(y)).norm() / (x - y).norm())
    assert norm_constant(norm, x, y) == pytest.approx(reached, rel=1e-3)


def test_the_papers_own_products_are_no_bound():
    """Small weights: L_attn + L_ffn is far below 1, yet the residual carries every error on."""
    _found, gains, _bounds, checks = checked(tiny_walk(std=0.1, seed=1), skips=(0,))
    assert (gains["theorem"] < 0).all()
    assert not PROVED["theorem"]
    assert not checks["error/theorem"].holds
    assert all(check.holds for check in checks.values() if check.proved)


def test_gains_by_derivatives_lie_between_their_fellows():
    found, *_ = checked(tiny_walk(seed=5), iterations=60)
    assert (found["gain_jvp_norm"][1:] <= found["gain_operator"][1:] * (1 + 1e-6)).all()
    assert np.isnan(found["gain_jvp"][0])
    assert (found["gain_jvp"][1:] > 0.2 * found["gain_secant"][1:]).all()


@pytest.mark.parametrize("skips", [(2,), (0, 1, 2)])
def test_a_prompt_that_ends_with_a_skipped_token(skips):
    """As templates that drop words have it, without a latter summary: there the last layer's error is in the answer."""
    walk = tiny_walk(seed=2)
    walk.roles[-1] = 5
    found, *_, checks = checked(walk, skips, iterations=0)
    assert float(found["kl"]) > 0
    assert [name for name, check in checks.items() if check.proved and not check.holds] == []


@torch.no_grad()
def test_the_similarity_term_by_loops(skip_checkpoint, pictures):
    """(13)'s theta: of each patch that is no token of the sequence, the cosine to the nearest one that is."""
    job = job_of(skip_checkpoint, pictures, "--num-images", "1")
    sample = next(job.samples("by loops"))
    walk = walk_of(job, sample)
    found = similarity_error(job, sample, walk)
    (image,) = sample.batch.images
    dense = job.model.get_model().mm_projector.tokens_of(job.model.get_vision_tower()(image[None]))[0].tolist()
    standing = [row for row, role in zip(walk.embeds.tolist(), walk.roles.tolist()) if role in (3, 4, 5)]
    assert (len(dense), len(standing)) == (16, 9)
    cosines, lengths = [], []
    for token in dense:
        if token in standing:
            continue
        length = math.hypot(*token)
        lengths.append(length)
        cosines.append(max(sum(a * b for a, b in zip(token, one)) / length / math.hypot(*one) for one in standing))
    assert 7 < len(cosines) < 12
    theta = sum(cosines) / len(cosines)
    assert float(found["theta"]) == pytest.approx(theta, rel=1e-6)
    size = (sum(length**2 for length in lengths) / len(lengths)) ** 0.5
    assert float(found["similarity_error"]) == pytest.approx((2 - 2 * theta) ** 0.5 * size, rel=1e-6)


def test_a_bound_that_fails_is_said():
    *_, checks = checked(tiny_walk())
    assert statement(tally([checks])).startswith("All ")
    check = checks["error/secant"]
    object.__setattr__(check, "bound", check.bound - 5)
    assert statement(tally([checks])).startswith("PROVED BOUNDS FAIL, which is an error of this code: error/secant")


def flags(checkpoint, pictures, out, *more):
    return ["analyze", "error-bound", "--model-path", str(checkpoint), "--image-folder", str(pictures),
            "--device", "cpu", "--output", str(out), *more]  # fmt: skip


def test_the_command_leaves_three_files(skip_checkpoint, pictures, tmp_path, capsys):
    assert cli.main(flags(skip_checkpoint, pictures, tmp_path, "--power-iterations", "5")) == 0
    assert "proved bounds hold on all 4 pictures" in capsys.readouterr().out
    text = (tmp_path / "error-bound.json").read_text()
    numbers = json.loads(text)
    assert "NaN" not in text
    assert "Infinity" not in text
    assert {row["holds"] for row in numbers["checks"].values() if row["proved"]} == {4}
    assert numbers["gains"]["secant"]["proved"]
    assert not numbers["gains"]["jvp"]["proved"]
    assert numbers["environment"]["dtype"].endswith("float32")
    assert 0 < numbers["measured"]["theta"] < 1
    arrays = np.load(tmp_path / "error-bound.npz")
    assert arrays["skip_error"].shape == (4, 2)
    assert arrays["log_bound/error/secant"].shape == (4, 3)
    assert (np.log(arrays["error"][:, 1:]) <= arrays["log_bound/error/operator"][:, 1:]).all()


def test_pictures_in_which_nothing_is_skipped(skip_checkpoint, pictures, tmp_path, capsys, monkeypatch):
    """As LLaVA-HD has them: a picture without tiles."""
    from llava_sv.analysis.trajectory import Walk

    monkeypatch.setattr(Walk, "skipped", property(lambda self: self.roles == 99))
    assert cli.main(flags(skip_checkpoint, pictures, tmp_path, "--gains", "secant")) == 2
    assert ": in none of these pictures is a token skipped" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_without_skip_ffn_needs_layers():
    job = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(
        num_hidden_layers=4, skip_vision=SkipVisionConfig(skip_ffn=False))))  # fmt: skip
    args = SimpleNamespace(model_path="there", skip_layers=None)
    with pytest.raises(UserError, match="there: no layer of this checkpoint skips; say which, --skip-layers"):
        layers_of(job, args)
    args.skip_layers = "1-2"
    assert layers_of(job, args) == [1, 2]


def test_adapters_and_packed_weights_have_no_plain_norms():
    layer = tiny_walk().layers[0]
    layer.mlp.up_proj.lora_A = torch.nn.Identity()
    with pytest.raises(UserError, match="--gains spectral: up_proj is a Linear, not one plain matrix; merge adapters"):
        norms_of(layer, 1)


def test_a_dense_checkpoint_with_the_tokens_that_would_skip(dense_checkpoint, pictures, tmp_path):
    budget = ("--num-retained", "6", "--num-skipped", "3", "--gains", "secant", "--sigma", "2")
    assert cli.main(flags(dense_checkpoint, pictures, tmp_path, *budget)) == 0
    numbers = json.loads((tmp_path / "error-bound.json").read_text())
    assert numbers["skip_vision"]["num_skipped"] == 3
    assert list(numbers["gains"]) == ["secant"]
    assert numbers["measured"]["sigma"] == 2


@pytest.mark.parametrize("family", ["llava_hd", "cos"])
def test_a_dense_checkpoint_of_each_family(family, pictures, tmp_path):
    checkpoint = save_family(tmp_path / "model", family, skip=False)
    more = ("--num-images", "1", "--num-retained", "16", "--num-skipped", "4", "--gains", "secant")
    assert cli.main(flags(checkpoint, pictures, tmp_path / "out", *more)) == 0
    assert np.load(tmp_path / "out" / "error-bound.npz")["error"][0, -1] > 0


def test_a_fixed_budget_on_a_checkpoint_that_follows_the_content(pictures, tmp_path):
    auto = {"num_retained": "auto", "retained_mean": 4, "retained_threshold": 0.4}
    checkpoint = save_family(tmp_path / "model", "llava", **auto)
    more = ("--num-images", "1", "--num-retained", "6", "--gains", "secant")
    assert cli.main(flags(checkpoint, pictures, tmp_path / "out", *more)) == 0
    numbers = json.loads((tmp_path / "out" / "error-bound.json").read_text())
    assert (numbers["skip_vision"]["num_retained"], numbers["skip_vision"]["num_skipped"]) == (6, 5)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--gains", "secant,magic"), "--gains: unknown 'magic'; known: secant, spectral, jvp"),
        (("--power-iterations", "0"), "--power-iterations 0: must be 1 or more"),
        (("--sigma", "0"), "--sigma 0.0: must be above 0"),
        (("--skip-layers", "7"), "--skip-layers 7: no layer 7; this model has layers 0 to 1"),
        (("--skip-layers", "x"), "--skip-layers x: cannot read 'x'; write 'all', '8-31' or '0,4,8-15'"),
        (("--num-retained", "15", "--num-skipped", "9"), "num_retained 15 + num_skipped 9 is more than the 16"),
    ],
)
def test_bad_input(more, line, skip_checkpoint, pictures, tmp_path, capsys):
    assert cli.main(flags(skip_checkpoint, pictures, tmp_path, *more)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert line in said
