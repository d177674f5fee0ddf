"""The chat templates of transformers' processors: which conversation template one writes, and the one that writes a
conversation template. Called by from_hf and to_hf."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_sv.chat_template import jinja_of
from llava_sv.conversation import CONV_TEMPLATES, Template, render
from llava_sv.errors import UserError
from llava_sv.files import read_json
from llava_sv.mm_utils import adds_bos

FILE = "chat_template.jinja"
OLD_FILE = "chat_template.json"
QUESTION = "What is this?"


def jinja_for(template: Template, tokenizer: Any) -> str:
    """The chat template of a processor of transformers' that writes as `template` does; the start of sequence is left
    to a tokenizer that adds one by itself."""
    return jinja_of(replace(template, bos="") if adds_bos(tokenizer) else template)


def template_of(jinja: str | None, tokenizer: Any) -> tuple[str | None, str]:
    """(name of the template of this project that writes a question about a picture as `jinja` does, what to say of it).

    The start of sequence is not compared: either side has exactly one. The name is None where no template does.
    """
    if not jinja:
        return None, "there is no chat template"
    found: list[tuple[int, str, str]] = []
    for name, template in CONV_TEMPLATES.items():
        for system in (None, "") if template.system else (None,):
            agreed = [_agrees(jinja, tokenizer, template, system, how) for how in (_ASKED, _TALKED, _TOLD)]
            if agreed[0]:
                said = "" if system is None else _without_system(name)
                found.append((-sum(agreed), name, said))
    if not found:
        return None, "its chat template is none of this project's"
    _, name, said = min(found, key=lambda one: one[0])
    return _preferred(name), said


_ASKED = (("user", f"<image>\n{QUESTION}"),)
_TALKED = (*_ASKED, ("assistant", "A cat."), ("user", "Sure?"))
_TOLD = (("system", "Be brief."), *_ASKED)


def _agrees(jinja: str, tokenizer: Any, template: Template, system: str | None, how: Any) -> bool:
    """Whether a conversation (`_ASKED`, ...) reads the same, its words given as parts or as text."""
    if how[0][0] == "system":
        system, how, first = how[0][1], how[1:], [how[0]]
    else:
        first = []
    turns = [{"from": "human" if role == "user" else "gpt", "value": words} for role, words in how]
    ours = _bare(render(template, turns, True, system).text, template, tokenizer)
    for as_content in (_parts, str):
        messages = [{"role": role, "content": as_content(words)} for role, words in (*first, *how)]
        try:
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=jinja, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template is a program of somebody else's: it may raise anything
            continue
        if _bare(theirs, template, tokenizer) == ours:
            return True
    return False


def _parts(words: str) -> list[dict[str, str]]:
    text = {"type": "text", "text": words.removeprefix("<image>\n")}
    return [{"type": "image"}, text] if words.startswith("<image>") else [text]


def _preferred(name: str) -> str:
    """The longest of the names of one template."""
    return max((other for other, one in CONV_TEMPLATES.items() if one is CONV_TEMPLATES[name]), key=len)


def _without_system(name: str) -> str:
    return f"its chat template is {_preferred(name)} without the system prompt, which this project's has"


def _bare(text: str, template: Template, tokenizer: Any) -> str:
    for start in {template.bos, tokenizer.bos_token or ""} - {""}:
        text = text.removeprefix(start)
    return text


def read_jinja(folder: Path, tokenizer: Any) -> str | None:
    """The chat template of a folder's processor, or else its tokenizer's; None where there is none."""
    if (folder / FILE).is_file():
        try:
            return (folder / FILE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / FILE}: is not UTF-8 text (near byte {error.start})") from error
    if (folder / OLD_FILE).is_file():
        values = read_json(folder / OLD_FILE, "the download or the training again")
        found = values.get("chat_template") if isinstance(values, dict) else None
        return found if isinstance(found, str) else None
    found = getattr(tokenizer, "chat_template", None)
    return found if isinstance(found, str) else None
