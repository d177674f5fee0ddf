"""`LlavaSvProcessor` against `conversation.render` and `generation.make_batch`, which chat and evaluation use."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import threading
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
    pipeline,
)
from transformers.utils.chat_template_utils import render_jinja_template

from llava_sv import pictures as pictures_module
from llava_sv.chat_template import jinja_of
from llava_sv.conversation import CONV_TEMPLATES, get_template, render
from llava_sv.errors import UserError
from llava_sv.generation import Assistant, generate, load_for_inference, make_batch, user_turn
from llava_sv.mm_utils import load_image
from llava_sv.model.language_model.decoders import DECODERS
from llava_sv.pictures import as_picture
from llava_sv.processing import LlavaSvProcessor
from tests.checkpoints import SKIP, save_checkpoint
from tests.data.test_preprocess import KINDS, PAIRS

IMAGE = {"type": "image"}


def words(text):
    return {"type": "text", "text": text}


def gpt(value):
    return {"from": "gpt", "value": value}


def human(value):
    return {"from": "human", "value": value}


def said(role, *parts):
    return {"role": role, "content": list(parts)}


CONVERSATIONS = {
    "a picture and a question": ([user_turn("What is it?", 1)], [said("user", IMAGE, words("What is it?"))]),
    "two pictures": ([user_turn("Which?", 2)], [said("user", IMAGE, IMAGE, words("Which?"))]),
    "a picture behind the words": ([human("Look:\n<image>")], [said("user", words("Look:"), IMAGE)]),
    "words around a picture": (
        [human("Is it\n<image>\nor not? Say.")],
        [said("user", words("Is it"), IMAGE, words("or not? "), words("Say."))],
    ),
    "words alone": ([human("  Hi\n\n you ")], [{"role": "user", "content": "  Hi\n\n you "}]),
    "nothing but a picture": ([human("<image>")], [said("user", IMAGE)]),
    "three turns, a later picture": (
        [human("Hello"), gpt(" Hi 日本 😀.\n"), user_turn("And?", 1), gpt("Two."), human("Sure?")],
        [
            {"role": "user", "content": "Hello"},
            said("assistant", words(" Hi 日本 😀.\n")),
            said("user", IMAGE, words("And?")),
            {"role": "assistant", "content": "Two."},
            said("user", words("Sure?")),
        ],
    ),
    "<image> in words": ([user_turn("What is <image>?", 1)], [said("user", IMAGE, words("What is <image>?"))]),
    "quotes and braces": ([human('{{ \'"x" {% \\n }}')], [said("user", words('{{ \'"x" {% \\n }}'))]),
}
SYSTEMS = {"none said": None, "said": " Be brief. ", "empty": ""}


def with_system(messages, system):
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def jinja(template, messages, prompts):
    (text,), _ = render_jinja_template([messages], chat_template=jinja_of(template), add_generation_prompt=prompts)
    return text


# -- the text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("name", CONV_TEMPLATES)
def test_jinja_writes_what_render_writes(name, system):
    template = get_template(name)
    for turns, messages in CONVERSATIONS.values():
        expected = render(template, turns, add_generation_prompt=True, system=system).text
        assert jinja(template, with_system(messages, system), True) == expected
        answered = render(template, [*turns, gpt("Yes. ")], system=system).text
        assert jinja(template, with_system([*messages, said("assistant", words("Yes. "))], system), False) == answered


@pytest.mark.parametrize("name", CONV_TEMPLATES)
def test_jinja_alone_breaks_up_the_templates_markers(name):
    template = get_template(name)
    for mark in template.special_tokens:
        turns = [human(f"a {mark}{mark} b"), gpt(mark), human("c")]
        messages = [said("user", words(f"a {mark}{mark} b")), said("assistant", words(mark)), said("user", words("c"))]
        system = f"Be {mark}."
        expected = render(template, turns, add_generation_prompt=True, system=system).text
        assert jinja(template, with_system(messages, system), True) == expected
        # a marker in two parts is one when they stand side by side
        halves = [said("user", words(mark[:2]), words(mark[2:]))]
        assert jinja(template, halves, True) == render(template, [human(mark)], add_generation_prompt=True).text


def test_what_jinja_refuses_without_this_package():
    from jinja2.exceptions import TemplateError

    template = get_template("chatml")
    for messages, prompts, why in (
        ([{"role": "assistant", "content": "a"}], False, "turns alternate"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], True, "ends with the user's"),
        ([said("user", {"type": "video"})], True, "content of type video"),
    ):
        with pytest.raises(TemplateError, match=why):
            jinja(template, messages, prompts)


def test_the_same_template_gives_the_same_jinja():
    assert jinja_of(get_template("v1")) == jinja_of(get_template("vicuna_v1"))
    assert len({jinja_of(template) for template in CONV_TEMPLATES.values()}) == len(set(CONV_TEMPLATES.values()))


# -- ids and pixels ----------------------------------------------------------------------------------------------------

FAMILIES = {
    "llava": dict(mm_family="llava", image_aspect_ratio="pad"),
    "llava, cropped": dict(mm_family="llava", image_aspect_ratio="square"),
    "hd": dict(mm_family="llava_hd", image_aspect_ratio="pad", hd_max_tiles=4),
    "hd, six tiles, stretched": dict(mm_family="llava_hd", image_aspect_ratio="square", hd_max_tiles=6),
    "hd, fixed": dict(mm_family="llava_hd", image_aspect_ratio="pad", hd_fixed_grid="2x1"),
    "hd, anyres": dict(
        mm_family="llava_hd", image_aspect_ratio="anyres", image_grid_pinpoints=[[32, 64], [64, 32], [96, 32]]
    ),
    "cos": dict(mm_family="cos", image_aspect_ratio="pad"),
}
DEFAULTS = dict(hd_max_tiles=4, hd_fixed_grid=None, image_grid_pinpoints=None)


def image_processors():
    return {
        "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        "siglip": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    }


class StubModel:
    """What `make_batch` asks of a model."""

    def __init__(self, settings):
        self.config = types.SimpleNamespace(**{**DEFAULTS, **settings})

    def get_model(self):
        return types.SimpleNamespace(embed_tokens=torch.nn.Embedding(1, 1))


def pictures(count):
    rng = np.random.default_rng(0)
    sizes = [(70, 31), (32, 32), (20, 90), (64, 64), (33, 150)]
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in (sizes * count)[:count]
    ]


def with_pictures(messages, stock):
    """Messages whose image parts hold the next pictures of `stock`, and these pictures."""
    used, filled = [], []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image":
                    used.append(stock.pop(0))
                    part = {"type": "image", "image": used[-1]}
                parts.append(part)
            content = parts
        filled.append({**message, "content": content})
    return filled, used


def assert_same(inputs, batch):
    assert torch.equal(inputs["input_ids"], batch.input_ids)
    assert torch.equal(inputs["attention_mask"].bool(), batch.attention_mask)
    assert inputs.get("image_sizes") == batch.image_sizes
    assert (batch.images is None) == ("images" not in inputs)
    for ours, expected in zip(inputs.get("images", []), batch.images or [], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("system", ["none said", "said"])
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_ids_are_make_batchs_for_every_template_and_tokenizer(kind, name, system):
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>", "[PAD]"]})
    processor = LlavaSvProcessor(image_processors()["clip"], tokenizer, conv_template=name)
    assistant = Assistant(tokenizer, StubModel(FAMILIES["llava"]), image_processors()["clip"], get_template(name))
    special = "a <|reserved_special_token_0|>[PAD] b " + "".join(tokenizer.all_special_tokens)
    conversations = {**CONVERSATIONS, "special": ([user_turn(special, 1)], [said("user", IMAGE, words(special))])}
    stock, filled, groups = pictures(20), [], []
    for _, messages in conversations.values():
        messages, used = with_pictures(with_system(messages, SYSTEMS[system]), stock)
        filled.append(messages)
        groups.append(used)
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = processor.apply_chat_template(filled, **options)
    batch = make_batch(assistant, [turns for turns, _ in conversations.values()], groups, system=SYSTEMS[system])
    assert_same(inputs, batch)
    assert (batch.input_ids == -200).sum() == len(batch.images)
    # one at a time, and by the prompt's text
    turns, _ = conversations["special"]
    alone = make_batch(assistant, [turns], groups[-1:], system=SYSTEMS[system])
    assert_same(processor.apply_chat_template(filled[-1], **options), alone)
    text = processor.apply_chat_template(filled[-1], add_generation_prompt=True)
    assert_same(processor(text=text, images=groups[-1]), alone)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_make_batchs_for_every_family(family, kind):
    tokenizer, image_processor = KINDS["llama_3"](), image_processors()[kind]
    processor = LlavaSvProcessor(image_processor, tokenizer, conv_template="llama_3", **FAMILIES[family])
    assistant = Assistant(tokenizer, StubModel(FAMILIES[family]), image_processor, get_template("llama_3"))
    stock = pictures(5)
    batch = make_batch(assistant, [[user_turn("Which?", 3)], [user_turn("This?", 2)]], [stock[:3], stock[3:]])
    messages = [said("user", *[IMAGE] * count, words(text)) for count, text in ((3, "Which?"), (2, "This?"))]
    rest = list(stock)
    inputs = processor.apply_chat_template(
        [with_pictures([message], rest)[0] for message in messages],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert_same(inputs, batch)
    if family.startswith("hd"):
        assert {image.dim() for image in inputs["images"]} == {4}
        assert len({image.shape[0] for image in inputs["images"]}) > 1 or family == "hd, fixed"
    cast = inputs.to(torch.bfloat16)
    assert {image.dtype for image in cast["images"]} == {torch.bfloat16}
    assert cast["input_ids"].dtype == torch.long
    assert cast["image_sizes"] == batch.image_sizes
    assert inputs.to("cpu", dtype=torch.float16)["images"][0].dtype == torch.float16


def test_no_two_parts_make_a_control_token_or_a_picture():
    processor = make()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["[CTRL]"]})
    for mark in ("[CTRL]", "<|eot_id|>", "<image>"):
        whole, halves = ([said("user", *map(words, parts))] for parts in ((mark,), (mark[:3], mark[3:])))
        texts = {processor.apply_chat_template(messages, add_generation_prompt=True) for messages in (whole, halves)}
        assert len(texts) == 1
        assert f"{mark[0]} {mark[1:]}" in texts.pop()


def make(**options):
    options = {"conv_template": "llama_3", **options}
    return LlavaSvProcessor(image_processors()["clip"], KINDS["llama_3"](), **options)


def test_pictures_come_in_many_forms(tmp_path):
    picture = pictures(1)[0]
    picture.save(tmp_path / "a.png")
    data = io.BytesIO()
    picture.save(data, "PNG")
    text = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    lines = base64.encodebytes(data.getvalue()).decode()
    array = np.asarray(picture)
    processor = make()
    (expected,) = processor(images=picture)["images"]
    forms = [picture, tmp_path / "a.png", str(tmp_path / "a.png"), text, array, torch.from_numpy(array.copy())]
    forms += [text.partition(",")[2], lines, "data:image/png;base64," + lines]
    found = processor(images=forms, text="<image>" * len(forms))
    assert all(torch.equal(one, expected) for one in found["images"])
    assert found["image_sizes"] == [picture.size] * len(forms)
    url = {"type": "image_url", "image_url": {"url": str(tmp_path / "a.png")}}
    for one in (url, {"type": "image", "base64": lines}):
        asked = [{"role": "user", "content": [one, words("What?")]}]
        inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["images"][0], expected)


def test_a_picture_from_the_web(tmp_path, monkeypatch):
    picture = pictures(1)[0]
    picture.save(tmp_path / "a.png")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert as_picture(f"{url}/a.png").tobytes() == picture.tobytes()
        with pytest.raises(UserError, match=r"/b\.png: cannot be fetched \(HTTP Error 404"):
            as_picture(f"{url}/b.png")
        for named in (f"{url}/a b.png", "http://[a/b.png"):
            with pytest.raises(UserError, match="cannot be fetched"):
                as_picture(named)
        assert as_picture(f"HTTP{url[4:]}/a.png").tobytes() == picture.tobytes()
        with monkeypatch.context() as patch:
            patch.setattr(pictures_module, "time", types.SimpleNamespace(monotonic=iter((0.0, 31.0)).__next__))
            with pytest.raises(UserError, match="not there after 30 seconds"):
                as_picture(f"{url}/a.png")
        monkeypatch.setattr(pictures_module, "WEB_BYTES", 100)
        with pytest.raises(UserError, match=r"/a\.png: has more than 0 MiB; fetch it"):
            as_picture(f"{url}/a.png")
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_turned_picture_is_upright_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures(1)[0].save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.size == (70, 31)
        upright = as_picture(opened)
    loaded = load_image(tmp_path / "a.png")
    assert upright.size == (31, 70)
    assert upright.tobytes() == loaded.tobytes() == as_picture(loaded).tobytes() == as_picture(upright).tobytes()
    grey = Image.new("LA", (8, 8), (10, 0))
    assert as_picture(grey).getpixel((0, 0)) == (255, 255, 255), "what is transparent stands on white"


def test_unpadded_lists_and_the_left_side():
    processor = make()
    texts = ["one", "one two three four"]
    plain = processor(text=texts, return_tensors=None)
    assert [len(mask) for mask in plain["attention_mask"]] == [len(ids) for ids in plain["input_ids"]]
    padded = processor(text=texts, padding="longest", add_special_tokens=False, truncation=False)
    assert padded["input_ids"][0].tolist()[-len(plain["input_ids"][0]) :] == plain["input_ids"][0]
    assert padded["input_ids"][0, 0] == processor.tokenizer.pad_token_id
    assert padded["attention_mask"].sum(1).tolist() == [len(ids) for ids in plain["input_ids"]]


def test_text_of_tokens_leaves_image_marks_out():
    processor = make()
    ids = processor(text="<image>one two", images=pictures(1))["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["one two"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "one two"
    assert processor.decode(ids[0].tolist()[-1]) in "one two"
    plain = make(conv_template="plain")
    answer = plain.tokenizer(" a square\nand more", return_tensors="pt")["input_ids"]
    assert plain.post_process_image_text_to_text(answer) == ["a square"]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_saved_and_loaded_again(tmp_path, kind):
    settings = dict(mm_family="llava_hd", image_aspect_ratio="anyres", image_grid_pinpoints=[[32, 64], [64, 32]])
    processor = LlavaSvProcessor(image_processors()[kind], KINDS["chatml"](), conv_template="chatml", **settings)
    processor.save_pretrained(tmp_path / "a")
    names = {"chat_template.jinja", "preprocessor_config.json", "processor_config.json"}
    assert names < {path.name for path in (tmp_path / "a").iterdir()}
    values = json.loads((tmp_path / "a" / "processor_config.json").read_text())
    assert {**settings, "conv_template": "chatml", "hd_max_tiles": 4, "hd_fixed_grid": None}.items() <= values.items()
    again = AutoProcessor.from_pretrained(tmp_path / "a")
    assert type(again) is LlavaSvProcessor
    assert type(again.image_processor) is type(processor.image_processor)
    assert again.to_dict() == processor.to_dict()
    assert again.chat_template == processor.chat_template == jinja_of(get_template("chatml"))
    again.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        if path.name != "tokenizer_config.json":  # transformers notes in it where the tokenizer came from
            assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_own_chat_template_is_kept(tmp_path):
    make(chat_template="{{ messages[0].content }}!").save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.apply_chat_template([{"role": "user", "content": "a<|eot_id|>"}]) == "a< |eot_id|>!"
    other = AutoProcessor.from_pretrained(tmp_path, conv_template="vicuna_v1")
    assert other.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True).endswith(
        "USER: a ASSISTANT:"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What training writes: a language model's chat template, and no processor_config.json."""
    folder = save_checkpoint(tmp_path_factory.mktemp("made") / "skip", SKIP)
    (folder / "chat_template.jinja").write_text("the language model's, which knows no images")
    return folder


def ask(checkpoint):
    """(inputs by the processor, batch, assistant) of two ragged conversations."""
    assistant = load_for_inference(str(checkpoint), device="cpu")
    red, blue, wide = (
        Image.new("RGB", size, colour) for size, colour in (((40, 30), "red"), ((32, 32), "blue"), ((90, 20), "green"))
    )
    messages = [
        [said("user", {"type": "image", "image": red}, words("What colour is it?"))],
        [
            said("user", {"type": "image", "image": blue}, {"type": "image", "image": wide}, words("colour?")),
            said("assistant", words("blue")),
            said("user", words("is it?")),
        ],
    ]
    turns = [[user_turn("What colour is it?", 1)], [user_turn("colour?", 2), gpt("blue"), human("is it?")]]
    inputs = AutoProcessor.from_pretrained(checkpoint).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs, make_batch(assistant, turns, [[red], [blue, wide]]), assistant


def test_a_checkpoint_as_training_writes_it_answers_by_auto_classes(checkpoint):
    inputs, batch, assistant = ask(checkpoint)
    assert_same(inputs, batch)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    assert type(model) is type(assistant.model)
    for level in ("none", "skipped"):
        options = dict(max_new_tokens=6, do_sample=False, skip_kv=level)
        assert torch.equal(model.generate(**inputs, **options), generate(assistant, batch, **options))


def test_pipelines(checkpoint):
    made = pipeline("image-text-to-text", model=str(checkpoint), device="cpu")
    picture = Image.new("RGB", (40, 30), "red")
    messages = [said("user", {"type": "image", "image": picture}, words("What colour is it?"))]
    (answer,) = made(text=messages, generate_kwargs={"max_new_tokens": 6}, return_full_text=False)
    _, _, assistant = ask(checkpoint)
    batch = make_batch(assistant, [[user_turn("What colour is it?", 1)]], [[picture]])
    (expected,) = made.processor.post_process_image_text_to_text(generate(assistant, batch, max_new_tokens=6))
    assert answer["generated_text"] == expected != ""


def test_every_decoder_has_the_processor_and_the_model():
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    for decoder in DECODERS.values():
        assert PROCESSOR_MAPPING[decoder.config] is LlavaSvProcessor
        assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[decoder.config] is decoder.model


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_config_and_processor_that_disagree(checkpoint, tmp_path):
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"conv_template": None}))
    assert AutoProcessor.from_pretrained(tmp_path).conv_template == "llama_3", "LLaVA's own checkpoints name none"
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_aspect_ratio": "square"}))
    message = "image_aspect_ratio is 'pad' in processor_config.json and 'square' in config.json; make them agree"
    with pytest.raises(UserError, match=message):
        AutoProcessor.from_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path, image_aspect_ratio="square").image_aspect_ratio == "square"


def test_a_checkpoint_without_a_template(checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"conv_template": None}))
    processor = AutoProcessor.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"names no conv_template; give one: .*conv_template='vicuna_v1'"):
        processor.apply_chat_template([{"role": "user", "content": "a"}])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises((UserError, OSError)):
        AutoProcessor.from_pretrained(tmp_path)


def test_an_image_processor_that_only_the_encoder_has(checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        if path.suffix == ".json" and path.name != "preprocessor_config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mm_vision_image_size": 64}))
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor(images=pictures(1))["images"][0].shape == (3, 64, 64)
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path)(images=pictures(1))["images"][0].shape == (3, 64, 64)
    (tmp_path / "config.json").write_text(json.dumps(config | {"mm_vision_tower": None}))
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"cannot read the image processor, preprocessor_config\.json"):
        AutoProcessor.from_pretrained(tmp_path)


def png() -> bytes:
    data = io.BytesIO()
    pictures(1)[0].save(data, "PNG")
    return data.getvalue()


CALLS = {
    "nothing": (dict(), "neither text nor images were given"),
    "marks without pictures": (dict(text="<image> a"), r"hold 1 <image> mark\(s\), but 0 image\(s\) came"),
    "pictures without marks": (dict(text="a", images=[pictures(1)[0]]), r"hold 0 <image> mark\(s\), but 1 image"),
    "the wrong text's": (
        dict(text=["<image>", "b"], images=[[], [pictures(1)[0]]]),
        r"text 0 holds 1 <image> mark\(s\), but 0 image\(s\) came",
    ),
    "truncation": (dict(text="a", truncation=True, max_length=3), "max_length, truncation: not known here"),
    "right padding": (dict(text="a", padding_side="right"), "padding_side: prompts are padded on the left"),
    "padding": (dict(text="a", padding="max_length"), "padding: unknown 'max_length'"),
    "other tensors": (dict(text="a", return_tensors="np"), "return_tensors: unknown 'np'; known: 'pt', None"),
    "another thing": (dict(images=3.5), "cannot read a float; give a PIL image"),
    "an array of floats": (dict(images=np.zeros((3, 4, 4))), r"ndarray of shape \[3, 4, 4\] and float64"),
    "no such file": (dict(images="nowhere.png"), "no such image file: nowhere.png"),
    "no such file in a deep folder": (dict(images="/data/" * 10), "no such image file: /data"),
    "half a picture in base64": (
        dict(images=base64.b64encode(png()[:-40]).decode()),
        r"image file iVBORw0KGgo[^ ]*\.\.\. \(base64\) cannot be read",
    ),
    "a picture without rows": (dict(images=Image.new("RGB", (5, 0))), "cannot read a Image of 5 x 0 pixels"),
    "an array without rows": (dict(images=np.zeros((0, 5, 3), np.uint8)), r"ndarray of shape \[0, 5, 3\]"),
    "broken base64": (dict(images="data:image/png;base64,!!"), "is not base64"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_are_refused(case):
    options, message = CALLS[case]
    with pytest.raises(UserError, match=message) as caught:
        make()(**options)
    assert "\n" not in str(caught.value)


MESSAGES = {
    "none": ([], False, "no messages"),
    "not messages": ("hello", False, "no messages"),
    "the assistant first": ([said("assistant", words("a"))], False, "message 0 is from 'assistant', expected 'user'"),
    "twice the same": (
        [said("system", words("s")), said("user", words("a")), said("user", words("b"))],
        True,
        "message 2 is from 'user', expected 'assistant'",
    ),
    "an answer last": ([said("user", words("a")), said("assistant", words("b"))], True, "must be the user's"),
    "a video": ([said("user", {"type": "video", "video": "x"})], True, "type 'video' is not known; known: text, image"),
    "no content": ([{"role": "user"}], True, "message 0 has no role or no content"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_that_are_refused(case):
    messages, prompts, message = MESSAGES[case]
    with pytest.raises(UserError, match=message):
        make().apply_chat_template(messages, add_generation_prompt=prompts)


def test_settings_that_are_refused():
    with pytest.raises(UserError, match="image_aspect_ratio: unknown 'anyres' for family llava"):
        make(image_aspect_ratio="anyres")
    with pytest.raises(UserError, match="unknown conversation template 'x'"):
        make(conv_template="x")


def test_an_answer_is_gone_on_with():
    messages = [said("user", words("Count.")), said("assistant", words("one, two"))]
    text = make().apply_chat_template(messages, continue_final_message=True)
    prompt = render(get_template("llama_3"), [human("Count.")], add_generation_prompt=True).text
    assert text == prompt + "one, two"


def test_the_words_of_messages_are_not_changed_in_place():
    messages = [said("user", words("a<|eot_id|>"), words("b"))]
    make().apply_chat_template(messages, add_generation_prompt=True)
    assert messages == [said("user", words("a<|eot_id|>"), words("b"))]
