"""Paragraphs with questions about them, in SQuAD's JSON: `squad`. Called through `get_converter`.

{data: [{title, paragraphs: [{context, qas: [{id, question, answers: [{text}], is_impossible}]}]}]}; a paragraph becomes
a conversation, of text alone: the paragraph opens the first question. Option `image`: name of a paragraph's field with
its picture's file; then the picture takes the text's place. Where questions may have no answer (SQuAD 2),
the first says what to answer then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_sv.data.converters import prompts, read
from llava_sv.data.converters.attempt import attempt
from llava_sv.data.converters.items import Inputs, Item, conversation


def squad(inputs: Inputs) -> Iterator[Item]:
    """A record for each paragraph that has questions."""
    for path in inputs.files:
        for where, number, article in read.elements(path, "data"):
            paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
            if not isinstance(paragraphs, list):
                yield Item(where, problem="has no list 'paragraphs'")
                continue
            for index, paragraph in enumerate(paragraphs):
                identity = f"{inputs.source.name}/{path.stem}/{number}/{index}"
                item = attempt(f"{where}, paragraph {index}", _record, inputs, identity, paragraph)
                if item.record is None or item.record["conversations"]:
                    yield item


def _record(inputs: Inputs, identity: str, paragraph: Any) -> dict[str, Any]:
    """Without questions, a record without turns."""
    exchanges = _exchanges(paragraph["qas"])
    image = inputs.option("image", "")
    if image:
        return conversation(identity, exchanges, [inputs.image(paragraph[image])])
    if exchanges:
        question, answer = exchanges[0]
        exchanges[0] = (f"{paragraph['context'].strip()}\n\n{question}", answer)
    return conversation(identity, exchanges)


def _exchanges(questions: Any) -> list[tuple[str, str]]:
    hint = any("is_impossible" in one for one in questions)
    exchanges = []
    for one in questions:
        question = one["question"].strip()
        if one.get("is_impossible"):
            answer = "Unanswerable"
        else:
            answers = [given["text"].strip() for given in one["answers"]]
            answer = prompts.most_common([given for given in answers if given])
        exchanges.append((question, answer))
    if exchanges:
        question, answer = exchanges[0]
        exchanges[0] = (prompts.short(f"{question}\n{prompts.UNANSWERABLE}" if hint else question), answer)
    return exchanges
