"""Python 3.10 is enough: no syntax and no name of the standard library that came later.

mypy says the same of types (pyproject.toml: python_version); this looks at scripts and tests too, without it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 10)

LATER_MODULES = {"tomllib", "wsgiref.types", "asyncio.taskgroups", "compression", "annotationlib", "string.templatelib"}
LATER_NAMES = {
    "datetime": {"UTC"},
    "enum": {"StrEnum", "ReprEnum", "EnumCheck", "verify", "member", "nonmember", "global_enum", "property"},
    "typing": {
        *("Self", "LiteralString", "Never", "Required", "NotRequired", "Unpack", "TypeVarTuple", "assert_never"),
        *("assert_type", "reveal_type", "dataclass_transform", "override", "TypeAliasType", "ReadOnly", "TypeIs"),
    },
    "contextlib": {"chdir"},
    "hashlib": {"file_digest"},
    "itertools": {"batched"},
    "math": {"exp2", "cbrt", "sumprod", "fma"},
    "operator": {"call"},
    "warnings": {"deprecated"},
    "builtins": {"ExceptionGroup", "BaseExceptionGroup"},
}
"""Module -> names that Python 3.11 or later added."""


def later(source: str) -> list[str]:
    """What `source` uses that Python 3.10 does not have, by name."""
    tree = ast.parse(source, feature_version=OLDEST)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "version_info" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in LATER_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if node.module in LATER_MODULES else []
            names = LATER_NAMES.get(node.module or "", set())
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name in names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in LATER_NAMES.get(node.value.id, set()):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Name) and node.id in LATER_NAMES["builtins"]:
            found.append(node.id)
    return found


def test_no_file_uses_what_came_after_python_3_10():
    files = [
        path for folder in ("llava_sv", "tests", "scripts", "playground/tiny") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 400
    found = {path.relative_to(ROOT).as_posix(): later(path.read_text(encoding="utf-8")) for path in files}
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import tomllib", ["tomllib"]),
        ("from datetime import UTC", ["datetime.UTC"]),
        ("import enum\nclass A(enum.StrEnum): pass", ["enum.StrEnum"]),
        ("def f(): raise ExceptionGroup('a', [])", ["ExceptionGroup"]),
        ("import sys\nif sys.version_info >= (3, 11):\n    import tomllib", []),
        ("from typing import Any\nmatch 1:\n    case _: pass", []),
    ],
)
def test_what_is_found(source, uses):
    assert later(source) == uses


@pytest.mark.parametrize("source", ["try:\n    pass\nexcept* ValueError:\n    pass", "type A = int"])
def test_later_syntax_is_refused(source):
    with pytest.raises(SyntaxError):
        later(source)


def test_the_oldest_python_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'requires-python = ">=3\.10"', text)
    assert 'target-version = "py310"' in text
    assert 'python_version = "3.10"' in text
