"""Prompts and pictures: ids against LLaVA's rule done by hand, pixels against numpy, files with all kinds of damage."""

import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.errors import UserError
from llava_sv.mm_utils import (
    ImageError,
    clip_image_processor_class,
    encode_prompt,
    expand2square,
    get_model_name_from_path,
    load_image,
    load_image_processor,
    mean_color,
    process_images,
    tokenizer_image_token,
)
from tests.tokenizers_util import chatml_tokenizer, llama_2_tokenizer, llama_3_tokenizer

TOKENIZERS = {
    "llama_3": llama_3_tokenizer,
    "llama_3_without_bos": lambda: llama_3_tokenizer(adds_bos=False),
    "llama_2": llama_2_tokenizer,
    "chatml": chatml_tokenizer,
}


def _processor(side: int = 28):
    return clip_image_processor_class()(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _config(ratio):
    return types.SimpleNamespace(image_aspect_ratio=ratio)


@pytest.mark.parametrize("text", ["no image", "<image>\nWhat?", "What is <image> and <image>", "<image><image>", ""])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_follow_llavas_rule(name, text):
    tokenizer = TOKENIZERS[name]()
    bos = [tokenizer.bos_token_id] if name in ("llama_3", "llama_2") else []
    expected = list(bos)
    for index, piece in enumerate(text.split("<image>")):
        expected += [IMAGE_TOKEN_INDEX] * (index > 0)
        expected += tokenizer(piece)["input_ids"][len(bos) :] if piece else []
    assert tokenizer_image_token(text, tokenizer) == expected
    tensor = tokenizer_image_token(text, tokenizer, return_tensors="pt")
    assert tensor.dtype == torch.long
    assert tensor.tolist() == expected


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_bos_written_in_the_text_is_not_doubled(adds_bos):
    tokenizer = llama_3_tokenizer(adds_bos=adds_bos)
    ids = tokenizer_image_token("<|begin_of_text|>Hello <image>", tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_offsets_cover_the_text_with_its_images(name):
    text = "What colour is <image> the réd square<image>"
    encoded = encode_prompt(text, TOKENIZERS[name]())
    assert len(encoded.offsets) == len(encoded.input_ids)
    covered = np.zeros(len(text), bool)
    for token, (start, end) in zip(encoded.input_ids, encoded.offsets):
        covered[start:end] = True
        assert (text[start:end] == "<image>") == (token == IMAGE_TOKEN_INDEX)
    assert covered.all()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_offsets_are_those_of_the_tokenizers_own_call(name):
    """Whatever was asked of the tokenizer before."""
    text, tokenizer = "USER: What colour\u00e9 </s><|eot_id|> is it? \U0001f600", TOKENIZERS[name]()
    wanted = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for before in ({}, {"truncation": True, "max_length": 3}, {"padding": "max_length", "max_length": 90}):
        tokenizer(text, **before)
        found = encode_prompt(text, tokenizer)
        skip = len(found.input_ids) - len(wanted["input_ids"])  # a BOS
        assert found.input_ids[skip:] == wanted["input_ids"]
        assert found.offsets[skip:] == wanted["offset_mapping"]


def test_a_tokenizer_of_ones_own_is_called_itself():
    class Own(PreTrainedTokenizerFast):
        def __call__(self, text, **kwargs):
            return super().__call__(text.upper(), **kwargs)

    own = Own(tokenizer_object=llama_3_tokenizer().backend_tokenizer, bos_token="<|begin_of_text|>")
    assert encode_prompt("red", own).input_ids[1:] == llama_3_tokenizer()("RED", add_special_tokens=False)["input_ids"]


def test_special_tokens_are_split_where_the_tokenizer_splits_them():
    tokenizer = llama_3_tokenizer()
    tokenizer.split_special_tokens = True
    wanted = tokenizer("a<|eot_id|>b", add_special_tokens=False)["input_ids"]
    assert encode_prompt("a<|eot_id|>b", tokenizer).input_ids[1:] == wanted
    assert len(wanted) > 3


def test_unknown_tensor_kind_is_refused():
    with pytest.raises(ValueError, match="'np'"):
        tokenizer_image_token("a", chatml_tokenizer(), return_tensors="np")


@pytest.mark.parametrize(("size", "at"), [((6, 2), (0, 2)), ((2, 5), (1, 0)), ((3, 3), (0, 0))])
def test_expand2square_centres_on_the_colour(size, at):
    image = Image.new("RGB", size, (255, 0, 0))
    square = np.asarray(expand2square(image, (1, 2, 3)))
    side = max(size)
    expected = np.full((side, side, 3), (1, 2, 3), np.uint8)
    expected[at[1] : at[1] + size[1], at[0] : at[0] + size[0]] = (255, 0, 0)
    assert (square == expected).all()


def test_pad_normalises_as_written_and_its_border_is_nearly_zero():
    processor = _processor(28)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (14, 28, 3), np.uint8))
    pixels = process_images([image], processor, _config("pad"))
    assert pixels.shape == (1, 3, 28, 28)
    expected = (np.asarray(image) / 255 - np.array(processor.image_mean)) / np.array(processor.image_std)
    assert np.allclose(pixels[0, :, 7:21].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert pixels[0, :, :7].abs().max() < 0.02


@pytest.mark.parametrize("ratio", ["square", "", None])
def test_square_is_the_processors_own_resize_and_crop(ratio):
    processor = _processor(28)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), np.uint8))
    pixels = process_images([image], processor, _config(ratio))
    middle = (np.asarray(image)[:, 14:42] / 255 - np.array(processor.image_mean)) / np.array(processor.image_std)
    assert np.allclose(pixels[0].permute(1, 2, 0).numpy(), middle, atol=1e-5)


def test_a_config_without_the_field_means_square():
    image = Image.new("RGB", (40, 20), (200, 10, 10))
    without = process_images([image], _processor(), types.SimpleNamespace())
    assert torch.equal(without, process_images([image], _processor(), _config("square")))


def test_unknown_aspect_ratio_lists_the_known():
    with pytest.raises(UserError, match="image_aspect_ratio: unknown 'wide' for family llava; known: pad, square"):
        process_images([Image.new("RGB", (4, 4))], _processor(), _config("wide"))


def test_unequal_shapes_stay_a_list():
    class Native:
        image_mean = (0.5, 0.5, 0.5)

        def __call__(self, images, return_tensors):
            return {"pixel_values": torch.zeros(1, 3, images.size[1], images.size[0])}

    pixels = process_images([Image.new("RGB", (4, 6)), Image.new("RGB", (5, 5))], Native(), _config("square"))
    assert [tuple(pixel.shape) for pixel in pixels] == [(3, 6, 4), (3, 5, 5)]


def test_mean_color():
    assert mean_color(types.SimpleNamespace(image_mean=(0.0, 0.5, 1.0))) == (0, 127, 255)


def test_image_is_turned_upright_and_made_rgb(tmp_path):
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (2, 4)
    Image.new("P", (3, 3)).save(tmp_path / "palette.png")
    Image.new("L", (3, 3)).save(tmp_path / "grey.png")
    Image.new("RGBA", (3, 3)).save(tmp_path / "alpha.png")
    assert {load_image(tmp_path / name).mode for name in ("palette.png", "grey.png", "alpha.png")} == {"RGB"}


def test_missing_and_corrupt_images_are_told_apart(tmp_path):
    with pytest.raises(ImageError, match=r"no such image file: .*absent\.jpg") as caught:
        load_image(tmp_path / "absent.jpg")
    assert caught.value.kind == "missing"
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.jpg", "torn.png", "empty.png"):
        with pytest.raises(ImageError, match=rf"{name} cannot be read") as caught:
            load_image(tmp_path / name)
        assert caught.value.kind == "corrupt"


def test_image_processor_is_the_pil_one_and_round_trips(tmp_path):
    _processor(20).save_pretrained(tmp_path)
    loaded = load_image_processor(str(tmp_path))
    assert type(loaded) is clip_image_processor_class()
    assert loaded.crop_size["width"] == 20


def test_absent_image_processor_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        load_image_processor(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/b/llava-7b/", "llava-7b"), ("out/llava-7b/checkpoint-20", "llava-7b_checkpoint-20"), ("llava", "llava")],
)
def test_model_name(path, name):
    assert get_model_name_from_path(path) == name
