"""Small tokenizers of the kinds that language models come with, built here so that tests need no download."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What colour is the square? ASSISTANT: The square is red.",
    "[INST] How many circles are there? [/INST] There are two blue circles.",
    "system user assistant <<SYS>> <</SYS>>",
]

LLAMA_3_MARKERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def _train(tokenizer: Tokenizer, specials: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)


def _byte_level(specials: list[str], bos: str | None, trim_offsets: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, specials, pre_tokenizers.ByteLevel.alphabet())
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos is not None:
        ids = [(bos, tokenizer.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=ids))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def llama_3_tokenizer(adds_bos: bool = True, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose post-processor puts `<|begin_of_text|>` in front (not, without `adds_bos`)."""
    core = _byte_level([*LLAMA_3_MARKERS, "<|pad|>"], LLAMA_3_MARKERS[0] if adds_bos else None, trim_offsets)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=LLAMA_3_MARKERS[0], eos_token="<|eot_id|>", pad_token="<|pad|>"
    )


def llama_2_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE: blanks are `▁`, one is put before the text, and `<s>` in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    # whole texts are one word to a SentencePiece-like BPE; split while training only, so that merges stay short
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    _train(tokenizer, specials, ["▁"])
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without any BOS."""
    core = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
