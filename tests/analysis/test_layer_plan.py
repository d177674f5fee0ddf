"""`analyze layer-plan`: joint errors against single walks, the plan against all sets, the config it leaves."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from llava_sv import cli
from llava_sv.analysis.joint_error import outcomes
from llava_sv.analysis.layer_plan import Step, as_setting, flops_saved, greedy_path, ranked_path, tokens_of, within
from llava_sv.model.config import SkipVisionConfig
from tests.analysis.families import save_family
from tests.analysis.walks import skipping_forward, tiny_walk

SETS = [frozenset(one) for size in range(5) for one in itertools.combinations(range(4), size)]


def one_by_one(walk, skips):
    """(error, kl) of a set by the model's own forward."""
    full, y = skipping_forward(walk, []), skipping_forward(walk, sorted(skips))
    kept = walk.roles != 5
    error = float((full[kept] - y[kept]).norm() / full[kept].norm())
    p, q = walk.logits(y[-1]).log_softmax(-1), walk.logits(full[-1]).log_softmax(-1)
    return error, float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize("decoder", ["llama", "qwen3"])
def test_many_sets_at_once_are_each_set_alone(decoder):
    walk = tiny_walk(decoder, seed=4, layers=4)
    with torch.no_grad():
        for skips, outcome in zip(SETS, outcomes(walk, SETS), strict=True):
            error, kl = one_by_one(walk, skips)
            assert outcome.error == pytest.approx(error, rel=1e-3, abs=1e-6)
            assert outcome.kl == pytest.approx(kl, rel=1e-2, abs=1e-6)
    assert outcomes(walk, [frozenset()])[0].error == 0.0


def test_a_prompt_that_ends_with_a_skipped_token():
    walk = tiny_walk(seed=4, layers=4)
    walk.roles[-1] = 5
    with torch.no_grad():
        for skips in (frozenset({3}), frozenset({0, 3})):
            (outcome,), (error, kl) = outcomes(walk, [skips]), one_by_one(walk, skips)
            assert outcome.error == pytest.approx(error, rel=1e-3, abs=1e-6)
            assert outcome.kl == pytest.approx(kl, rel=1e-2)
            assert kl > 1e-4


def evaluator(walks):
    return lambda sets, what: np.array([[one.error for one in outcomes(walk, sets)] for walk in walks])


@pytest.mark.parametrize("search", [ranked_path, greedy_path])
@pytest.mark.parametrize("seed", range(4))
def test_the_plan_beside_all_sets(search, seed):
    """What is claimed: the joint error is the measured one, within budget, the longest on its path; and a path's
    first and last step are the best of all sets of their size. Between, other sets may do better."""
    evaluate = evaluator([tiny_walk(seed=seed, layers=4), tiny_walk(seed=seed + 10, layers=4)])
    truth = dict(zip(SETS, evaluate(SETS, "").mean(0)))
    candidates = list(range(4))
    path = search(evaluate, candidates, evaluate([frozenset({layer}) for layer in candidates], ""))
    sets = [frozenset(step.layer for step in path[: count + 1]) for count in range(4)]
    assert [step.mean for step in path] == pytest.approx([truth[one] for one in sets])
    for count in (1, 4):
        best = min(value for one, value in truth.items() if len(one) == count)
        assert path[count - 1].mean == pytest.approx(best)
    for budget in (0.0, *sorted(truth.values())):
        plan = within(path, budget)
        assert not plan or plan[-1].mean <= budget
        assert all(step.mean > budget for step in path[len(plan) :])
        assert len(plan) <= max(len(one) for one, value in truth.items() if value <= budget)
    if search is greedy_path:
        for count in (2, 3):
            grown = [truth[sets[count - 2] | {layer}] for layer in candidates if layer not in sets[count - 2]]
            assert path[count - 1].mean == pytest.approx(min(grown))


def test_the_last_layer_costs_the_answer_nothing():
    walk = tiny_walk(layers=4)
    last = outcomes(walk, [frozenset({3})])[0]
    assert last.error == 0.0
    assert last.kl == 0.0


def test_a_path_that_falls_again_is_used_to_its_end():
    path = [Step(layer, np.array([value])) for layer, value in enumerate((0.1, 0.4, 0.2, 0.9))]
    assert len(within(path, 0.25)) == 3
    assert within(path, 0.05) == []


@pytest.mark.parametrize(
    ("layers", "setting"),
    [([0, 1, 2, 3], "all"), ([3, 1, 0], "0-1,3"), ([2], "2"), ([2, 8, 9, 10], "2,8-10"), ([], [])],
)
def test_the_setting_is_what_the_config_reads(layers, setting):
    count = 4 if max(layers, default=0) < 4 else 12
    assert as_setting(layers, count) == setting
    assert SkipVisionConfig(skip_layers=setting).layers_that_skip(count) == sorted(layers)


def test_flops_saved_by_hand():
    walk = tiny_walk(layers=3)
    tokens = tokens_of(walk.roles)
    assert (tokens.text, tokens.retained, tokens.skipped, tokens.summaries) == (5, 4, 5, 2)
    length, ffn = 16, 6 * 16 * 24
    layer = 2 * length * 16 * (2 * 32 + 2 * 16) + 4 * length**2 * 32 + length * ffn
    total = 3 * layer + 2 * 16 * 40
    assert flops_saved(walk.model.config, tokens, 2) == pytest.approx(2 * 5 * ffn / total)


def flags(checkpoint, pictures, out, *more):
    return ["analyze", "layer-plan", "--model-path", str(checkpoint), "--image-folder", str(pictures),
            "--device", "cpu", "--output", str(out), *more]  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--search", "greedy", "--measure", "kl")])
def test_the_command_and_the_config_it_leaves(more, skip_checkpoint, pictures, tmp_path, capsys):
    before = (skip_checkpoint / "config.json").read_bytes()
    target = tmp_path / "config"
    given = ("--budget", "0.0001", "--write-config", str(target), *more)
    assert cli.main(flags(skip_checkpoint, pictures, tmp_path, *given)) == 0
    numbers = json.loads((tmp_path / "layer-plan.json").read_text())
    assert numbers["skip_layers"] == "1"
    assert numbers["measured_mean"] <= 0.0001
    assert 'skip_layers: "1"  (1 of 2 layers; to train with it: --sv_skip_layers 1)' in capsys.readouterr().out
    old, new = json.loads(before), json.loads((target / "config.json").read_text())
    assert new["skip_vision"].pop("skip_layers") == "1"
    assert old["skip_vision"].pop("skip_layers") == "all"
    assert new == old
    assert (skip_checkpoint / "config.json").read_bytes() == before
    arrays = np.load(tmp_path / "layer-plan.npz")
    assert arrays["together"].shape == (4, 2)
    assert arrays["added"].tolist() == [1, 0]


def test_the_config_it_leaves_skips_where_the_checkpoint_did_not(pictures, tmp_path):
    checkpoint = save_family(tmp_path / "model", "llava", skip_ffn=False)
    given = ("--budget", "0.0001", "--num-images", "1", "--write-config", str(tmp_path / "config"))
    assert cli.main(flags(checkpoint, pictures, tmp_path, *given)) == 0
    skip = SkipVisionConfig.from_dict(json.loads((tmp_path / "config" / "config.json").read_text())["skip_vision"])
    assert skip.layers_that_skip(2) == [1]


def test_a_budget_that_nothing_fits(skip_checkpoint, pictures, tmp_path, capsys):
    given = ("--budget", "0", "--candidates", "0")
    assert cli.main(flags(skip_checkpoint, pictures, tmp_path, *given)) == 0
    assert "No layer fits a budget of 0 of the hidden states' length: the least" in capsys.readouterr().out
    assert json.loads((tmp_path / "layer-plan.json").read_text())["skip_layers"] == []


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--budget", "-1"), "--budget -1.0: must be a number of 0 or more"),
        (("--budget", "nan"), "--budget nan: must be a number of 0 or more"),
        (("--budget", "1", "--candidates", "5-9"), "--candidates 5-9: no layer 5; this model has layers 0 to 1"),
    ],
)
def test_bad_input(more, line, skip_checkpoint, pictures, tmp_path, capsys):
    assert cli.main(flags(skip_checkpoint, pictures, tmp_path, *more)) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: {line}"


def test_a_config_is_written_neither_over_the_checkpoint_nor_over_another(skip_checkpoint, pictures, tmp_path, capsys):
    def said(target):
        given = ("--budget", "1", "--write-config", str(target))
        assert cli.main(flags(skip_checkpoint, pictures, tmp_path / "out", *given)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "is the checkpoint itself, which stays as it is; name another folder" in said(skip_checkpoint)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    assert "config.json exists; name another folder, or --overwrite" in said(tmp_path / "there")
    assert not (tmp_path / "out" / "layer-plan.json").exists()


def test_a_fixed_budget_for_a_checkpoint_whose_budget_follows_the_content(tmp_path, pictures):
    auto = {"num_retained": "auto", "retained_mean": 4, "retained_threshold": 0.5}
    checkpoint = save_family(tmp_path / "model", "llava", **auto)
    given = ("--budget", "1", "--num-retained", "3")
    assert cli.main(flags(checkpoint, pictures, tmp_path, *given)) == 0
    numbers = json.loads((tmp_path / "layer-plan.json").read_text())
    assert (numbers["skip_vision"]["num_retained"], numbers["tokens"]["retained"]) == (3, 3)
