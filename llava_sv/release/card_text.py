"""The card's words: how to use the model, what it is for, where it is weak, whom to cite. Config and the card file
arrive, markdown leaves. Called by `card`."""

from __future__ import annotations

import shlex
from typing import Any

from llava_sv.model.token_groups import KV_LEVELS
from llava_sv.release.card_format import NOT_RECORDED, Book, count, listed
from llava_sv.release.card_sources import CardFile

AUTO = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
messages = [
    {{
        "role": "user",
        "content": [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "What is shown?"}}],
    }}
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.batch_decode(tokens, skip_special_tokens=True)[0])
```"""

OWN = """```python
from llava_sv.model.builder import load_pretrained_model

tokenizer, model, image_processor, context_length = load_pretrained_model("{name}")
```"""


def how_to_use(name: str, config: Any) -> list[str]:
    """By this project's command and loader, and by transformers' Auto classes."""
    lines = [
        "`" + name + "` below is this folder, or its name on the hub.",
        "",
        "With `llava-sv` installed:",
        "",
        "```bash",
        f'llava-sv chat --model-path {shlex.quote(name)} --image-file photo.jpg --prompt "What is shown?"',
        "```",
        "",
        *OWN.format(name=name).splitlines(),
        "",
        "With transformers' Auto classes. `trust_remote_code=True` runs the Python files of this folder: read them "
        "first. With `llava-sv` installed, `import llava_sv` registers the same classes, and the flag may be left out.",
        "",
        *AUTO.format(name=name).splitlines(),
        "",
    ]
    if config.skip_vision is None:
        return lines
    levels = ", ".join(f"`{level}`" for level in KV_LEVELS if level != "fine+skipped" or config.mm_family == "cos")
    return [
        *lines,
        "`skip_kv=` of `generate` (`--skip-kv` of the command) says whose keys and values leave the cache after "
        f"prefill: {levels}; the default is `{config.skip_vision.skip_kv}`.",
        "",
    ]


def intended_use(card_file: CardFile, book: Book) -> list[str]:
    """As the authors say."""
    said = book.say("intended use (card file: intended_use)", card_file.intended_use)
    lines = [f"Intended use: {said}" + ("." if said == NOT_RECORDED else ""), ""]
    return [*lines, f"Out of scope: {card_file.out_of_scope}", ""] if card_file.out_of_scope else lines


def limits(config: Any, fine: list[str], budgets: list[str], card_file: CardFile, book: Book) -> list[str]:
    """Where a model of this kind is weak; the run's own figures on fine detail and at other budgets."""
    skip, lines = config.skip_vision, []
    if skip is None:
        lines.append("This model is dense: its cost grows with every visual token.")
    else:
        lines.append(_fine_words(config))
    lines.append("")
    if fine:
        lines += ["Figures of this checkpoint on what fine detail decides:", "", *fine, ""]
    else:
        book.lacks("evaluation on fine detail")
        lines += [f"Figures of this checkpoint on fine detail: {NOT_RECORDED}.", ""]
    if skip is not None:
        lines += [
            f"Its budget is {skip.mean_retained} retained tokens{' on average' if skip.adaptive else ''}. Another can "
            "be set in config.json without training again; answers then change, with fewer retained tokens first "
            "where detail is fine, and the figures above no longer hold: evaluate again.",
            "",
        ]
        if not budgets:
            book.lacks("accuracy at other budgets (llava-sv analyze tradeoff)")
            lines += [f"Accuracy at other budgets: {NOT_RECORDED}.", ""]
    lines += [
        *budgets,
        "Answers can be wrong, invented, or coloured by what the bases and the data hold; the language model's own "
        "limits apply. Nothing here was tested for safety-critical use.",
        "",
    ]
    return [*lines, card_file.limitations, ""] if card_file.limitations else lines


AT_RISK = {
    "llava": (
        "Patches that are not retained",
        "small text, small objects and exact counts are the first at risk, most of all in patches unlike the image as "
        "a whole.",
    ),
    "llava_hd": (
        "The overview is kept. The tiles",
        "text and objects that only the tiles resolve are the first at risk. An image without tiles has its overview "
        "alone.",
    ),
    "cos": (
        "The coarse scales are kept. The small windows of the finest",
        "small text and small objects are the first at risk.",
    ),
}
"""Family -> what is skipped, and what that may cost."""


def _fine_words(config: Any) -> str:
    """What becomes of the tokens that are not retained, by this checkpoint's own switches, and what that may cost."""
    skip, layers = config.skip_vision, config.num_hidden_layers
    what, risk = AT_RISK[config.mm_family]
    skipping = len(skip.layers_that_skip(layers))
    mean = " on average" if skip.adaptive else ""
    done = [f"are merged into {count(skip.num_skipped)} tokens{mean}"] if skip.merge else []
    if skipping:
        done.append(
            "skip the feed-forward layers" + ("" if skipping == layers else f" of {skipping} of {layers} layers")
        )
    if KV_LEVELS[skip.skip_kv]:
        also = ", as do those of the middle scale" if skip.skip_kv == "fine+skipped" else ""
        done.append(f"leave the cache after prefill, so that only the first token of an answer attends to them{also}")
    return f"{what} {listed(done) or 'pass every layer'}: {risk}"


def citation(card_file: CardFile) -> list[str]:
    """Plain references."""
    lines = [
        "- Skip-Vision: Efficient and Scalable Acceleration of Vision-Language Models via Adaptive Token Skipping. "
        "arXiv:2503.21817, 2025.",
        "- Haotian Liu, Chunyuan Li, Qingyang Wu, Yong Jae Lee: Visual Instruction Tuning. NeurIPS 2023, "
        "arXiv:2304.08485.",
        "",
    ]
    return [*lines, card_file.citation, ""] if card_file.citation else lines
