"""What commands ask of the files they are about to write."""

from __future__ import annotations

import pytest

from llava_sv.errors import UserError
from llava_sv.files import check_can_write, keep_existing


def test_what_exists_is_kept_unless_it_may_be_replaced(tmp_path):
    path = tmp_path / "report.json"
    keep_existing(str(path), overwrite=False)
    keep_existing(None, overwrite=False)
    path.write_text("old")
    keep_existing(str(path), overwrite=True)
    with pytest.raises(UserError) as error:
        keep_existing(str(path), overwrite=False)
    assert str(error.value) == f"--json {path}: exists; give another name, or --overwrite"
    with pytest.raises(UserError, match=r"^--markdown "):
        keep_existing(str(path), False, "--markdown")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file/report.json", tmp_path / "file/deeper/report.json"):
        with pytest.raises(UserError) as error:
            check_can_write("--json", path)
        assert str(error.value) == f"--json {path}: {tmp_path}/file is a file, not a folder; name another folder"
