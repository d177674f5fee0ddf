"""docs/Architecture.md tells the truth: what it quotes stands in the files it names, and its tree is the tree."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n# (?P<file>[\w/.]+)\n(?P<code>.*?)^```", re.M | re.S)
QUOTES = [(page.name, m["file"], m["code"]) for page in PAGES for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]
ARCHITECTURE = (ROOT / "docs/Architecture.md").read_text(encoding="utf-8")


def stands_in(code: str, text: str) -> bool:
    """Whether the lines of `code` stand in `text`, in a row, whatever the quote's own indentation."""
    quoted, lines = textwrap.dedent(code).strip("\n").splitlines(), text.splitlines()
    windows = (lines[start : start + len(quoted)] for start in range(len(lines) - len(quoted) + 1))
    return any(textwrap.dedent("\n".join(window)).splitlines() == quoted for window in windows)


def first_line(path: Path) -> str:
    """What a new file's line in the tree might say: the first sentence of its docstring."""
    match = re.match(r'"""(.+?)(?:[.:] |\.?"""|\.?\n)', path.read_text(encoding="utf-8"), re.S)
    return match[1] if match else ""


def test_there_are_quotes():
    assert len([quote for quote in QUOTES if quote[0] == "Architecture.md"]) >= 8


@pytest.mark.parametrize(("page", "file", "code"), QUOTES, ids=[f"{page}-{file}" for page, file, _ in QUOTES])
def test_quoted_code_stands_in_the_file(page, file, code):
    assert (ROOT / file).is_file(), f"{page} quotes {file}"
    assert stands_in(code, (ROOT / file).read_text(encoding="utf-8")), f"{page}: {file} no longer reads\n{code}"


def test_a_quote_that_differs_is_found():
    text = "def f():\n    a = 1\n    b = 2\n"
    assert stands_in("a = 1\nb = 2\n", text)
    assert not stands_in("a = 1\nb = 3\n", text)
    assert not stands_in("a = 1\n\nb = 2\n", text)


def test_the_tree_names_every_file_and_no_other():
    tree = re.search(r"## Every file.*?```\n(.*?)```", ARCHITECTURE, re.S)
    assert tree
    named = re.findall(r"^(llava_sv/[\w/.]+\.py) {2,}\S", tree[1], re.M)
    there = {
        path.relative_to(ROOT).as_posix(): path for path in (ROOT / "llava_sv").rglob("*.py") if path.stat().st_size
    }
    assert len(named) == len(set(named))
    gone = sorted(set(named) - set(there))
    new = [f"{name}  {first_line(path)}" for name, path in sorted(there.items()) if name not in named]
    assert not gone, f"docs/Architecture.md names files that are not there: {gone}"
    assert not new, "docs/Architecture.md lacks:\n" + "\n".join(new)


def test_every_dict_that_extending_names_is_there():
    text = (ROOT / "docs/Extending.md").read_text(encoding="utf-8")
    named = re.findall(r"`([A-Z_]+)` in `([\w/.]+\.py)`", text)
    assert len(named) >= 10
    for name, file in named:
        assert re.search(rf"^{name}: dict\[", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{name} in {file}"


def test_data_page_lists_every_template_and_policy():
    from llava_sv.conversation import CONV_TEMPLATES
    from llava_sv.data.image_policy import POLICIES
    from llava_sv.mm_utils import ASPECT_RATIOS

    text = (ROOT / "docs/Data.md").read_text(encoding="utf-8")
    first_cells = set(re.findall(r"`([\w]+)`", "\n".join(re.findall(r"^\| ([^|]+) \|", text, re.M))))
    assert {*CONV_TEMPLATES, *POLICIES, *ASPECT_RATIOS} <= first_cells
