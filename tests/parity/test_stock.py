"""Skipping off, the model is transformers' own: the same weights in `LlavaForConditionalGeneration` and here."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from transformers import LlavaConfig as StockConfig

from tests.parity.tiny import ragged_batch, tiny_images, tiny_model

IMAGE_ID = 100
LLAMA_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
]


def give_weights(model, stock) -> None:
    """Load `model`'s weights into transformers' LLaVA or LLaVA-NeXT, whose names are others."""
    renamed = {}
    for key, value in model.state_dict().items():
        key = key.replace("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
        key = key.replace("model.mm_projector.0.", "model.multi_modal_projector.linear_1.")
        key = key.replace("model.mm_projector.2.", "model.multi_modal_projector.linear_2.")
        key = key.replace("model.mm_projector.image_newline", "model.image_newline")
        if key.startswith(("model.layers", "model.norm", "model.embed_tokens")):
            key = key.replace("model.", "model.language_model.", 1)
        renamed[key] = value
    # transformers' CLIP inside LLaVA may hold its parts one level deeper
    wanted = set(stock.state_dict())
    if "model.vision_tower.embeddings.class_embedding" not in wanted:
        renamed = {k.replace("model.vision_tower.", "model.vision_tower.vision_model."): v for k, v in renamed.items()}
    stock.load_state_dict(renamed)


def stock_twin(model) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with this model's weights."""
    ours = model.config
    text = LlamaConfig(**{name: getattr(ours, name) for name in LLAMA_FIELDS}, max_position_embeddings=256)
    config = StockConfig(
        vision_config=CLIPVisionConfig.from_dict(ours.vision_config),
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_layer=ours.mm_vision_select_layer,
        vision_feature_select_strategy="default",
        pad_token_id=0,
        eos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    stock = LlavaForConditionalGeneration(config).double().eval()
    give_weights(model, stock)
    return stock


def as_stock_inputs(ids, mask):
    """Each mark as the 16 placeholder ids that transformers wants, left-padded."""
    rows = []
    for row in range(ids.shape[0]):
        rows.append([t for i in ids[row][mask[row]].tolist() for t in ([IMAGE_ID] * 16 if i == -200 else [i])])
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return padded, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])


@pytest.mark.parametrize("skip", [None, {"num_retained": 4, "num_skipped": 5, "skip_ffn": False}])
def test_text_alone_equals_stock_llama(skip):
    model = tiny_model(skip)
    llama = LlamaForCausalLM(model.config).double().eval()
    llama.load_state_dict({k: v for k, v in model.state_dict().items() if "vision" not in k and "mm_" not in k})
    ids = torch.randint(1, 99, (2, 12))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)


def test_logits_equal_transformers_llava():
    model = tiny_model(None)
    stock = stock_twin(model)
    ids, mask, _, count = ragged_batch()
    images = tiny_images(count)
    batch = model.prepare_inputs_labels_for_multimodal(ids, mask, images=images, padding_side="left")
    with torch.no_grad():
        ours = model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            token_roles=batch.token_roles,
        ).logits
        padded, attention = as_stock_inputs(ids, mask)
        theirs = stock(
            input_ids=padded, attention_mask=attention, pixel_values=images, position_ids=batch.position_ids
        ).logits
    assert batch.attention_mask.long().tolist() == attention.tolist()
    real = attention.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-9, atol=1e-10)


def test_greedy_text_equals_transformers_llava():
    model = tiny_model(None)
    stock = stock_twin(model)
    ids, mask, _, count = ragged_batch()
    images = tiny_images(count)
    ours = model.generate(ids, attention_mask=mask, images=images, max_new_tokens=10, do_sample=False)
    padded, attention = as_stock_inputs(ids, mask)
    theirs = stock.generate(
        input_ids=padded, attention_mask=attention, pixel_values=images, max_new_tokens=10, do_sample=False
    )
    assert ours.tolist() == theirs[:, padded.shape[1] :].tolist()


@pytest.mark.parametrize("skip", [None, {"num_retained": 4, "num_skipped": 5}])
def test_sdpa_equals_eager(skip):
    """float32; eager takes its softmax in float32 whatever the precision."""
    sdpa = tiny_model(skip).float()
    eager = tiny_model(skip).float()
    eager.set_attn_implementation("eager")
    ids, mask, labels, count = ragged_batch()
    images = tiny_images(count).float()
    with torch.no_grad():
        a = sdpa(input_ids=ids, attention_mask=mask, labels=labels, images=images)
        b = eager(input_ids=ids, attention_mask=mask, labels=labels, images=images)
    assert sdpa.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"
    real = sdpa.prepare_inputs_labels_for_multimodal(ids, mask, images=images).attention_mask
    torch.testing.assert_close(a.logits[real], b.logits[real], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)
