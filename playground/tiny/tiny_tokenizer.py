"""The tiny bases' tokenizer: byte-level BPE learnt from toy text, with LLaMA-3's special tokens and chat format.

What arrives is a seed; what leaves is a `PreTrainedTokenizerFast`. `make_bases.py` calls it.
"""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_sv.data.toy import conversation, describe, random_scene
from llava_sv.data.toy_questions import ask_some

BOS, PAD = "<|begin_of_text|>", "<|finetune_right_pad_id|>"
START, END, EOT, EOS = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"
SPECIAL = (BOS, EOS, START, END, EOT, PAD)
MERGED_VOCABULARY = 634
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
"""Pieces within which bytes merge: a word with its space, a digit, punctuation, line ends, other blanks."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def chat_text(turns: list[dict[str, str]]) -> str:
    """LLaVA turns in LLaMA-3's chat format, without the first token."""
    roles = {"human": "user", "gpt": "assistant"}
    return "".join(f"{START}{roles[t['from']]}{END}\n\n{t['value']}{EOT}" for t in turns)


def _corpus(seed: int, scenes: int):
    rng = random.Random(seed)
    for _ in range(scenes):
        scene = random_scene(rng)
        turns = conversation(describe(scene), ask_some(scene, rng, 8))
        order = "In the first image: " if rng.random() < 0.1 else "In the second image: " if rng.random() < 0.1 else ""
        yield "\n".join(order + t["value"] for t in turns)
    yield from ["user\n\nassistant\n\nsystem\n\nleft\nright\nfirst\nsecond"] * 100


def make_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer: 640 entries, any text encodable, every word of the toy questions one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED_VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(seed, 4000), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    bos_id = tokenizer.token_to_id(BOS)
    bos_first = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_id)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos_first])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        model_max_length=2048,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
