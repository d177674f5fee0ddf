"""SynthText's `gt.mat`: which words were drawn into each picture: `synthtext`. Called through `get_converter`.

The file is MATLAB's; of its variables `imnames` and `txt` are read, each with a cell a picture: its name, and its text
blocks, whose lines are parted by line breaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from llava_sv.data.converters import prompts
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.matlab import read_texts
from llava_sv.errors import UserError


def synthtext(inputs: Inputs) -> Iterator[Item]:
    """A record for each picture, its blocks in the order in which they were drawn."""
    for path in inputs.files:
        found = read_texts(path, ("imnames", "txt"))
        for number, (name, texts) in enumerate(zip_longest(found["imnames"], found["txt"])):
            if name is None or texts is None:
                raise UserError(
                    f"{path}: has pictures without texts, or texts without pictures, from entry {number} on"
                )
            lines = [line.strip() for text in texts for line in text.splitlines()]
            text = "\n".join(line for line in lines if line)
            where = f"{path} entry {number}"
            if not name or not text:
                yield Item(where, problem="has no text" if name else "has no picture")
            else:
                identity = f"{inputs.source.name}/{name[0]}"
                yield Item(where, conversation(identity, [(prompts.READ, text)], [inputs.image(name[0])]))
