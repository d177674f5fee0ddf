"""Questions about a toy scene in six categories, and about a fine scene in a seventh, with answers read off the scene.

What arrives is a `Scene` and a `random.Random`; what leaves is a `Question`. `toy.py` and `playground/tiny` call it.
Answers within a category are drawn before the question where the scene allows it, so that guessing blindly pays little.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from llava_sv.data.toy_scene import COLOURS, MAX_SHAPES, PLACES, SHAPES, WORDS, Scene, Shape, article

ANSWER_PROMPT = "Answer the question using a single word or phrase."
"""LLaVA-1.5's request for a short answer; it follows a benchmark question on a line of its own."""

FINE_DETAIL = "fine_detail"
"""The category of questions about a fine scene: the wordings of `text` and `shape`, half of each."""

SIDES: dict[str, tuple[int, ...]] = {"top": (0, 1), "bottom": (2, 3), "left": (0, 2), "right": (1, 3)}


@dataclass(frozen=True)
class Question:
    """One question, its answer, and every answer the wording admits."""

    category: str
    text: str
    answer: str
    choices: tuple[str, ...]


YES_NO = ("yes", "no")
NUMBERS = tuple(str(n) for n in range(MAX_SHAPES + 1))


def ask_existence(scene: Scene, rng: random.Random) -> Question | None:
    """Is there a red circle? Half of the answers are no; most of those name a colour or a shape that is there."""
    looks = {(s.colour, s.shape) for s in scene.shapes}
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(looks))
        answer = "yes"
    else:
        kept = rng.choice(scene.shapes)
        how = rng.random()
        colour = kept.colour if how < 0.4 else rng.choice(list(COLOURS))
        shape = kept.shape if how >= 0.6 else rng.choice(SHAPES)
        if (colour, shape) in looks:
            return None
        answer = "no"
    return Question("existence", f"Is there {article(colour)} {colour} {shape} in the image?", answer, YES_NO)


def ask_colour(scene: Scene, rng: random.Random) -> Question | None:
    """What colour is the circle, or the shape at a place?"""
    asked = rng.choice(scene.shapes)
    if rng.random() < 0.5:
        text = f"What colour is the shape at the {PLACES[asked.place]}?"
    elif _count(scene, shape=asked.shape) == 1:
        text = f"What colour is the {asked.shape}?"
    else:
        return None
    return Question("colour", text, asked.colour, tuple(COLOURS))


def ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    """What shape is the red object, or the object at a place?"""
    asked = rng.choice(scene.shapes)
    if rng.random() < 0.5:
        text = f"What shape is at the {PLACES[asked.place]}?"
    elif _count(scene, colour=asked.colour) == 1:
        return _ask_shape_by_colour(asked)
    else:
        return None
    return Question("shape", text, asked.shape, SHAPES)


def _ask_shape_by_colour(asked: Shape) -> Question:
    return Question("shape", f"What shape is the {asked.colour} object?", asked.shape, SHAPES)


def ask_count(scene: Scene, rng: random.Random) -> Question | None:
    """How many shapes, circles or red shapes are there?"""
    how = rng.random()
    if how < 0.5:
        return Question("count", "How many shapes are there?", str(len(scene.shapes)), NUMBERS[1:])
    wanted = rng.randint(0, 2)
    if how < 0.75:
        fitting = [s for s in SHAPES if _count(scene, shape=s) == wanted]
        template = "How many {name}s are there?"
    else:
        fitting = [c for c in COLOURS if _count(scene, colour=c) == wanted]
        template = "How many {name} shapes are there?"
    if not fitting:
        return None
    text = template.format(name=rng.choice(fitting)).replace("crosss", "crosses")
    return Question("count", text, str(wanted), NUMBERS)


def ask_position(scene: Scene, rng: random.Random) -> Question | None:
    """Where is the red circle, or is it on one side of the image?"""
    asked = rng.choice(scene.shapes)
    name = f"the {asked.colour} {asked.shape}"
    if rng.random() < 0.6:
        return Question("position", f"Where is {name}?", PLACES[asked.place], PLACES)
    side = rng.choice(list(SIDES))
    answer = "yes" if asked.place in SIDES[side] else "no"
    return Question("position", f"Is {name} at the {side}?", answer, YES_NO)


def ask_text(scene: Scene, rng: random.Random) -> Question | None:
    """Which word is written?"""
    if not scene.word:
        return None
    return Question("text", "What word is written in the image?", scene.word, WORDS)


def ask_fine_word(scene: Scene, rng: random.Random) -> Question | None:
    """Which word is written, in small?"""
    question = ask_text(scene, rng)
    return question and replace(question, category=FINE_DETAIL)


def ask_fine_shape(scene: Scene, rng: random.Random) -> Question | None:
    """What shape is the tiny red object?"""
    return replace(_ask_shape_by_colour(rng.choice(scene.shapes)), category=FINE_DETAIL)


FINE_QUESTIONS = (ask_fine_word, ask_fine_shape)


def ask_all_fine(scene: Scene, rng: random.Random) -> list[Question]:
    """Every question that a fine scene allows, in random order: its word, and each shape by its colour."""
    asked = [ask_text(scene, rng), *map(_ask_shape_by_colour, scene.shapes)]
    questions = [replace(question, category=FINE_DETAIL) for question in asked if question]
    rng.shuffle(questions)
    return questions


CATEGORIES: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "existence": ask_existence,
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "position": ask_position,
    "text": ask_text,
}


def ask_some(scene: Scene, rng: random.Random, count: int, categories: Iterable[str] = CATEGORIES) -> list[Question]:
    """Up to `count` different questions in random order, the named categories (all of them) tried in turn."""
    names = list(categories)
    rng.shuffle(names)
    questions: dict[str, Question] = {}
    for attempt in range(4 * count):
        question = CATEGORIES[names[attempt % len(names)]](scene, rng)
        if question is not None:
            questions.setdefault(question.text, question)
        if len(questions) == count:
            break
    found = list(questions.values())
    rng.shuffle(found)
    return found


def blind_accuracy(questions: list[Question]) -> dict[str, float]:
    """Best accuracy in each category of a guesser that sees the question's form (its choices) but no image."""
    answers: dict[tuple[str, tuple[str, ...]], Counter] = {}
    for question in questions:
        answers.setdefault((question.category, question.choices), Counter())[question.answer] += 1
    right: Counter = Counter()
    total: Counter = Counter()
    for (category, _), counter in answers.items():
        right[category] += max(counter.values())
        total[category] += sum(counter.values())
    return {category: right[category] / total[category] for category in total}


def _count(scene: Scene, colour: str | None = None, shape: str | None = None) -> int:
    def fits(item: Shape) -> bool:
        return colour in (None, item.colour) and shape in (None, item.shape)

    return sum(fits(item) for item in scene.shapes)
