"""`llava-sv data toy`: a small visual question answering data set, drawn here, in LLaVA's own formats.

What arrives is a command line; what leaves is a folder with images/, pretrain.json (captions), sft.json
(conversations) and bench.jsonl (held-out questions in six categories). The quickstart and the tests call it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from llava_sv.constants import DEFAULT_IMAGE_TOKEN
from llava_sv.data.toy_questions import ANSWER_PROMPT, CATEGORIES, Question, ask_some
from llava_sv.data.toy_scene import Scene, describe, random_scene, render
from llava_sv.errors import UserError
from llava_sv.files import replacing, write_text

DEFAULT_OUTPUT = "playground/data/toy"
QUESTIONS_PER_IMAGE = 8
EXAMPLE = """example:
  llava-sv data toy --output playground/data/toy --train 4000 --bench 360 --seed 1
"""


def scene_of(seed: int, split: str, index: int) -> Scene:
    """The `index`-th scene of a split: depends on these three alone, not on how many are drawn."""
    return random_scene(_rng(seed, split, index))


def _rng(seed: int, *names: object) -> random.Random:
    return random.Random("/".join(map(str, ("llava-sv toy", seed, *names))))


def _turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def pretrain_record(name: str, image: str, scene: Scene) -> dict:
    """A caption in LLaVA's pretraining form."""
    return {
        "id": name,
        "image": image,
        "conversations": [_turn("human", DEFAULT_IMAGE_TOKEN), _turn("gpt", describe(scene))],
    }


def conversation(opening: str, questions: Iterable[Question]) -> list[dict[str, str]]:
    """Turns that ask `questions` one after another; the first also carries `opening` and the request to be short."""
    turns: list[dict[str, str]] = []
    for question in questions:
        text = question.text if turns else f"{opening}\n{question.text}\n{ANSWER_PROMPT}"
        turns += [_turn("human", text), _turn("gpt", question.answer)]
    return turns


def sft_record(name: str, image: str, scene: Scene, rng: random.Random) -> dict:
    """Several questions about one image."""
    turns = conversation(DEFAULT_IMAGE_TOKEN, ask_some(scene, rng, QUESTIONS_PER_IMAGE))
    return {"id": name, "image": image, "conversations": turns}


def text_only_record(name: str, scene: Scene, rng: random.Random) -> dict:
    """Several questions about a scene that is told in words."""
    return {"id": name, "conversations": conversation(describe(scene), ask_some(scene, rng, QUESTIONS_PER_IMAGE))}


def two_image_record(name: str, images: list[str], scenes: list[Scene], rng: random.Random) -> dict:
    """Questions about a first and a second image, in mixed order."""
    asked: list[Question] = []
    for order, scene in zip(("first", "second"), scenes):
        for q in ask_some(scene, rng, QUESTIONS_PER_IMAGE // 2):
            text = f"In the {order} image: {q.text.replace(' in the image', '')}"
            asked.append(Question(q.category, text, q.answer, q.choices))
    rng.shuffle(asked)
    opening = f"{DEFAULT_IMAGE_TOKEN}\n{DEFAULT_IMAGE_TOKEN}"
    return {"id": name, "image": images, "conversations": conversation(opening, asked)}


def bench_items(seed: int, count: int, seen: set[tuple]) -> Iterator[tuple[int, Scene, Question]]:
    """`count` questions on as many new scenes, categories in turn, none of whose signatures is in `seen`.

    Within a category and form of answer (yes/no, a number, ...) every answer comes equally often, to within one.
    """
    names = list(CATEGORIES)
    used: dict[tuple, Counter] = {}
    index = 0
    for number in range(count):
        category = names[number % len(names)]
        while True:
            scene, rng = scene_of(seed, "bench", index), _rng(seed, "bench question", index)
            index += 1
            question = CATEGORIES[category](scene, rng)
            if scene.signature in seen or question is None:
                continue
            counter = used.setdefault((category, question.choices), Counter())
            if counter[question.answer] <= min(counter[choice] for choice in question.choices[: _asked(question)]):
                counter[question.answer] += 1
                break
        yield number, scene, question


def _asked(question: Question) -> int:
    """How many of the choices are ever the answer: counting one kind goes from 0 to 2, though 4 may be named."""
    return 3 if question.category == "count" and question.choices[0] == "0" else len(question.choices)


def bench_record(name: str, image: str, question: Question) -> dict:
    """One benchmark line; the question carries the request to be short, as LLaVA's evaluation does."""
    return {
        "id": name,
        "image": image,
        "category": question.category,
        "question": f"{question.text}\n{ANSWER_PROMPT}",
        "answer": question.answer,
        "choices": list(question.choices),
    }


def _write_image(path: Path, scene: Scene) -> None:
    picture = render(scene)
    with replacing(path) as temporary:
        if path.suffix == ".png":
            picture.save(temporary, format="PNG", compress_level=1)
        else:
            picture.save(temporary, format="JPEG", quality=90)


def _write_records(path: Path, records: list[dict]) -> None:
    lines = ",\n".join(json.dumps(record) for record in records)
    write_text(path, f"[\n{lines}\n]\n")


def _image_name(split: str, index: int) -> str:
    return f"{split}-{index:06d}.{'png' if index % 3 == 2 else 'jpg'}"


def write_toy(output: Path, seed: int, train: int, bench: int, text_only: int, two_images: int) -> None:
    """Write the whole data set under `output`; the same arguments give the same bytes."""
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    scenes = [scene_of(seed, "train", i) for i in range(train)]
    names = [_image_name("train", i) for i in range(train)]
    items = list(bench_items(seed, bench, {scene.signature for scene in scenes}))
    drawn = [*zip(names, scenes), *((_image_name("bench", n), scene) for n, scene, _ in items)]
    for name, scene in tqdm(drawn, desc="toy images", unit="image"):
        _write_image(images / name, scene)

    sft = [sft_record(f"toy-{i}", names[i], scenes[i], _rng(seed, "sft", i)) for i in range(train)]
    for i in range(text_only):
        sft.append(text_only_record(f"toy-text-{i}", scene_of(seed, "text", i), _rng(seed, "sft text", i)))
    for i in range(two_images):
        rng = _rng(seed, "sft two", i)
        a, b = rng.sample(range(train), 2)
        sft.append(two_image_record(f"toy-two-{i}", [names[a], names[b]], [scenes[a], scenes[b]], rng))
    _rng(seed, "order").shuffle(sft)

    _write_records(output / "pretrain.json", [pretrain_record(f"toy-{i}", names[i], scenes[i]) for i in range(train)])
    _write_records(output / "sft.json", sft)
    lines = [bench_record(f"bench-{n}", _image_name("bench", n), question) for n, _, question in items]
    write_text(output / "bench.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-sv data toy",
        description="Draw a small visual question answering data set in LLaVA's formats.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help=f"folder to write (default {DEFAULT_OUTPUT})")
    parser.add_argument("--seed", type=int, default=1, help="another seed draws other images (default 1)")
    parser.add_argument("--train", type=int, default=4000, help="training images (default 4000)")
    parser.add_argument("--bench", type=int, default=360, help="held-out questions, an image each (default 360)")
    parser.add_argument("--text-only", type=int, help="conversations without an image (default a tenth of --train)")
    parser.add_argument("--two-images", type=int, help="conversations on two images (default a tenth of --train)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns 0. Raises `UserError` for numbers that cannot be and a folder that cannot be written."""
    args = _parser().parse_args(argv)
    text_only = args.train // 10 if args.text_only is None else args.text_only
    two_images = args.train // 10 if args.two_images is None else args.two_images
    least = {"--train": (args.train, 2), "--bench": (args.bench, len(CATEGORIES))}
    least |= {"--text-only": (text_only, 0), "--two-images": (two_images, 0)}
    for flag, (value, minimum) in least.items():
        if value < minimum:
            raise UserError(f"{flag} {value}: give {minimum} or more")
    output = Path(args.output)
    try:
        write_toy(output, args.seed, args.train, args.bench, text_only, two_images)
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there ({error.strerror}): choose another folder") from error
    print(f"{output}: {args.train} training images, {args.train + text_only + two_images} conversations, "
          f"{args.bench} benchmark questions")  # fmt: skip
    return 0
