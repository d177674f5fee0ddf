"""References to pictures: their parts by hand, and what is refused."""

from __future__ import annotations

import pytest

from llava_sv.data.image_refs import ImageRef, parse_ref, row_ref, tar_ref
from llava_sv.errors import UserError


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("coco/000009.jpg", ImageRef("coco/000009.jpg")),
        (row_ref("a/b.parquet", "image", 12), ImageRef("a/b.parquet", "image/12", column="image", row=12)),
        (row_ref("b.arrow", "images", 3, 1), ImageRef("b.arrow", "images/3/1", column="images", row=3, item=1)),
        (tar_ref("s/0.tar", "d/7.jpg", 1536, 99), ImageRef("s/0.tar", "d/7.jpg", offset=1536, size=99)),
        ("s/0.tar::7@2.jpg", ImageRef("s/0.tar", "7@2.jpg")),
        ("i.zip::t/1.jpg", ImageRef("i.zip", "t/1.jpg")),
    ],
)
def test_parts(text, ref):
    assert parse_ref(text) == ref


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/etc/passwd", "absolute"),
        ("C:\\windows\\a.png", "absolute"),
        ("~/a.png", "absolute"),
        ("a/../../b.png", "climbs"),
        ("a\\..\\b.png", "climbs"),
        ("a\0b.png", "no path"),
        ("../x.tar::a.png", "climbs"),
        ("x.tar::../a.png@0+4", "climbs"),
        ("x.zip::/a.png", "absolute"),
        ("x.parquet::image", "COLUMN/ROW"),
        ("x.png::image/1", "no container"),
    ],
)
def test_refused(text, says):
    with pytest.raises(UserError, match=says) as caught:
        parse_ref(text)
    assert "\n" not in str(caught.value)
