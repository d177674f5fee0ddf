"""A random scene of coloured shapes and perhaps one word, its picture, and its description in words.

What arrives is a `random.Random`; what leaves is a `Scene`, a PIL image or a sentence. `toy.py` writes data sets of
them, and `playground/tiny` trains the tiny base models on the ordinary ones, `random_scene`'s.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "green": (40, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (242, 208, 30),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
    "black": (20, 20, 24),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
WORDS: tuple[str, ...] = (
    *("sun", "map", "tea", "dog", "cat", "box", "key", "fox"),
    *("ice", "owl", "pen", "bus", "hat", "jam", "zip", "cup"),
)
MAX_SHAPES = len(PLACES)
WORD_BAND = 0.24
"""Share of the picture's height that the word's band takes."""
WORD_SIZE = 0.23
"""Size of the word's font, a share of the picture's shorter side."""

FINE_SIDE = (128, 192)
"""Longer side of a fine scene's picture, least and most pixels."""
FINE_RADIUS = (4.0 / 128, 4.7 / 128)
"""Radius of a fine scene's shapes, in shares of the longer side. The encoder of `playground/tiny` knows such a shape by
its patches where the longer side is 128 pixels, and mostly not where it is 64; likewise the word."""
FINE_WORD_SIZE = (13.2 / 128, 14.7 / 128)
"""Size of the font of a fine scene's word, in shares of the longer side."""

_WORD_HALF = (1.0, 0.6)
"""Half width and half height of the largest of `WORDS`, in sizes of the font."""
_FINE_GAP = 2 / 128
"""Least distance of a fine scene's shapes from its word and the tiles' borders, and of all from the picture's edge."""

_BACKGROUNDS = ((236, 236, 236), (250, 246, 236), (226, 236, 246), (238, 228, 240), (228, 242, 230), (214, 214, 218))


@dataclass(frozen=True)
class Shape:
    """One coloured shape. `place` indexes `PLACES`; centre and radius are shares of width, height and shorter side."""

    colour: str
    shape: str
    place: int
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Scene:
    """What one picture shows. `word_centre` is in shares of width and height, `word_size` of the shorter side; `noise`
    seeds the distractors."""

    shapes: tuple[Shape, ...]
    word: str | None
    word_centre: tuple[float, float]
    background: tuple[int, int, int]
    size: tuple[int, int]
    noise: int
    word_size: float = WORD_SIZE

    @property
    def signature(self) -> tuple:
        """What can be asked about, and nothing else: two scenes with one signature have the same answers."""
        return (*sorted((s.place, s.colour, s.shape) for s in self.shapes), self.word or "")


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene: one to four shapes in different quadrants, no two alike, in three of four cases with a word."""
    word = rng.choice(WORDS) if rng.random() < 0.75 else None
    word_on_top = rng.random() < 0.5
    word_y = WORD_BAND / 2 if word_on_top else 1 - WORD_BAND / 2
    top = WORD_BAND if word and word_on_top else 0.0
    bottom = 1 - WORD_BAND if word and not word_on_top else 1.0
    places = rng.sample(range(len(PLACES)), rng.randint(1, MAX_SHAPES))
    looks = _random_looks(rng, len(places))
    shapes = [_random_shape(rng, look, place, top, bottom) for look, place in zip(looks, places)]
    if rng.random() < 0.4:
        shapes = _overlap_neighbours(shapes)
    side = rng.randint(96, 176)
    other = round(side * rng.uniform(0.82, 1.0))
    return Scene(
        shapes=tuple(shapes),
        word=word,
        word_centre=(rng.uniform(0.36, 0.64), word_y),
        background=rng.choice(_BACKGROUNDS),
        size=(side, other) if rng.random() < 0.5 else (other, side),
        noise=rng.getrandbits(32),
    )


def _random_looks(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` different (colour, shape) pairs that share a colour or a shape more often than chance would."""
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if looks and rng.random() < 0.45:
            earlier = rng.choice(looks)
            colour, shape = (earlier[0], shape) if rng.random() < 0.4 else (colour, earlier[1])
        if (colour, shape) not in looks:
            looks.append((colour, shape))
    return looks


def _random_shape(rng: random.Random, look: tuple[str, str], place: int, top: float, bottom: float) -> Shape:
    row, column = divmod(place, 2)
    half = (bottom - top) / 2
    x = 0.25 + 0.5 * column + rng.uniform(-0.06, 0.06)
    y = top + half * (row + 0.5) + rng.uniform(-0.03, 0.03)
    return Shape(*look, place, (x, y), rng.uniform(0.125, 0.17))


def _overlap_neighbours(shapes: list[Shape]) -> list[Shape]:
    """Move shapes that are side by side towards each other until they overlap; each stays in its own quadrant."""
    by_place = {shape.place: shape for shape in shapes}
    for left, right in ((0, 1), (2, 3)):
        if left in by_place and right in by_place:
            a, b = by_place[left], by_place[right]
            wanted = 0.8 * (a.radius + b.radius)
            step = max(0.0, min(0.14, (b.centre[0] - a.centre[0] - wanted) / 2))
            by_place[left] = replace(a, centre=(a.centre[0] + step, a.centre[1]))
            by_place[right] = replace(b, centre=(b.centre[0] - step, b.centre[1]))
    return [by_place[shape.place] for shape in shapes]


def fine_scene(rng: random.Random) -> Scene:
    """Draw a fine scene: two to four tiny shapes, no two of a colour, and a small word, in a larger picture.

    Each shape has a quadrant to itself, and everything keeps clear of the middle lines of the picture padded to a
    square: its four tiles cut nothing.
    """
    side = rng.randint(*FINE_SIDE)
    other = round(side * rng.uniform(0.82, 1.0))
    size = (side, other) if rng.random() < 0.5 else (other, side)
    padding = ((1 - size[0] / side) / 2, (1 - size[1] / side) / 2)
    places = rng.sample(range(len(PLACES)), rng.randint(2, MAX_SHAPES))
    colours = rng.sample(list(COLOURS), len(places))
    radii = [rng.uniform(*FINE_RADIUS) for _ in places]
    word_size = rng.uniform(*FINE_WORD_SIZE)
    spots, word_spot = _fine_spots(rng, places, radii, word_size, padding)

    def share(spot: tuple[float, float]) -> tuple[float, float]:
        """From shares of the padded square to shares of the picture."""
        return (spot[0] - padding[0]) / (1 - 2 * padding[0]), (spot[1] - padding[1]) / (1 - 2 * padding[1])

    long = side / min(size)
    return Scene(
        shapes=tuple(
            Shape(colour, rng.choice(SHAPES), place, share(spot), radius * long)
            for colour, place, spot, radius in zip(colours, places, spots, radii)
        ),
        word=rng.choice(WORDS),
        word_centre=share(word_spot),
        background=rng.choice(_BACKGROUNDS),
        size=size,
        noise=rng.getrandbits(32),
        word_size=word_size * long,
    )


def _fine_spots(
    rng: random.Random, places: list[int], radii: list[float], word_size: float, padding: tuple[float, float]
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Centres of the shapes and of the word, in shares of the padded square; drawn again until nothing touches.

    A shape stands anywhere in its quadrant. The word stands in any quadrant as words stand in ordinary pictures: in a
    band along the top or the bottom, about halfway across.
    """
    half_width, half_height = (part * word_size + _FINE_GAP for part in _WORD_HALF)
    while True:
        row, column = divmod(rng.randrange(len(PLACES)), 2)
        down = rng.uniform(0.15, 0.22)
        word = (column + rng.uniform(0.38, 0.64)) / 2, (row + (down if rng.random() < 0.5 else 1 - down)) / 2
        spots = [_spot_in_quadrant(rng, place, 1.1 * radius, padding) for place, radius in zip(places, radii)]
        inside = (
            padding[0] + half_width <= word[0] <= 1 - padding[0] - half_width
            and padding[1] + half_height <= word[1] <= 1 - padding[1] - half_height
        )
        touching = any(
            abs(x - word[0]) < half_width + 1.1 * radius and abs(y - word[1]) < half_height + 1.1 * radius
            for (x, y), radius in zip(spots, radii)
        )
        if inside and not touching:
            return spots, word


def _spot_in_quadrant(
    rng: random.Random, place: int, reach: float, padding: tuple[float, float]
) -> tuple[float, float]:
    """A centre from which `reach` stays inside the quadrant and the picture, in shares of the padded square."""
    row, column = divmod(place, 2)
    margin = reach + _FINE_GAP
    x = rng.uniform(max(column / 2, padding[0]) + margin, min((column + 1) / 2, 1 - padding[0]) - margin)
    y = rng.uniform(max(row / 2, padding[1]) + margin, min((row + 1) / 2, 1 - padding[1]) - margin)
    return x, y


def render(scene: Scene) -> Image.Image:
    """Draw the scene at its own size, RGB."""
    width, height = scene.size
    image = Image.new("RGB", scene.size, scene.background)
    draw = ImageDraw.Draw(image)
    _draw_distractors(draw, scene)
    for shape in scene.shapes:
        centre = (shape.centre[0] * width, shape.centre[1] * height)
        _draw_shape(draw, shape, centre, shape.radius * min(width, height), scene.background)
    if scene.word:
        x, y = scene.word_centre[0] * width, scene.word_centre[1] * height
        font = _font(round(scene.word_size * min(width, height)))
        draw.text((x, y), scene.word, fill=(60, 60, 70), font=font, anchor="mm")
    return image


def _draw_distractors(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Thin grey lines and specks under everything else."""
    rng = random.Random(scene.noise)
    width, height = scene.size
    grey = tuple(max(0, c - 34) for c in scene.background)
    for _ in range(rng.randint(0, 3)):
        ends = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(2)]
        draw.line(ends, fill=grey, width=max(1, round(min(width, height) / 80)))
    for _ in range(rng.randint(0, 6)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), min(width, height) / 64
        draw.ellipse((x - r, y - r, x + r, y + r), fill=grey)


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: Shape,
    centre: tuple[float, float],
    radius: float,
    background: tuple[int, int, int],
) -> None:
    x, y = centre
    fill = COLOURS[shape.colour]
    if shape.shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        if shape.shape == "ring":
            hole = 0.55 * radius
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
        return
    draw.polygon([(x + radius * u, y + radius * v) for u, v in _OUTLINES[shape.shape]], fill=fill)


def _star() -> list[tuple[float, float]]:
    radii = (1.1, 0.45)
    return [(radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)]


_ARM = 0.36
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.05), (1.05, 0.85), (-1.05, 0.85)],
    "star": _star(),
    "cross": [
        *[(-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)],
        *[(_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)],
    ],
}


@functools.lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font: the same pixels wherever Pillow runs."""
    return ImageFont.load_default(size=size)


def article(colour: str) -> str:
    """`an` before a vowel, else `a`."""
    return "an" if colour[0] in "aeiou" else "a"


def describe(scene: Scene) -> str:
    """The caption: every shape with its place, in the order of `scene.shapes` (a random one), and the word."""
    parts = [f"{article(s.colour)} {s.colour} {s.shape} at the {PLACES[s.place]}" for s in scene.shapes]
    if scene.word:
        parts.append(f"the word {scene.word}")
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return listed[0].upper() + listed[1:] + "."
