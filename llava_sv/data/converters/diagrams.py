"""Questions about textbook diagrams, by the Allen Institute: AI2D (`ai2d`, a JSON file a picture) and TQA (`tqa`,
lessons with their questions). Called through `get_converter`."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sv.data.converters import prompts, read
from llava_sv.data.converters.attempt import attempt
from llava_sv.data.converters.items import Inputs, Item, conversation


def ai2d(inputs: Inputs) -> Iterator[Item]:
    """{imageName, questions: {question: {answerTexts, correctAnswer (from 0), abcLabel}}}: a conversation a picture.

    `abcLabel` marks questions about the picture with letters in its labels' places. Those pictures have a folder of
    their own (option `labelled`); where it is absent, these questions are left out, for the picture alone cannot answer
    them. A `.csv` among the annotations lists pictures, by number, that belong to the test: they are left out.
    """
    lists = [path for path in inputs.files if path.suffix == ".csv"]
    tests = {line.strip() for path in lists for line in read.text(path).splitlines()}
    labelled = inputs.option("labelled", "abc_images")
    has_labelled = Path(inputs.root, inputs.source.images, labelled).is_dir()
    for path in inputs.files:
        if path.suffix == ".csv" or path.name.split(".")[0] in tests:
            continue
        whole = read.document(path)
        for marked in (False, True) if has_labelled else (False,):
            folder = labelled if marked else "images"
            item = attempt(str(path), _ai2d_record, inputs, whole, marked, folder)
            if item.record is None or item.record["conversations"]:
                yield item
            if item.record is None:
                break


def _ai2d_record(inputs: Inputs, whole: Any, marked: bool, folder: str) -> dict[str, Any]:
    name = whole["imageName"]
    exchanges = [
        prompts.choices(question, given["answerTexts"], given["correctAnswer"])
        for question, given in whole["questions"].items()
        if bool(given["abcLabel"]) == marked
    ]
    identity = f"{inputs.source.name}/{name}" + ("/letters" if marked else "")
    return conversation(identity, exchanges, [inputs.image(f"{folder}/{name}")])


def tqa(inputs: Inputs) -> Iterator[Item]:
    """[{questions: {diagramQuestions: {number: {beingAsked, answerChoices, correctAnswer, imagePath}}, ...}}].

    A record for each question about a diagram; option `text_questions`: for the `nonDiagramQuestions` too.
    """
    kinds = ["diagramQuestions"] + (["nonDiagramQuestions"] if inputs.option("text_questions", False) else [])
    for path in inputs.files:
        for where, lesson in read.entries(path):
            for kind in kinds:
                try:
                    questions = dict(lesson["questions"][kind])
                except (KeyError, TypeError, ValueError):
                    yield Item(where, problem=f"has no questions of kind {kind!r}")
                    continue
                for number, question in questions.items():
                    yield attempt(f"{where}: {number}", _tqa_record, inputs, number, question)


def _tqa_record(inputs: Inputs, number: str, question: dict[str, Any]) -> dict[str, Any]:
    options = dict(sorted(question["answerChoices"].items()))
    answer = question["correctAnswer"]["processedText"].strip().lower()
    texts = [option["processedText"] for option in options.values()]
    if answer in options:
        index = list(options).index(answer)
    elif answer in (lowered := [text.strip().lower() for text in texts]):
        index = lowered.index(answer)
    else:
        raise ValueError(f"answer {answer!r} is none of {', '.join(string.ascii_lowercase[: len(options)])}")
    exchange = prompts.choices(question["beingAsked"]["processedText"], texts, index)
    images = [inputs.image(question["imagePath"])] if "imagePath" in question else []
    return conversation(f"{inputs.source.name}/{question.get('globalID', number)}", [exchange], images)
