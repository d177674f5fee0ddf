"""What a recipe costs: FLOPs against the formula written out, hours, bytes against published sizes, checks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_sv.release.zoo_cost import (
    calibrated_mfu,
    checkpoint_bytes,
    checks,
    cost_of,
    hours,
    implied_share,
    kv_of_image,
    pictures,
    sample_of_text,
    saved_in_time,
    training_work,
)
from llava_sv.release.zoo_recipes import read_zoo

ZOO = read_zoo()
SKIP = ZOO.checkpoints["llava-sv-llama-3-8b-skip-100-156"]


def test_flops_of_one_row_by_hand():
    """SV-LLaVA 100/156: LLaMA-3-8B, C 4096, M 14336, 32 layers, 32 heads and 8 of keys and values, each 128 wide."""
    c, m, layers, vocabulary, e = 4096, 14336, 32, 128256, 1024
    kv = 8 * 128
    text = 200
    sequence = text + 100 + 1 + 156 + 1
    through_ffn = sequence - 156
    projections = layers * 2 * sequence * (c * c + c * kv + c * kv + c * c)
    attention = layers * 2 * (2 * sequence * sequence * c)
    ffn = layers * 2 * through_ffn * 3 * c * m
    head = 2 * (text / 2) * c * vocabulary
    language_model = 3 * projections + 3.5 * attention + 3 * ffn + 3 * head
    # CLIP ViT-L/14 at 336, frozen: 576 patches of 14 x 14 x 3, a CLS row, 23 of 24 blocks, an FFN of 4 E
    rows = 576 + 1
    encoder = 2 * 576 * 14 * 14 * 3 * e + 23 * 2 * rows * (4 * e * e + 2 * 4 * e * e) + 23 * 2 * 2 * rows * rows * e
    # two linear layers on every patch: the first needs no gradient of its input
    projector = 2 * (2 * 576 * e * c) + 3 * (2 * 576 * c * c)
    # 476 tokens: to their sum, and to the 156 that stay; without gradient
    merge = 2 * 476 * (156 + 1) * c
    summaries = 3 * (2 * 2 * (100 + 156) * c)
    with_image = language_model + encoder + projector + merge + summaries

    long = 1000
    of_text = layers * (
        3 * 2 * long * (2 * c * c + 2 * c * kv) + 3.5 * 2 * 2 * long * long * c + 3 * 2 * long * 3 * c * m
    )
    of_text += 3 * 2 * (long / 2) * c * vocabulary

    whole = (665298 - 40688) * with_image + 40688 * of_text
    assert training_work(ZOO, SKIP.sft).model == pytest.approx(whole, rel=1e-12)

    # again for the backward pass: the decoder's layers; a dense layer's last product is not needed again
    again = projections + attention + ffn
    again_of_text = layers * (2 * long * (2 * c * c + 2 * c * kv) + 4 * long * long * c + 2 * long * 2 * c * m)
    whole += (665298 - 40688) * again + 40688 * again_of_text
    assert training_work(ZOO, SKIP.sft).run == pytest.approx(whole, rel=1e-12)


def test_a_frozen_language_model_costs_less_than_one_that_trains():
    stage = ZOO.pretraining["llava-sv-llama-3-8b-pretrain"]
    as_sft = replace(stage, trains="sft")
    ratio = training_work(ZOO, stage).model / training_work(ZOO, as_sft).model
    assert 0.66 < ratio < 0.75, "two of three products, and attention's three and a half as before"


def test_work_grows_with_records_and_epochs():
    work = training_work(ZOO, SKIP.sft)
    assert training_work(ZOO, replace(SKIP.sft, epochs=3)).run == pytest.approx(3 * work.run)
    data = ZOO.data["llava-665k"]
    none_without = replace(ZOO, data={**ZOO.data, "llava-665k": replace(data, text_only=0)})
    more = training_work(none_without, SKIP.sft).model - work.model
    one = training_work(none_without, SKIP.sft).model / 665298
    assert more == pytest.approx(40688 * (one - sample_of_text(ZOO, SKIP.sft, 1000).model))


def test_longer_text_costs_more_and_saves_less():
    dense = ZOO.checkpoints["llava-sv-llama-3-8b-dense"]
    ratios = [cost_of(ZOO, SKIP, text_tokens=text)["flops_of_dense"] for text in (50, 200, 800)]
    assert ratios == sorted(ratios)
    assert cost_of(ZOO, dense)["flops_of_dense"] == 1


def test_hours():
    a100, h200 = ZOO.devices["a100-80gb"], ZOO.devices["h200"]
    assert hours(8 * 312e12 * 3600 * 0.4, a100, 0.4) == pytest.approx(1)
    assert hours(2e19, a100, 0.3) == pytest.approx(2 * hours(1e19, a100, 0.3))
    assert hours(1e19, a100, 0.3, devices=16) == pytest.approx(hours(1e19, a100, 0.3) / 2)
    assert hours(1e19, a100, 0.3) / hours(1e19, h200, 0.3) == pytest.approx(989 / 312)
    assert hours(1e19, a100, implied_share(1e19, a100, 5.0)) == pytest.approx(5.0)


def test_given_mfu_replaces_the_calibrated():
    assert cost_of(ZOO, SKIP)["mfu_from"] == "llava-sv-llama-3-8b-dense"
    a, b = cost_of(ZOO, SKIP, mfu=0.2), cost_of(ZOO, SKIP, mfu=0.4)
    assert a["hours"]["h200"]["sft"] == pytest.approx(2 * b["hours"]["h200"]["sft"])


def test_every_dense_row_takes_the_papers_hours_at_its_own_mfu():
    for name, one in ZOO.checkpoints.items():
        if one.dense is None and one.paper.hours:
            assert calibrated_mfu(ZOO, one)[1] == name
            assert cost_of(ZOO, one)["hours"]["a100-80gb"]["sft"] == pytest.approx(one.paper.hours)
    assert calibrated_mfu(ZOO, ZOO.checkpoints["llava-sv-vicuna-7b-dense"])[1] == "llava-sv-llama-3-8b-dense"


def test_hds_mean_picture():
    stage = ZOO.checkpoints["llava-sv-hd-llama-3-8b-dense"].sft
    shares = pictures(ZOO, stage)
    assert [setting.views for _, setting in shares] == [2, 3]
    assert sum(share for share, _ in shares) == pytest.approx(1)
    assert sum(share * setting.dense_tokens for share, setting in shares) == pytest.approx(1485)
    pretrain = ZOO.pretraining["llava-sv-hd-llama-3-8b-pretrain"]
    assert [(share, setting.views, setting.dense_tokens) for share, setting in pictures(ZOO, pretrain)] == [(1, 1, 576)]
    skip = ZOO.checkpoints["llava-sv-hd-llama-3-8b-skip-576-576"].sft
    few, many = (skip.budget(setting) for _, setting in shares)
    assert (few.skipped, few.merged_from) == (576, 0)
    assert (many.skipped, many.merged_from) == (576, 1152)


def test_sizes_are_those_of_the_published_models():
    """LLaMA-3-8B has 8,030,261,248 parameters, Vicuna-7B 6,738,415,616, CLIP ViT-L/14 at 336 (vision) 303,507,456."""
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    rows = ZOO.checkpoints
    assert checkpoint_bytes(rows["llava-sv-llama-3-8b-dense"]) == 2 * (8_030_261_248 + 303_507_456 + projector)
    assert checkpoint_bytes(rows["llava-sv-vicuna-7b-dense"]) == 2 * (6_738_415_616 + 303_507_456 + projector)
    assert checkpoint_bytes(SKIP) - checkpoint_bytes(rows["llava-sv-llama-3-8b-dense"]) == 2 * 2 * 4096


def test_what_a_picture_keeps():
    each = 2 * 32 * 8 * 128 * 2
    assert kv_of_image(SKIP) == {"dense": 576 * each, "prefill": 258 * each, "kept": 102 * each}
    hd = ZOO.checkpoints["llava-sv-hd-llama-3-8b-skip-576-576"]
    assert kv_of_image(hd) == {"dense": 2880 * each, "prefill": 1154 * each, "kept": 578 * each}
    vicuna = ZOO.checkpoints["llava-sv-vicuna-7b-dense"]
    assert kv_of_image(vicuna)["kept"] == 576 * 4 * each, "32 heads of keys and values, not 8"


def test_checks_against_hours_that_are_known():
    found = checks(ZOO)
    assert [row["name"] for row in found["dense"]] == [
        f"llava-sv-{kind}llama-3-8b-dense" for kind in ("", "hd-", "cos-")
    ]
    assert all(0.2 < row["mfu"] < row["hfu"] < 0.5 for row in found["dense"]), "what A100s can be expected to do"
    assert len(found["skipping"]) == 4
    for row in found["skipping"]:
        assert row["hours"] == pytest.approx(row["dense_hours"] * row["flops_of_dense"])
        assert saved_in_time(row["dense_hours"], row["flops_of_dense"], row["papers_share"]) == pytest.approx(
            row["paper_hours"]
        )
    first, second = found["skipping"][:2]
    assert first["hours_by_other"] == pytest.approx(10.2 * (1 - second["papers_share"] * (1 - first["flops_of_dense"])))
    million, nine = found["data"]
    assert million["hours"] == pytest.approx(9.8 * 1004627 / 665298)
    assert nine["hours"] == pytest.approx(9.8 * 8939353 / 665298 / 2), "on sixteen"
    assert [row["hours"] for row in found["reported"]] == [3.5, 10, 5.5, 20]
    assert all(abs(row["error"]) < 0.1 for row in found["reported"] if row["trains"] == "sft")
