"""The table of fine-tuning: which prompts it counts, what it trains, and what it writes. Nothing is drawn or trained here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from ldm.data.shapes import parse
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/finetune_table.py, with a docs folder of its own."""
    spec = importlib.util.spec_from_file_location("finetune_table", ROOT / "scripts" / "finetune_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "finetuning.md").write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_the_groups_of_prompts(script):
    groups = script.prompts_of("green", "star", 6)
    assert {name: len(group) for name, group in groups.items()} == {"alone": 6, "beside": 6, "others": 6}
    for name in ("alone", "beside"):
        for record in groups[name]:
            looks = {(part.color, part.shape) for part in parse(record.prompt).parts}
            assert ("green", "star") in looks and (len(looks) == 1) == (name == "alone")
            assert record.prompt.count("green star") == 1, "the place of a learnt word"
    assert not any(record.unseen for record in groups["others"])
    with pytest.raises(UserError, match="red heart is no held-out combination; these are purple heart, "):
        script.prompts_of("red", "heart", 1)


def test_from_training_to_the_page(script, tmp_path, monkeypatch, capsys):
    drawn: list[tuple[list[str], Any]] = []

    def draw(records, flags, look, word):
        assert look == ("purple", "heart")
        drawn.append((list(flags), word))
        return [(len(drawn) > 1, i == 0 or len(drawn) > 1) for i in range(len(records))]

    def train(method, args, folder):
        folder.mkdir()
        for name in ("lora.safetensors", "embedding.safetensors", "model.safetensors"):
            (folder / name).write_bytes(b"0" * 2048)
        return folder, 90.0

    monkeypatch.setattr(script, "draw", draw)
    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "trained_values", lambda run: (1234, 300))
    args = script.build_parser().parse_args(["--n", "2", "--outdir", str(tmp_path / "out"), "--docs", "--draw", "--steps", "9"])
    script.run(args)
    page = (tmp_path / "docs" / "finetuning.md").read_text()
    assert page.startswith("before\n<!-- table -->\n| method | a purple heart is shown |") and page.endswith("<!-- /table -->\nafter\n")
    assert "old" not in page and "| none, called *purple heart* | 25% | 0% | 0% | 0% | | | |" in page
    assert "| none, called *sks heart* | 100% | 100% | 100% | 100% | | | |" in page
    assert "| LoRA | 100% | 100% | 100% | 100% | 1,234 | 2 KiB | 2 min |" in page and "drawn with --steps 9" in page
    assert (tmp_path / "out" / "table.md").read_text() in page
    assert json.loads((tmp_path / "out" / "results.json").read_text())["methods"]["dreambooth"]["others"] == 2
    model = ["--config", str(script.CONFIG), "--ckpt"]
    assert drawn[0][0] == [*model, str(script.SHIPPED), "--steps", "9"]
    assert drawn[1] == (drawn[0][0], ("purple heart", "sks heart")) and drawn[0][1] is None
    assert drawn[2][0][-4:-2] == ["--lora", str(tmp_path / "out" / "lora" / "lora.safetensors")]
    assert drawn[2][1] == drawn[4][1] == ("purple heart", "sks heart") and drawn[3][1] == ("purple heart", "<mine>")
    assert drawn[4][0][:4] == [*model, str(tmp_path / "out" / "dreambooth" / "model.safetensors")]
    assert "written: " in capsys.readouterr().out

    script.run(args)  # counted already
    assert len(drawn) == 5
    script.run(script.build_parser().parse_args(["--n", "3", "--outdir", str(tmp_path / "again")]))
    assert len(drawn) == 10


def test_a_training_of_other_settings_is_not_used(script, tmp_path):
    parse = script.build_parser().parse_args
    args, folder = parse(["--outdir", str(tmp_path)]), tmp_path / "lora"
    (folder / "now_run").mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps({"seconds": 90.0, "settings": script.settings_of(args)}))
    assert script.train("lora", args, folder) == (folder / "now_run", 90.0)
    with pytest.raises(UserError, match="from other weights or settings"):
        script.train("lora", parse(["--steps", "7"]), folder)


def test_a_run_that_did_not_finish_is_left_alone(script, tmp_path):
    args = script.build_parser().parse_args(["--outdir", str(tmp_path)])
    (tmp_path / "lora").mkdir()
    with pytest.raises(UserError, match="holds a run that did not finish"):
        script.train("lora", args, tmp_path / "lora")
