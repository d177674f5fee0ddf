"""Dense `anyres` is LLaVA-NeXT: the same weights and pictures in `LlavaNextForConditionalGeneration` and here."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_sv.mm_utils import process_images
from llava_sv.model.checkpoint_io import load_projector
from llava_sv.tiling import default_pinpoints
from tests.data.samples import image_processor
from tests.parity.oracle import merge_by_loops
from tests.parity.test_stock import LLAMA_FIELDS, give_weights
from tests.parity.tiny import SIDE, tiny_model

IMAGE_ID = 100
SIZES = [(70, 64), (32, 32), (100, 40), (30, 90), (200, 50)]
ANYRES = {"mm_family": "llava_hd", "image_aspect_ratio": "anyres"}


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def next_twin(model) -> LlavaNextForConditionalGeneration:
    """transformers' LLaVA-NeXT with this model's weights."""
    ours = model.config
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig.from_dict(ours.vision_config),
        text_config=LlamaConfig(**{name: getattr(ours, name) for name in LLAMA_FIELDS}, max_position_embeddings=1024),
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=[[h, w] for w, h in default_pinpoints(SIDE)],
        vision_feature_layer=ours.mm_vision_select_layer,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = "sdpa"
    stock = LlavaNextForConditionalGeneration(config).double().eval()
    give_weights(model, stock)
    return stock


def test_pixels_are_llava_next_s():
    """The views of each picture, as its own image processor makes them."""
    plain = image_processor(SIDE)
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[h, w] for w, h in default_pinpoints(SIDE)],
    )
    ours = process_images(pictures(), plain, tiny_model(None, **ANYRES).config)
    for picture, views in zip(pictures(), ours, strict=True):
        expected = torch.as_tensor(np.array(theirs(picture, return_tensors="pt")["pixel_values"]))[0]
        assert views.shape == expected.shape
        torch.testing.assert_close(views.float(), expected.float(), rtol=1e-6, atol=1e-6)


def test_logits_equal_transformers_llava_next():
    model = tiny_model(None, **ANYRES)
    stock = next_twin(model)
    views = [v.double() for v in process_images(pictures(), image_processor(SIDE), model.config)]
    with torch.no_grad():
        for size, view in zip(SIZES, views, strict=True):
            ids = torch.tensor([[5, 6, -200, 7, 8, 9]])
            ours = model(input_ids=ids, images=[view], image_sizes=[size]).logits[0]
            count = model.config.visual_tokens_per_image(size)
            padded = torch.tensor([[5, 6, *[IMAGE_ID] * count, 7, 8, 9]])
            sizes = torch.tensor([size[::-1]])
            theirs = stock(input_ids=padded, pixel_values=view[None], image_sizes=sizes).logits[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_unpadded_tiles_are_the_source_of_local_tokens():
    """Skipping: the map's real part, row by row and without newlines, merged by loops."""
    model = tiny_model({"num_retained": 16, "num_skipped": 6}, **ANYRES)
    view = process_images(pictures()[2:3], image_processor(SIDE), model.config)[0].double()
    with torch.no_grad():
        (group,) = model.encode_images([view], [SIZES[2]])
        tokens = model.get_model().mm_projector.tokens_of(model.get_vision_tower()(view))
    # 100 x 40 in 3 x 1 tiles of 4 x 4 patches: 80 of 96 pixels, 10 of 12 columns, one cut off on each side
    rows = torch.cat([torch.cat([tile[4 * r : 4 * r + 4] for tile in tokens[1:]])[1:11] for r in range(4)])
    torch.testing.assert_close(group.tokens[17:23], merge_by_loops(rows, 6), rtol=1e-9, atol=1e-10)
    assert model.get_model().mm_projector.image_newline is None


def test_sizes_are_needed():
    model = tiny_model(None, **ANYRES)
    with pytest.raises(ValueError, match="'anyres' needs image_sizes"):
        model.encode_images([torch.zeros(3, 3, SIDE, SIDE, dtype=torch.float64)])
    with pytest.raises(ValueError, match="makes 3 x 1 tiles, but 2 were given"):
        model.encode_images([torch.zeros(3, 3, SIDE, SIDE, dtype=torch.float64)], [(100, 40)])


@pytest.mark.parametrize("skip", [None, {"num_retained": 16, "num_skipped": 6}])
@pytest.mark.parametrize("aspect", ["pad", "anyres"])
def test_projectors_cross_with_and_without_a_newline(tmp_path, skip, aspect):
    """From dense `anyres` to the others and back; what the file lacks starts fresh, what it has too much is left."""
    dense, other = tiny_model(None, **ANYRES), tiny_model(skip, 1, **{**ANYRES, "image_aspect_ratio": aspect})
    for source, target in ((dense, other), (other, dense)):
        weights = {f"model.mm_projector.{k}": v for k, v in source.get_model().mm_projector.state_dict().items()}
        torch.save(weights, tmp_path / "mm_projector.bin")
        load_projector(target, str(tmp_path))
        found = dict(target.get_model().mm_projector.named_parameters())
        for name, value in source.get_model().mm_projector.named_parameters():
            assert name not in found or torch.equal(found[name], value)


def test_a_checkpoint_without_a_newline_gets_a_fresh_one(tmp_path):
    plain = tiny_model(None, mm_family="llava_hd", hidden_size=48)
    plain.save_pretrained(tmp_path)
    config = copy.deepcopy(plain.config)
    config.image_aspect_ratio = "anyres"
    torch.manual_seed(3)
    model, info = type(plain).from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.mm_projector.image_newline"}
    newline = model.get_model().mm_projector.image_newline
    assert newline.std().item() == pytest.approx(48**-0.5, rel=0.3)
    tiny_model(None, **ANYRES).save_pretrained(tmp_path / "own")
    again = type(plain).from_pretrained(tmp_path / "own").get_model().mm_projector.image_newline
    assert torch.equal(again.double(), tiny_model(None, **ANYRES).get_model().mm_projector.image_newline)
