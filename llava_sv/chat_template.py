"""A conversation template as Jinja, for whoever renders without this package: the text is `conversation.render`'s.

`processing` saves it as chat_template.jinja. Messages are transformers' (`role` and `content`, a text or parts of type
`text` and `image`); an image stands where its part does, on a line of its own. In somebody's words, the template's own
markers and `<image>` are broken up; a tokenizer's other special tokens are not known here: `processing` does those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llava_sv.constants import DEFAULT_IMAGE_TOKEN
from llava_sv.conversation import Template, break_up

_WORDS = """\
{%- macro words(text) -%}
  {{- text@CLEANED@ -}}
{%- endmacro -%}
"""

_SAID = """\
{%- macro said(content) -%}
  {%- if content is string -%}
    {{- words(content) -}}
  {%- else -%}
    {%- set run = namespace(text="", image=false) -%}
    {%- for part in content -%}
      {%- if part is mapping and part.type in ["image", "image_url"] -%}
        {{- words(run.text) -}}
        {%- if not loop.first -%}{{- "\\n" -}}{%- endif -%}
        {{- @IMAGE@ -}}
        {%- set run.text = "" -%}
        {%- set run.image = true -%}
      {%- elif part is string or part.type == "text" -%}
        {%- if run.image -%}{{- "\\n" -}}{%- endif -%}
        {%- set run.text = run.text ~ (part if part is string else part.text) -%}
        {%- set run.image = false -%}
      {%- else -%}
        {{- raise_exception("content of type " ~ part.type ~ " is not known here: text and image are") -}}
      {%- endif -%}
    {%- endfor -%}
    {{- words(run.text) -}}
  {%- endif -%}
{%- endmacro -%}
"""

_ONLY_IMAGES = """\
{%- macro pictures(content) -%}
  {%- if content is not string -%}
    {%- for part in content if part is mapping and part.type in ["image", "image_url"] -%}
      {{- @IMAGE@ -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

_SYSTEM = """\
{%- if messages and messages[0].role == "system" -%}
  {%- set system = said(messages[0].content) | trim -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = @SYSTEM@ -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- set system = @SYSTEM_TEXT@ if system else "" -%}
"""

_TURNS = """\
{{- @START@ -}}
{%- for turn in turns -%}
  {%- if turn.role != ["user", "assistant"][loop.index0 % 2] -%}
    {{- raise_exception("turn " ~ loop.index0 ~ " is from " ~ turn.role ~ ": turns alternate, the user's first") -}}
  {%- elif turn.role == "user" -%}
@USER@    {{- @ASKED@ -}}
  {%- else -%}
    {{- @ANSWERED@ -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if turns | length % 2 == 0 -%}
    {{- raise_exception("a prompt ends with the user's turn") -}}
  {%- endif -%}
  {{- @PROMPT@ -}}
{%- endif -%}
"""


def jinja_of(template: Template) -> str:
    """chat_template.jinja of a conversation template. The same template gives the same text."""
    said = "pictures(turn.content)" if template.images_only else "said(turn.content) | trim"
    inside = "(system if loop.first else '')" if template.system_in_user else ""
    parts = {
        "CLEANED": "".join(f" | replace({_text(mark)}, {_text(break_up(mark))})" for mark in _marks(template)),
        "IMAGE": _text(DEFAULT_IMAGE_TOKEN),
        "SYSTEM": _text(template.system),
        "SYSTEM_TEXT": _joined(_text(template.system_prefix), "system", _text(template.system_suffix)),
        "START": _joined(_text(template.bos), "" if template.system_in_user else "system"),
        "USER": _next_user(template),
        "ASKED": _joined(_text(template.user_prefix), inside, f"({said})", _text(template.user_suffix)),
        "ANSWERED": _joined(
            _text(template.assistant_prefix + template.answer_prefix),
            "(said(turn.content) | trim)",
            _text(template.end_of_turn + template.after_answer),
        ),
        "PROMPT": _text(template.assistant_prefix),
    }
    text = _head(template) + _WORDS + _SAID + (_ONLY_IMAGES if template.images_only else "") + _SYSTEM + _TURNS
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value)
    return text


def _head(template: Template) -> str:
    return f"{{#- llava_sv's conversation template {template.name} -#}}\n"


def _marks(template: Template) -> Sequence[str]:
    return (DEFAULT_IMAGE_TOKEN, *template.special_tokens)


def _next_user(template: Template) -> str:
    if not template.next_user_prefix:
        return ""
    return f"    {{%- if not loop.first -%}}{{{{- {_text(template.next_user_prefix)} -}}}}{{%- endif -%}}\n"


def _text(value: str) -> str:
    """A literal of Jinja's."""
    return json.dumps(value)


def _joined(*parts: str) -> str:
    """An expression that joins those of `parts` that are not empty."""
    return " ~ ".join(part for part in parts if part not in ("", '""')) or '""'
