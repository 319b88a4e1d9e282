from __future__ import annotations

from pathlib import Path

import pytest

from ldm.inference.prompts import MAX_SEED, plan, read_prompts
from ldm.util import UserError


def test_blank_and_comment_lines_are_skipped(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\r\n  # a remark\r\n  zwei gr\u00fcne Sterne \r\n".encode())
    assert read_prompts(file) == ["a red circle", "zwei gr\u00fcne Sterne"]


@pytest.mark.parametrize(("content", "words"), [(b"", "no prompt"), (b"\n# only this\n\n", "no prompt"), (b"\xff\xfe\x00", "UTF-8")])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes, words: str):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompts(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path)


def test_pictures_come_in_the_order_of_the_lines_with_a_ragged_last_batch():
    batches = list(plan(["a", "b", "c", "d", "e"], "", seed=10, n_iter=2, batch_size=2))
    assert [len(b) for b in batches] == [2, 2, 1, 2, 2, 1]
    assert [p for b in batches for p in b.prompts] == list("abcdeabcde")
    assert [s for b in batches for s in b.seeds] == list(range(10, 20))
    assert [b.start for b in batches] == [0, 2, 4, 5, 7, 9]


def test_seeds_do_not_depend_on_the_batch_size():
    one, four = (list(plan(["x"] * n, "", 5, 4 // n, n)) for n in (1, 4))
    assert [s for b in one for s in b.seeds] == [s for b in four for s in b.seeds] == [5, 6, 7, 8]


def test_seeds_wrap_round_at_the_top():
    assert [b.seeds for b in plan(["x", "y"], "", MAX_SEED, 1, 2)] == [(MAX_SEED, 0)]
