"""Packed rows against the same samples apart: loss, every gradient, hidden states; and each way to keep them apart."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_sv.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_sv.errors import UserError
from llava_sv.model.language_model import causal_lm, packed_attention
from llava_sv.model.language_model.packed_attention import VARLEN, check_keeps_apart, packing_implementation
from llava_sv.model.splice import splice
from llava_sv.model.token_groups import TokenGroups, TokenRole
from tests.parity.tiny import FAMILIES, family_images, family_model, ragged_batch, tiny_config

MARKS = ((3, 1, 5), (2, 2, 4), (6, 0, 3), (1, 1, 2), (4, 0, 1))
PACKS = [2, 1, 2]


def gradients_of(model, packs, family):
    ids, mask, labels, images = ragged_batch(MARKS)
    sizes = [(64, 64)] * images
    model.zero_grad()
    out = model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        images=family_images(family, images),
        image_sizes=sizes,
        packs=packs,
    )
    out.loss.backward()
    return out.loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa", VARLEN])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dense", [False, True], ids=["skipping", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_separate_samples(family, dense, checkpointing, attention):
    model = family_model(family, dense=dense).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    apart_loss, apart = gradients_of(model, None, family)
    model.set_attn_implementation(attention)
    loss, packed = gradients_of(model, PACKS, family)
    # the softmax of transformers' eager attention is float32 whatever the weights are
    rtol, atol = (1e-5, 1e-7) if attention == "eager" else (1e-9, 1e-11)
    assert loss == pytest.approx(apart_loss, rel=rtol / 10)
    assert packed.keys() == apart.keys()
    for name, gradient in apart.items():
        torch.testing.assert_close(packed[name], gradient, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("decoder", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", VARLEN])
def test_other_decoders(decoder, attention):
    model = family_model("llava", decoder=decoder).train()
    apart_loss, apart = gradients_of(model, None, "llava")
    model.set_attn_implementation(attention)
    loss, packed = gradients_of(model, PACKS, "llava")
    assert loss == pytest.approx(apart_loss, rel=1e-12)
    for name, gradient in apart.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_a_short_window_keeps_to_the_block_mask():
    config = tiny_config(decoder="mistral", sliding_window=12)
    assert packing_implementation("sdpa", config, 64) == "sdpa"
    assert packing_implementation("sdpa", config, 12) == VARLEN
    assert packing_implementation(None, tiny_config(), 4096) == VARLEN
    assert packing_implementation("flash_attention_2", tiny_config(), 4096) == "flash_attention_2"
    model = family_model("llava", decoder="mistral", sliding_window=12).train()
    apart_loss, apart = gradients_of(model, None, "llava")
    loss, packed = gradients_of(model, PACKS, "llava")
    assert loss == pytest.approx(apart_loss, rel=1e-12)
    torch.testing.assert_close(packed["lm_head.weight"], apart["lm_head.weight"], rtol=1e-9, atol=1e-11)
    model.set_attn_implementation(VARLEN)
    with pytest.raises(ValueError, match="longer than the window of 12"):
        gradients_of(model, PACKS, "llava")


def test_samples_that_saw_each_other_would_show(monkeypatch):
    """The test above can fail: the same rows, each as one sample, give another loss."""
    model = family_model("llava").train()
    apart_loss, _ = gradients_of(model, None, "llava")
    model.set_attn_implementation(VARLEN)
    right = packed_attention.packed_inputs
    monkeypatch.setattr(
        causal_lm,
        "packed_inputs",
        lambda positions, lengths, name: right(positions, [[sum(row)] for row in lengths], name),
    )
    loss, _ = gradients_of(model, PACKS, "llava")
    assert abs(loss - apart_loss) > 1e-3


def test_rows_by_hand():
    """Ids are their own embedding: [1, image, 2] and [3, 4] share a row, [5] has one of its own."""
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 2], [3, 4, 0], [5, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    labels = torch.tensor([[1, IGNORE_INDEX, 2], [3, 4, IGNORE_INDEX], [5, IGNORE_INDEX, IGNORE_INDEX]])
    image = TokenGroups(
        torch.tensor([[10.0], [11.0]]), torch.tensor([TokenRole.RETAINED, TokenRole.SKIPPED], dtype=torch.int8)
    )
    batch = splice(ids, [image], lambda x: x.float().unsqueeze(-1), mask, labels, packs=[2, 1])
    assert batch.inputs_embeds[..., 0].tolist() == [[1, 10, 11, 2, 3, 4], [5, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4]]
    assert batch.sample_lengths == [[4, 2], [1]]
    # 3 and 5 begin a sample: nothing before foretells them
    assert batch.labels.tolist() == [[-100, -100, -100, 2, -100, 4], [-100] * 6]
    assert batch.attention_mask.sum(1).tolist() == [6, 1]


def test_packs_that_do_not_add_up_and_padding_on_the_left_are_refused():
    ids = torch.tensor([[1], [2]])
    embed = lambda x: x.float().unsqueeze(-1)  # noqa: E731
    with pytest.raises(ValueError, match=r"packs of \[1\] samples, but 2"):
        splice(ids, [], embed, packs=[1])
    with pytest.raises(ValueError, match="padded on the right"):
        splice(ids, [], embed, packs=[2], padding_side="left")


def test_each_sample_is_cut_by_itself():
    ids = torch.arange(1, 13).view(2, 6)
    batch = splice(ids, [], lambda x: x.float().unsqueeze(-1), max_length=4, packs=[2])
    assert batch.inputs_embeds[0, :, 0].tolist() == [1, 2, 3, 4, 7, 8, 9, 10]


@pytest.mark.parametrize("name", [None, "eager", "sdpa", VARLEN])
def test_what_keeps_samples_apart_passes_the_trial(name):
    check_keeps_apart(name, torch.device("cpu"))


def test_an_attention_that_ignores_masks_is_refused():
    def careless(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("careless", careless)
    AttentionMaskInterface.register("careless", AttentionMaskInterface()["sdpa"])
    with pytest.raises(UserError, match="'careless' lets packed samples see each other"):
        check_keeps_apart("careless", torch.device("cpu"))


def test_without_packs_it_is_plain_sdpa():
    model = family_model("llava").eval()
    ids, mask, _, images = ragged_batch(MARKS)
    pictures = family_images("llava", images)
    expected = model(input_ids=ids, attention_mask=mask, images=pictures).logits
    model.set_attn_implementation(VARLEN)
    assert torch.equal(model(input_ids=ids, attention_mask=mask, images=pictures).logits, expected)
    once = dict(images=pictures[:1], max_new_tokens=4, do_sample=False)
    prompt = ids[:1][mask[:1]][None]
    answer = model.generate(inputs=prompt, **once)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(inputs=prompt, **once), answer)


def kernel_like_torchs(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """What torch's own kernel does, written plainly: [tokens, heads, width], causal by its window."""
    assert torch.equal(cu_q, cu_k)
    assert window_size == (-1, 0)
    assert max_q == max_k == int(cu_q.diff().max())
    out = []
    for start, end in itertools.pairwise(cu_q.tolist()):
        one = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        out.append(scaled_dot_product_attention(*one, is_causal=True, scale=scale)[0].transpose(0, 1))
    return torch.cat(out)


def older_kernel(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
    assert is_causal
    return kernel_like_torchs(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0))


@pytest.mark.parametrize("kernel", [kernel_like_torchs, older_kernel])
def test_a_kernel_for_unequal_lengths_is_called_as_it_wants(kernel):
    """Grouped-query heads, a scale of one's own, padding at a row's end."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 10, 8, generator=generator) for heads in (4, 2, 2))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=True)
    lengths = [[4, 3], [10]]
    expected, _ = packed_attention.sdpa_varlen_forward(module, q, k, v, None, scaling=0.3, sample_lengths=lengths)
    bounds = packed_attention._bounds(lengths, 10, q.device)
    found = packed_attention._by_kernel(kernel, q, k, v, bounds["cu_seq_lens_q"], bounds["max_length_q"], 0.3)
    torch.testing.assert_close(found[0, :7], expected[0, :7])
    torch.testing.assert_close(found[1], expected[1])
    assert not expected[0, 7:].any()


def test_the_kernel_serves_under_autocast_too(monkeypatch):
    """Rotary positions leave query and key in float32 beside a narrow value."""
    called = []

    def kernel(q, k, v, *args, **kwargs):
        called.append({x.dtype for x in (q, k, v)})
        return kernel_like_torchs(q, k, v, *args, **kwargs)

    kernel.__signature__ = inspect.signature(kernel_like_torchs)
    monkeypatch.setattr(packed_attention, "_kernel_for", lambda device: kernel)
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=True)
    bounds = packed_attention._bounds([[4, 5]], 9, q.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = packed_attention.sdpa_varlen_forward(
            module, q, k, v.bfloat16(), None, sample_lengths=[[4, 5]], **bounds
        )
    assert called == [{torch.bfloat16}]
    assert found.dtype == torch.bfloat16


def test_a_sample_that_was_cut_to_nothing():
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=True)
    found, expected = (
        packed_attention.sdpa_varlen_forward(module, q, k, v, None, sample_lengths=[lengths])[0]
        for lengths in ([4, 0, 5], [4, 5])
    )
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [VARLEN, "flash_attention_2", "flex_attention"])
def test_on_a_gpu_in_half_precision(attention):
    """bfloat16 kernels against float32 samples apart; the tolerance is bfloat16's 8 bits over three layers."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    device = torch.device("cuda")
    check_keeps_apart(attention, device)
    config = tiny_config(hidden_size=64)
    ids, mask, labels, images = (value.to(device) if torch.is_tensor(value) else value for value in ragged_batch(MARKS))
    pictures = [image.float().to(device) for image in family_images("llava", images)]
    from llava_sv.model.language_model.decoders import model_class

    torch.manual_seed(0)
    model = model_class(config)(config).to(device).train()
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels, images=pictures)
    expected = model(**batch).loss
    model = model.to(torch.bfloat16)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(**batch, packs=PACKS).loss.float(), expected, rtol=2e-2, atol=2e-2)
