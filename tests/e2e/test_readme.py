"""The README proves itself: its library example runs, its commands parse, the files it names exist."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def _commands() -> list[list[str]]:
    """Every command of the README's shell blocks, one list of words each."""
    lines = [line for block in _blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


def test_there_are_two_commands_to_start_with():
    first, second = _blocks("bash")[:2]
    assert "scripts/txt2img.py --prompt" in first and first.startswith("pip install torch torchvision && ")
    assert "pytest" in second and second.startswith("pip install torch torchvision && ")


@pytest.mark.parametrize("words", [c for c in _commands() if c[0] == "python" and c[1].startswith("scripts/")], ids=" ".join)
def test_scripts_exist_and_take_these_flags(words):
    assert (ROOT / words[1]).is_file()
    task = Path(words[1]).stem
    if task in ("txt2img", "img2img"):
        from ldm.inference.args import build_parser

        build_parser(task).parse_args(words[2:])


def test_configs_named_in_the_readme_exist():
    for name in re.findall(r"(?:configs|models)/[\w/.-]+\.(?:yaml|md|safetensors)", README):
        assert (ROOT / name).is_file(), name


def test_pictures_named_in_the_readme_exist():
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_the_library_example_draws(monkeypatch):
    """One picture with the shipped model, exactly as the README says."""
    monkeypatch.chdir(ROOT)
    names: dict = {}
    (example,) = _blocks("python")
    exec(compile(example, "README.md", "exec"), names)
    image = names["image"]
    assert image.shape == (1, 3, 256, 256)
    assert image.isfinite().all() and image.min() > -1.5 and image.max() < 1.5
