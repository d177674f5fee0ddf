"""Paragraphs with questions about them, in SQuAD's JSON: `squad`. Called through `get_converter`.

{data: [{title, paragraphs: [{context, qas: [{id, question, answers: [{text}], is_impossible}]}]}]}; a paragraph becomes a
conversation, of text alone: the paragraph opens the first question. Option `image`: name of a paragraph's field with its
picture's file; then the picture takes the text's place. Where questions may have no answer (SQuAD 2), every question says
what to answer then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_sv.data.converters import prompts
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.json_stream import read_members


def squad(inputs: Inputs) -> Iterator[Item]:
    """A record for each paragraph that has questions."""
    image = inputs.option("image", "")
    for path in inputs.files:
        for line, number, article in read_members(path, "data"):
            paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
            where = f"{path} line {line}: article {number}"
            if not isinstance(paragraphs, list):
                yield Item(where, problem="has no list 'paragraphs'")
                continue
            for index, paragraph in enumerate(paragraphs):
                identity = f"{inputs.source.name}/{path.stem}/{number}/{index}"
                yield from _paragraph(inputs, f"{where}, paragraph {index}", identity, paragraph, image)


def _paragraph(inputs: Inputs, where: str, identity: str, paragraph: Any, image: str) -> Iterator[Item]:
    try:
        exchanges = _exchanges(paragraph["qas"])
        if not exchanges:
            return
        if image:
            yield Item(where, conversation(identity, exchanges, [inputs.image(paragraph[image])]))
        else:
            question, answer = exchanges[0]
            exchanges[0] = (f"{paragraph['context'].strip()}\n\n{question}", answer)
            yield Item(where, conversation(identity, exchanges))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        yield Item(where, problem=f"has no {error}" if isinstance(error, KeyError) else str(error))


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
        exchanges.append((prompts.short(f"{question}\n{prompts.UNANSWERABLE}" if hint else question), answer))
    return exchanges
