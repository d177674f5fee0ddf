"""`render` against chat templates written in Jinja from the public formats, and against strings written by hand."""

import pytest

from llava_sv.conversation import CONV_TEMPLATES, get_template, render
from llava_sv.errors import UserError
from tests.tokenizers_util import chatml_tokenizer, llama_2_tokenizer, llama_3_tokenizer

TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A square."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "Red."},
]

LLAMA_3_JINJA = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_JINJA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2_JINJA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_JINJA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ORACLES = {
    "llama_3": (llama_3_tokenizer, LLAMA_3_JINJA),
    "chatml": (chatml_tokenizer, CHATML_JINJA),
    "llama_2": (llama_2_tokenizer, LLAMA_2_JINJA),
    "mistral_instruct": (llama_2_tokenizer, MISTRAL_JINJA),
}


def _messages(turns, system):
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    return ([{"role": "system", "content": system}] if system else []) + messages


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    ("name", "system"),
    [
        (name, system)
        for name in ORACLES
        for system in ("", "Be brief.")
        if (name, system) != ("mistral_instruct", "Be brief.")
    ],
)  # Mistral's own template takes no system prompt
def test_text_is_that_of_the_chat_template(name, system, prompt):
    build, jinja = ORACLES[name]
    tokenizer = build()
    tokenizer.chat_template = jinja
    turns = TURNS[:3] if prompt else TURNS
    expected = tokenizer.apply_chat_template(_messages(turns, system), tokenize=False, add_generation_prompt=prompt)
    assert render(get_template(name), turns, add_generation_prompt=prompt, system=system).text == expected


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: <image>\nWhat is it? ASSISTANT: A square.</s>USER: Which colour? ASSISTANT: Red.</s>"
)
BY_HAND = {
    "plain": ("<image>A square.\nRed.\n", ["A square.\n", "Red.\n"]),
    "v1": (VICUNA, [" A square.</s>", " Red.</s>"]),
    "llama_3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA square.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhich colour?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nRed.<|eot_id|>",
        ["A square.<|eot_id|>", "Red.<|eot_id|>"],
    ),
    "llama_2": (
        "<s>[INST] <image>\nWhat is it? [/INST] A square. </s><s>[INST] Which colour? [/INST] Red. </s>",
        [" A square. </s>", " Red. </s>"],
    ),
    "mistral_instruct": (
        "<s>[INST] <image>\nWhat is it? [/INST] A square.</s>[INST] Which colour? [/INST] Red.</s>",
        [" A square.</s>", " Red.</s>"],
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nA square.<|im_end|>\n<|im_start|>user\nWhich colour?<|im_end|>\n"
        "<|im_start|>assistant\nRed.<|im_end|>\n",
        ["A square.<|im_end|>", "Red.<|im_end|>"],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_text_and_spans_by_hand(name):
    text, answers = BY_HAND[name]
    rendered = render(get_template(name), TURNS)
    assert rendered.text == text
    assert [rendered.text[start:end] for start, end in rendered.answer_spans] == answers


def test_system_prompt_of_llama_2_and_mistral_stands_in_the_first_question():
    assert render(get_template("llama_2"), TURNS[:1], True, system="Be brief.").text == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST]"
    )
    assert render(get_template("mistral_instruct"), TURNS[:1], True, system="Be brief.").text == (
        "<s>[INST] Be brief.\n\n<image>\nWhat is it? [/INST]"
    )


@pytest.mark.parametrize("name", CONV_TEMPLATES)
def test_a_prompt_is_what_stands_before_the_answer_in_training(name):
    template = get_template(name)
    trained = render(template, TURNS)
    for answer, (start, _) in enumerate(trained.answer_spans):
        asked = TURNS[: 2 * answer + 1]
        assert render(template, asked, add_generation_prompt=True).text == trained.text[:start]


@pytest.mark.parametrize("name", CONV_TEMPLATES)
def test_an_answer_ends_at_its_stop_string(name):
    template = get_template(name)
    rendered = render(template, TURNS)
    for start, end in rendered.answer_spans:
        said = rendered.text[start:end]
        assert said.endswith(template.stop_strings[0])
        assert said.count(template.stop_strings[0]) == 1
    assert template.stop_token is None or template.stop_token == template.stop_strings[0]


@pytest.mark.parametrize("name", [name for name in CONV_TEMPLATES if name != "plain"])
def test_words_cannot_end_a_turn(name):
    template = get_template(name)
    evil = [{"from": "human", "value": f"a{m}b"} for m in template.special_tokens[-1:]]
    evil.append({"from": "gpt", "value": f"{template.end_of_turn}{template.end_of_turn.strip()} c"})
    plain = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]
    marker = template.special_tokens[-1]
    assert render(template, evil).text.count(marker) == render(template, plain).text.count(marker)


def test_plain_keeps_the_images_and_drops_the_words():
    turns = [
        {"from": "human", "value": "Describe <image> and <image> briefly."},
        {"from": "gpt", "value": " Two cats "},
    ]
    assert render(get_template("plain"), turns).text == "<image><image>Two cats\n"


def test_v1_and_vicuna_v1_are_one_object():
    assert CONV_TEMPLATES["v1"] is CONV_TEMPLATES["vicuna_v1"]


def test_unknown_template_lists_the_known():
    with pytest.raises(UserError, match=r"unknown conversation template 'llama3'; known: plain, v1, .*chatml"):
        get_template("llama3")


@pytest.mark.parametrize(
    ("turns", "prompt", "message"),
    [
        ([TURNS[1]], False, "turn 0 is from 'gpt', expected 'human'"),
        ([TURNS[0], TURNS[2]], False, "turn 1 is from 'human', expected 'gpt'"),
        (TURNS[:2], True, "a prompt ends with a human turn"),
        ([], True, "a prompt ends with a human turn"),
    ],
)
def test_misaligned_turns_are_refused(turns, prompt, message):
    with pytest.raises(ValueError, match=message):
        render(get_template("llama_3"), turns, add_generation_prompt=prompt)
