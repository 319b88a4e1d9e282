from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm.inference.prompts import LINE_FLAGS, MAX_SEED, PromptLine, plan, read_prompts
from ldm.util import UserError


def jsonl(tmp_path: Path, *lines: Any) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


# -- text files ----------------------------------------------------------------------------------------------------------
def test_blank_and_comment_lines_are_skipped(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\r\n  # a remark\r\n  zwei gr\u00fcne Sterne \r\n".encode())
    assert read_prompts(file) == [PromptLine("a red circle", line=1), PromptLine("zwei gr\u00fcne Sterne", line=4)]


@pytest.mark.parametrize(("content", "words"), [(b"", "no prompt"), (b"\n# only this\n\n", "no prompt"), (b"\xff\xfe\x00", "UTF-8")])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, content: bytes, words: str):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompts(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path)


# -- JSONL ---------------------------------------------------------------------------------------------------------------
def test_lines_of_jsonl_carry_their_flags(tmp_path: Path):
    flags = {"negative_prompt": "blue", "seed": 7, "scale": 5, "steps": 3, "H": 64, "W": 128, "strength": 0.5, "crop": [0, 8]}
    file = jsonl(tmp_path, "# a remark", {"prompt": "a red circle", **flags}, "", {"prompt": ""})
    assert read_prompts(file) == [PromptLine("a red circle", flags, 2), PromptLine("", {}, 4)]


def test_keys_are_spelt_as_flags_may_be(tmp_path: Path):
    line = read_prompts(jsonl(tmp_path, {"negative-prompt": "x", "ddim-steps": 9, "prompt": "a"}))[0]
    assert line.overrides == {"negative_prompt": "x", "steps": 9}


def test_a_separator_inside_a_prompt_does_not_end_its_line(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one\u2028two"}', encoding="utf-8")
    assert [line.prompt for line in read_prompts(file)] == ["one\u2028two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "sede": 3}, r"line 2: unknown key 'sede'; allowed are prompt, H, W, aesthetic_score, .*seed"),
        ({"seed": 3}, 'line 2: needs "prompt"'),
        ({"prompt": ["a"]}, 'line 2: needs "prompt"'),
        ("[1, 2]", "line 2: must be a JSON object"),
        ('{"prompt": "a"', r"line 2: is not JSON \(.* at character 15\)"),
        ("a red circle", "line 2: is not JSON"),
        ('{"prompt": "a", "scale": NaN}', "line 2: NaN is not a number"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "line 2: gives seed twice"),
        ('{"prompt": "a", "steps": 1, "ddim_steps": 2}', "line 2: gives steps twice"),
        ({"prompt": "a", "seed": -1}, "line 2: seed -1 must be a whole number from 0 to 4294967295"),
        ({"prompt": "a", "seed": 1.5}, r"seed 1\.5 must be a whole number"),
        ({"prompt": "a", "seed": True}, "seed true must be a whole number"),
        ({"prompt": "a", "steps": 0}, "steps 0 must be a whole number from 1"),
        ({"prompt": "a", "strength": 1.5}, r"strength 1\.5 must be a number from 0 to 1"),
        ({"prompt": "a", "scale": "7"}, 'scale "7" must be a number'),
        ('{"prompt": "a", "scale": 1e999}', "scale Infinity must be a number"),
        ('{"prompt": "a", "scale": 1' + 400 * "0" + "}", r"prompts\.jsonl': line 2: scale 10{79}\.\.\. is too large for a number"),
        ('{"prompt": "a", "seed": 1' + 400 * "0" + "}", r"line 2: seed 10{79}\.\.\. must be a whole number from 0 to 4294967295"),
        ('{"prompt": "a", "crop": [0, "' + 400 * "0" + '"]}', r"line 2: crop .* must be a list of 2"),
        ('{"prompt": "a", "scale": 1' + 5000 * "0" + "}", "prompts.jsonl': line 2: (has a whole number of too many digits|scale 10+)"),
        ('{"prompt": ' + 100_000 * "[" + 100_000 * "]" + "}", r"prompts\.jsonl': line 2: is nested too deeply"),
        ({"prompt": "a", "negative_prompt": None}, "negative_prompt null must be text in quotes"),
        ({"prompt": "a", "crop": [1]}, r"crop \[1\] must be a list of 2, each a whole number from 0"),
        ({"prompt": "a", "H": 0, "W": "x"}, 'H 0 must be .*, W "x" must be'),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: Any, message: str):
    with pytest.raises(UserError, match=message):
        read_prompts(jsonl(tmp_path, {"prompt": "right"}, line))


def test_all_wrong_lines_are_told_at_once_and_the_list_stays_short(tmp_path: Path):
    with pytest.raises(UserError, match=r"line 1: .*; line 2: .*; line 5: .* \(and 2 more\)"):
        read_prompts(jsonl(tmp_path, *[{"prompt": "a", "x": 1}] * 7))


def test_the_allowed_flags_can_be_narrowed_and_widened(tmp_path: Path):
    assert "strength" in LINE_FLAGS
    with pytest.raises(UserError, match=r"unknown key 'strength'; allowed are prompt, noise_level, seed$"):
        read_prompts(jsonl(tmp_path, {"prompt": "a", "strength": 0.5}), {"seed", "noise_level"})
    assert read_prompts(jsonl(tmp_path, {"prompt": "a", "noise_level": 20}), {"noise_level"})[0].overrides == {"noise_level": 20}


# -- the plan ------------------------------------------------------------------------------------------------------------
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


def test_pictures_share_a_batch_as_far_as_their_flags_agree():
    lines = [
        PromptLine("a"),
        PromptLine("b", {"negative_prompt": "n", "seed": 3}),
        PromptLine("c", {"steps": 5}),
        PromptLine("d", {"steps": 5, "seed": 9}),
        PromptLine("e"),
    ]
    batches = list(plan(lines, "none", seed=10, n_iter=1, batch_size=4))
    assert [b.prompts for b in batches] == [("a", "b"), ("c", "d"), ("e",)]
    assert [b.start for b in batches] == [0, 2, 4]
    assert [b.negatives for b in batches] == [("none", "n"), ("none", "none"), ("none",)]
    assert [b.seeds for b in batches] == [(10, 3), (12, 9), (14,)]
    assert [dict(b.overrides) for b in batches] == [{}, {"steps": 5}, {}]


def test_a_seed_of_a_line_counts_on_when_it_is_drawn_again():
    line, other = PromptLine("a", {"seed": MAX_SEED}), PromptLine("a", {"seed": 1})
    assert [b.seeds for b in plan([line, line, other], "", 0, 2, 3)] == [(MAX_SEED, 0, 1), (1, 2, 2)]
