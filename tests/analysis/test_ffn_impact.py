"""`analyze ffn-impact` against the layers run by hand: attention head by head, FFN written out, one token at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llava_sv import cli
from llava_sv.analysis import ffn_impact
from llava_sv.model.language_model.decoders import DECODERS
from llava_sv.model.language_model.skip_ffn import rows_through_ffn
from llava_sv.model.token_groups import TokenRole
from tests.analysis.families import save_family
from tests.analysis.test_common import job_of
from tests.parity.oracle import attention
from tests.parity.tiny import ragged_batch, tiny_images, tiny_model

CASES = {
    "llava": ("llava", {}),
    "llava dense": ("llava", {"skip": False}),
    "llava, one layer skips, last visual": ("llava", {"skip_layers": [1], "last_visual_ffn": True}),
    "llava_hd": ("llava_hd", {}),
    "cos": ("cos", {}),
    "cos dense": ("cos", {"skip": False}),
}


def by_hand(job):
    """{(measure, role, layer): [values]} of all pictures."""
    model, found = job.model, {}
    skip = model.config.skip_vision
    skipping = skip.layers_that_skip(model.config.num_hidden_layers) if skip else []
    for sample in job.samples("by hand"):
        batch = job.splice(sample)
        hidden, roles = batch.inputs_embeds[0], batch.token_roles[0].tolist()
        cos, sin = model.model.rotary_emb(hidden.unsqueeze(0), batch.position_ids)
        visible = torch.ones(len(roles), len(roles), dtype=torch.bool).tril()
        for index, layer in enumerate(model.model.layers):
            hidden = hidden + attention(layer, layer.input_layernorm(hidden), (cos[0], sin[0]), visible, model.config)
            rows = []
            for role, h in zip(roles, hidden):
                normed = layer.post_attention_layernorm(h)
                f = layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
                a, b = h.double(), (h + f).double()
                length = float((a**2).sum()) ** 0.5
                values = {
                    "update": float((f.double() ** 2).sum()) ** 0.5 / length,
                    "growth": float((b**2).sum()) ** 0.5 / length,
                    "turn": 1 - float(a @ b) / length / float((b**2).sum()) ** 0.5,
                }
                for name, value in values.items():
                    found.setdefault((name, role, index), []).append(value)
                rows.append(h if index in skipping and role == TokenRole.SKIPPED else h + f)
            hidden = torch.stack(rows)
    return found


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_layer_and_role_by_hand(case, tmp_path, pictures):
    family, options = CASES[case]
    checkpoint = save_family(tmp_path / "model", family, **options)
    flags = ["--model-path", str(checkpoint), "--image-folder", str(pictures), "--device", "cpu", "--num-images", "3"]
    assert cli.main(["analyze", "ffn-impact", *flags, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "ffn-impact.json").read_text())
    arrays = np.load(tmp_path / "out" / "ffn-impact.npz")
    expected = by_hand(job_of(checkpoint, pictures, "--num-images", "3"))
    seen = set()
    for name, groups in report["measures"].items():
        for group, layers in groups.items():
            roles = ffn_impact.GROUPS[group]
            for index, one in enumerate(layers):
                values = [v for role in roles for v in expected.get((name, int(role), index), [])]
                seen |= {(name, int(role), index) for role in roles}
                assert one["count"] == len(values)
                assert one["mean"] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6)
                middle = np.quantile(values, 0.5, method="inverted_cdf"), np.quantile(values, 0.5, method="higher")
                assert 0.97 * middle[0] - 1e-6 <= one["q50"] <= 1.03 * middle[1] + 1e-6
                row = list(ffn_impact.GROUPS).index(group)
                assert arrays[f"{name}_mean"][row, index] == pytest.approx(one["mean"])
                assert arrays[f"{name}_bins"][row, index].sum() == one["count"] == arrays["count"][row, index]
    assert {key for key in expected if key[1] != TokenRole.PAD} <= seen
    has_skipped = any(role == TokenRole.SKIPPED for _, role, _ in expected)
    assert has_skipped == ("skipped" in report["measures"]["update"]) == (options.get("skip", True))
    assert report["skipping_layers"] == ([] if not has_skipped else [1] if "skip_layers" in options else [0, 1])
    assert (tmp_path / "out" / "ffn-impact.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_the_forward_goes_on_as_without_it(skip_checkpoint, pictures):
    job = job_of(skip_checkpoint, pictures, "--num-images", "1")
    batch = job.splice(next(job.samples("one")))
    given = {"inputs_embeds": batch.inputs_embeds, "position_ids": batch.position_ids, "use_cache": False}
    given |= {"attention_mask": batch.attention_mask, "token_roles": batch.token_roles}
    plain = job.model(**given).logits
    layers = []
    with ffn_impact.watching(job.model.model.layers, lambda layer, h, f: layers.append((layer, len(h), len(f)))):
        watched = job.model(**given).logits
    length = batch.token_roles.shape[1]
    assert layers == [(0, length, length), (1, length, length)]
    assert torch.equal(plain, watched)
    job.model(**given)
    assert len(layers) == 2  # nothing is left behind in the model


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_what_is_computed_on_the_side_is_what_every_decoder_computes(decoder):
    model = tiny_model(decoder=decoder)
    ids, mask, _, images = ragged_batch(((3, 1, 5),))
    batch = model.prepare_inputs_labels_for_multimodal(ids, mask, images=tiny_images(images))
    seen = []
    with ffn_impact.watching(model.model.layers, lambda layer, h, f: seen.append((h, f))):
        out = model.model(
            inputs_embeds=batch.inputs_embeds,
            position_ids=batch.position_ids,
            ffn_rows=rows_through_ffn(batch.token_roles),
            output_hidden_states=True,
        )
    passes = (batch.token_roles[0] != TokenRole.SKIPPED).unsqueeze(-1)
    assert not bool(passes.all())
    after = [h + f * passes for h, f in seen]
    after[-1] = model.model.norm(after[-1])
    for given, computed in zip(out.hidden_states[1:], after, strict=True):
        torch.testing.assert_close(given[0][passes[:, 0]], computed[passes[:, 0]], rtol=1e-9, atol=1e-10)


def test_outputs_are_kept_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "ffn-impact.json").touch()
    flags = ["--model-path", "absent", "--image-folder", "absent", "--output", str(tmp_path)]
    assert cli.main(["analyze", "ffn-impact", *flags]) == 2
    assert "ffn-impact.json exists; name another folder, or --overwrite" in capsys.readouterr().err
    assert cli.main(["analyze", "ffn-impact", *flags, "--overwrite"]) == 2
    assert "error: --image-folder absent: no such folder" in capsys.readouterr().err
