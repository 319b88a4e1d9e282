from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ldm.inference import args as module
from ldm.inference import facts
from ldm.inference.args import parse
from ldm.inference.facts import REPO
from ldm.inference.options import recorded_options
from ldm.inference.output import OutputFolder, metadata_texts
from ldm.inference.tasks import get_task
from ldm.util import UserError
from tests.inference.tiny import DATA

TINY = DATA / "tiny_text2image.yaml"


@pytest.fixture
def ckpt(tmp_path: Path) -> str:
    """A weights file that is never read, its config beside it."""
    (tmp_path / "config.yaml").write_text(TINY.read_text())
    (tmp_path / "model.safetensors").write_bytes(b"")
    return str(tmp_path / "model.safetensors")


@pytest.fixture
def legacy(tmp_path: Path) -> str:
    """As `ckpt`, of a model whose YAML has no defaults of its own."""
    config = yaml.safe_load(TINY.read_text())
    del config["sampling"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "old.ckpt").write_bytes(b"")
    return str(tmp_path / "old.ckpt")


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands for models/shapes."""
    folder = tmp_path / "models" / "shapes"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(TINY.read_text())
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(facts, "SHIPPED_CONFIG", folder / "config.yaml")
    monkeypatch.setattr(module, "SHIPPED_WEIGHTS", folder / "model.safetensors")
    return folder


def own(ckpt: str, *flags: str) -> list[str]:
    return ["--ckpt", ckpt, "--safety", "off", "--prompt", "x", *flags]


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom ldm.inference.args import build_parser\nfor task in ('txt2img', 'img2img'): build_parser(task).format_help()\n"
        "print([m for m in ('torch', 'pytorch_lightning', 'transformers', 'cv2', 'omegaconf') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert ran.stdout.strip() == "[]"


def test_the_model_that_ships_sets_the_defaults(shipped: Path):
    options = parse("txt2img", [])
    assert (options.sampler, options.steps, options.scale) == ("ddim", 4, 2.0)
    assert (options.H, options.W, options.C, options.f) == (64, 64, 4, 8)
    assert (options.n_samples, options.n_iter, options.columns) == (4, 1, 4)
    assert options.ckpt == str(shipped / "model.safetensors") and not options.own_model
    assert options.prompts == [module.DEFAULT_PROMPT] * 4
    assert (options.safety, options.watermark, options.rng, options.seed) == ("card", "dwtDctSvd", "image", 42)


def test_naming_the_shipped_weights_is_no_model_of_ones_own(shipped: Path):
    assert not parse("txt2img", ["--ckpt", str(shipped / "model.safetensors"), "--prompt", "x"]).own_model


def test_a_model_of_ones_own_gets_the_originals_defaults(legacy: str, tmp_path: Path):
    options = parse("txt2img", own(legacy))
    assert (options.sampler, options.steps, options.scale, options.n_samples, options.n_iter) == ("ddim", 50, 7.5, 3, 2)
    assert options.config == str(tmp_path / "old.yaml") and options.own_model
    Image.new("RGB", (100, 150)).save(tmp_path / "init.png")
    options = parse("img2img", own(legacy, "--init-img", str(tmp_path / "init.png")))
    assert (options.scale, options.n_samples, options.n_iter, options.strength) == (5.0, 2, 1, 0.75)
    assert (options.W, options.H) == (96, 144)  # nearest multiples of 16


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--ddim_steps", "7"], "steps", 7),
        (["--steps", "7"], "steps", 7),
        (["--ddim-steps=7"], "steps", 7),
        (["--plms"], "sampler", "plms"),
        (["--negative-prompt", "red-ish thing"], "negative_prompt", "red-ish thing"),
        (["--n-samples", "2"], "n_samples", 2),
        (["--bf16"], "precision", "bf16"),
        (["--fixed-code"], "fixed_code", True),
        (["--skip-grid", "--skip_save"], "skip_save", True),
        (["--scale=-1.5"], "scale", -1.5),
        (["--negative_prompt", "--red-ish thing"], "negative_prompt", "--red-ish thing"),
        (["--H", "80"], "H", 80),
        (["--watermark_text", "me"], "watermark_text", "me"),
    ],
)
def test_both_dialects_and_both_spellings(ckpt: str, flags: list[str], field: str, value: object):
    assert getattr(parse("txt2img", own(ckpt, *flags)), field) == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--H", "250"], "--H 250 must be a multiple of 16: use 240 or 256"),
        (["--W", "5"], "--W 5 must be a multiple of 16: use 16"),
        (["--ddim_steps", "0"], "--steps 0 must lie in 1 to 1000"),
        (["--steps", "1001"], "--steps 1001 must lie in 1 to 1000"),
        (["--sampler", "eular"], "unknown sampler 'eular': did you mean euler"),
        (["--plms", "--ddim_eta", "0.5"], "--ddim_eta 0.5 has no meaning for sampler plms"),
        (["--n_samples", "0"], "--n_samples 0 must be at least 1"),
        (["--n_iter", "-1"], "--n_iter -1 must be at least 1"),
        (["--n_rows", "-1"], "--n_rows -1 must be 0"),
        (["--seed", "-1"], "--seed -1 must lie in 0 to 4294967295"),
        (["--scale", "nan"], "--scale nan must be a finite number"),
        (["--ddim_eta", "-1"], "--ddim_eta -1.0 must be 0 or more"),
        (["--C", "3"], "--C 3 does not fit the model, whose config says 4"),
        (["--f", "4"], "--f 4 does not fit the model, whose config says 8"),
        (["--laion400m"], "--laion400m is not supported"),
        (["--torchscript"], "--torchscript is not supported"),
        (["--ipex"], "--ipex is not supported"),
        (["--watermark_text", "too long"], "--watermark_text 'too long' must be 1 to 4"),
        (["--safety_ckpt", "/nowhere"], "safety weights '/nowhere' do not exist"),
        (["--config", "/nowhere.yaml"], "config '/nowhere.yaml' does not exist"),
    ],
)
def test_wrong_input_is_told_before_weights_are_read(ckpt: str, flags: list[str], message: str):
    with pytest.raises(UserError, match="^" + message.replace("(", r"\(").replace(".", r"\.")):
        parse("txt2img", own(ckpt, *flags))


def test_everything_wrong_is_told_at_once(ckpt: str):
    with pytest.raises(UserError) as caught:
        parse("txt2img", own(ckpt, "--H", "250", "--steps", "0", "--sampler", "x", "--seed", "-1"))
    text = str(caught.value)
    assert all(part in text for part in ("--H 250", "--steps 0", "unknown sampler", "--seed -1")) and "\n" not in text


def test_missing_files_are_told(tmp_path: Path, ckpt: str):
    with pytest.raises(UserError, match=r"checkpoint '/nowhere\.ckpt' does not exist"):
        parse("txt2img", own("/nowhere.ckpt"))
    with pytest.raises(UserError, match=r"prompt file '/nowhere\.txt' does not exist"):
        parse("txt2img", ["--ckpt", ckpt, "--safety", "off", "--from-file", "/nowhere.txt"])
    with pytest.raises(UserError, match="needs a picture to start from"):
        parse("img2img", own(ckpt))
    (tmp_path / "init.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"--init-img: .*not a picture"):
        parse("img2img", own(ckpt, "--init_img", str(tmp_path / "init.png")))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/some.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):  # without a config beside it, the weights are looked at
        parse("txt2img", own(str(tmp_path / "alone/some.ckpt")))


def test_strength_lies_in_0_to_1(ckpt: str, tmp_path: Path):
    Image.new("RGB", (64, 64)).save(tmp_path / "init.png")
    for strength in ("-0.1", "1.1", "nan"):
        with pytest.raises(UserError, match=r"--strength .* must lie in 0 to 1"):
            parse("img2img", own(ckpt, "--init-img", str(tmp_path / "init.png"), "--strength", strength))
    base = own(ckpt, "--init-img", str(tmp_path / "init.png"))
    for strength in (0.0, 0.25, 1.0):
        assert parse("img2img", [*base, "--strength", str(strength)]).strength == strength  # of 4 steps
    with pytest.raises(UserError, match=r"--strength 0\.2 of 4 steps is less than a step: give --steps 5 or more"):
        parse("img2img", [*base, "--strength", "0.2"])


def jsonl(tmp_path: Path, *lines: dict[str, object]) -> str:
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "p.jsonl")


def test_every_line_may_bring_its_own_picture(legacy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Then the run needs none; and as with one for the run, each decides the size where nothing else does."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("wide", (96, 48)), ("high", (40, 100))):
        Image.new("RGB", size).save(f"{name}.png")
        Image.new("L", size, 255).save(f"{name}-mask.png")
    base = ["--ckpt", legacy, "--safety", "off", "--from-file"]
    lines = [{"prompt": "x", "init_img": "wide.png"}, {"prompt": "y", "init_img": "high.png", "strength": 0.5}]

    def sizes(options) -> list[tuple[int, int]]:
        found = [dataclasses.replace(options, **line.overrides) for line in options.prompts]
        return [(each.W, each.H) for each in found]

    assert sizes(parse("img2img", [*base, jsonl(tmp_path, *lines)])) == [(96, 48), (32, 96)]
    assert sizes(parse("img2img", [*base, jsonl(tmp_path, *lines), "--H", "64", "--W", "80"])) == [(80, 64), (80, 64)]
    assert sizes(parse("img2img", [*base, jsonl(tmp_path, lines[0], {**lines[1], "H": 16, "W": 16})])) == [(96, 48), (16, 16)]
    assert sizes(parse("img2img", [*base, jsonl(tmp_path, lines[1], {"prompt": "z"}), "--init-img", "wide.png"])) == [(32, 96), (96, 48)]
    masked = [{**line, "mask": line["init_img"].replace(".", "-mask.")} for line in lines]
    assert sizes(parse("inpaint", [*base, jsonl(tmp_path, *masked)])) == [(96, 48), (32, 96)]
    for task, wrong, message in (
        ("img2img", [lines[0], {"prompt": "z"}], "^line 2: img2img needs a picture"),
        ("img2img", [{"prompt": "z"}], "^img2img needs a picture"),
        ("img2img", [lines[0], {"prompt": "z", "init_img": 3}], "^line 2: init_img 3 must be of type str"),
        ("inpaint", [masked[0], lines[1]], "^line 2: inpainting needs a mask"),
    ):
        with pytest.raises(UserError, match=message):
            parse(task, [*base, jsonl(tmp_path, *wrong)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeat", "2"], "--repeat repeats the lines of --from_file"),
        (["--progress_every", "2"], "--progress_every says nothing without --save_progress"),
        (["--watermark_text", "me", "--watermark", "none"], "--watermark_text says nothing with --watermark none"),
        (["--safety_ckpt", "."], "--safety_ckpt says nothing with --safety off"),
        (["--negative_prompt", "blue", "--scale", "1"], "--negative_prompt says nothing at --scale 1"),
        (["--guidance_rescale", "0.5", "--scale", "1"], "--guidance_rescale says nothing at --scale 1"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(ckpt: str, flags: list[str], message: str):
    with pytest.raises(UserError, match="^" + message):
        parse("txt2img", own(ckpt, *flags))


def test_guidance_needs_a_class_that_stands_for_nothing(tmp_path: Path):
    """ImageNet's 1000 classes of cin256 have none, the 1001 of cin256-v2 do."""
    (tmp_path / "m.ckpt").write_bytes(b"")
    base = ["--ckpt", str(tmp_path / "m.ckpt"), "--safety", "off", "-n", "1000", "--config"]
    plain, guided = str(REPO / "models/ldm/cin256/config.yaml"), str(REPO / "configs/latent-diffusion/cin256-v2.yaml")
    assert parse("sample_diffusion", [*base, plain]).scale == 1.0 and parse("sample_diffusion", [*base, guided]).scale == 1.5
    assert [parse("sample_diffusion", [*base, config]).prompts[-1] for config in (plain, guided)] == ["class 999"] * 2
    assert parse("sample_diffusion", [*base, guided, "--n_samples", "1001"]).prompts[-1] == "class 0"
    with pytest.raises(UserError, match="none of this model's 1000 classes stands for nothing"):
        parse("sample_diffusion", [*base, plain, "--scale", "3"])


# ---------------------------------------------------------------------- the YAML's `sampling:` and what follows from flags
@pytest.fixture
def zoo_model(tmp_path: Path):
    """Flags that name a shipped YAML, with these defaults under `sampling:`, and weights that are never read."""

    def call(config: str, **sampling: object) -> list[str]:
        content = yaml.safe_load((REPO / config).read_text())
        (tmp_path / "zoo.yaml").write_text(yaml.safe_dump({**content, **({"sampling": sampling} if sampling else {})}))
        (tmp_path / "zoo.ckpt").write_bytes(b"")
        return ["--config", str(tmp_path / "zoo.yaml"), "--ckpt", str(tmp_path / "zoo.ckpt"), "--safety", "off"]

    return call


CLASSES, FACES = "configs/latent-diffusion/cin256-v2.yaml", "models/ldm/celeba256/config.yaml"


@pytest.mark.parametrize("sampling", [{}, {"sampler": "ddim"}], ids=["none", "own"])
@pytest.mark.parametrize("name", ["ddim", "DDIM", " Ddim"])
def test_the_spelling_of_a_sampler_decides_nothing(zoo_model, name: str, sampling: dict[str, object]):
    options = parse("sample_diffusion", [*zoo_model(FACES, **sampling), "--sampler", name])
    assert (options.sampler, options.ddim_eta) == ("ddim", 1.0)
    options = parse("sample_diffusion", [*zoo_model(FACES, sampler=name), "-n", "1"])
    assert (options.sampler, options.ddim_eta) == ("ddim", 1.0)
    assert parse("sample_diffusion", [*zoo_model(FACES, **sampling), "--sampler", "PLMS"]).ddim_eta is None
    with pytest.raises(UserError, match=r"^unknown sampler 'DDIMM': did you mean ddim"):
        parse("sample_diffusion", [*zoo_model(FACES, **sampling), "--sampler", "DDIMM"])


def test_what_follows_from_flags_wins_over_the_yaml(zoo_model):
    def classes(*numbers: int, **sampling: object) -> tuple[int, int, bool, float]:
        flags = ["--classes", *map(str, numbers)] if numbers else []
        options = parse("sample_diffusion", [*zoo_model(CLASSES, steps=5, **sampling), *flags])
        assert len(options.prompts) == options.n_samples and options.steps == 5
        return options.n_samples, options.columns, options.skip_grid, options.scale

    assert classes(*range(12)) == (12, 10, False, 1.5) and classes(*range(7)) == (7, 7, False, 1.5)
    assert classes(3) == classes() == (4, 4, False, 1.5), "the YAML's defaults stand above the task's"
    assert classes(n_samples=200, scale=3.0) == (200, 10, True, 3.0)
    assert classes(*range(12), n_samples=2) == (12, 10, False, 1.5)
    for sampling in ({"sampler": "ddim", "steps": 5}, {"sampler": "euler_a", "steps": 5, "ddim_eta": 0.5}):
        options = parse("sample_diffusion", [*zoo_model(FACES, **sampling), "--vanilla_sample"])
        assert (options.sampler, options.steps, options.ddim_eta) == ("ddpm", 1000, None)
        assert parse("sample_diffusion", [*zoo_model(FACES, **sampling)]).ddim_eta == sampling.get("ddim_eta", 1.0)
        assert parse("sample_diffusion", [*zoo_model(FACES, **sampling), "--sampler", "plms"]).ddim_eta is None
        assert parse("sample_diffusion", [*zoo_model(FACES, **sampling), "--sampler", "ddim"]).ddim_eta == 1.0


def test_a_model_that_cannot_be_guided_is_not_whatever_its_yaml_says(zoo_model, tmp_path: Path):
    for name in ("one", "two"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / f"{name}.png")
    one, two = str(tmp_path / "one.png"), str(tmp_path / "two.png")
    assert parse("upscale", [*zoo_model("models/ldm/bsr_sr/config.yaml", scale=3.0), "--init-img", one]).scale == 1.0
    inpaint = zoo_model("models/ldm/inpainting_big/config.yaml", scale=3.0, steps=7)
    options = parse("inpaint", [*inpaint, "--init-img", one, "--mask", two])
    assert (options.scale, options.steps, options.strength) == (1.0, 7, 1.0)
    depth = zoo_model("configs/stable-diffusion/v2-midas-inference.yaml", scale=3.0)
    options = parse("depth2img", [*depth, "--init-img", one, "--prompt", "x"])
    assert (options.strength, options.scale) == (0.9, 3.0), "only what follows from --depth alone is drawn from pure noise"


def test_shares_between_two_pictures_say_how_many_there_are(zoo_model, tmp_path: Path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    base = zoo_model("configs/stable-diffusion/v2-1-stable-unclip-h-inference.yaml", steps=3, n_samples=2)
    pair = ["--init-img", str(tmp_path / "a.png"), "--second_img", str(tmp_path / "a.png")]
    options = parse("unclip", [*base, *pair, "--mix", "0", "0.5", "1"])
    assert (options.n_samples, options.steps, options.fixed_code) == (3, 3, True)
    assert parse("unclip", [*base, *pair]).n_samples == 2


def test_a_line_with_its_own_picture_is_resolved_as_a_run(zoo_model, tmp_path: Path):
    """The YAML's --ddim_eta is of its own sampler; a line with another one says none."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    base = zoo_model("configs/stable-diffusion/v2-inference.yaml", sampler="ddim", ddim_eta=0.5)
    lines = [{"prompt": "x", "init_img": str(tmp_path / "a.png"), **more} for more in ({}, {"sampler": "PLMS"}, {"sampler": "DDIM"})]
    found = parse("img2img", [*base, "--from-file", jsonl(tmp_path, *lines)])
    assert found.ddim_eta == 0.5
    assert [line.overrides.get("ddim_eta", 0.5) for line in found.prompts] == [0.5, None, 0.5]


def test_a_folder_of_pairs_without_a_model_is_told_of_the_model(tmp_path: Path):
    for name in ("a", "a_mask"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"^checkpoint 'missing\.ckpt' does not exist: check --ckpt$"):
        parse("inpaint", ["--indir", str(tmp_path), "--ckpt", "missing.ckpt", "--safety", "off"])


def test_guidance_of_single_lines_is_looked_at(ckpt: str, tmp_path: Path):
    base = ["--ckpt", ckpt, "--safety", "off", "--negative_prompt", "blue", "--scale", "1", "--from-file"]
    assert parse("txt2img", [*base, jsonl(tmp_path, {"prompt": "x", "scale": 3}, {"prompt": "y"})]).negative_prompt == "blue"
    with pytest.raises(UserError, match=r"^line 2: negative_prompt says nothing at scale 1"):
        parse("txt2img", [*base, jsonl(tmp_path, {"prompt": "x", "scale": 3}, {"prompt": "y", "negative_prompt": "red"})])


def test_the_size_of_an_upscaled_picture_follows_from_it(tmp_path: Path):
    (tmp_path / "m.ckpt").write_bytes(b"")
    Image.new("RGB", (24, 40)).save(tmp_path / "small.png")
    base = ["--config", str(REPO / "configs/stable-diffusion/x4-upscaling.yaml"), "--ckpt", str(tmp_path / "m.ckpt"), "--safety", "off"]
    line = {"prompt": "x", "init_img": str(tmp_path / "small.png")}
    found = parse("upscale", [*base, "--from-file", jsonl(tmp_path, line)]).prompts[0].overrides
    assert {"H": 160, "W": 96, "small_height": 40, "small_width": 24}.items() <= found.items()
    with pytest.raises(UserError, match="unknown key 'H'"):
        parse("upscale", [*base, "--from-file", jsonl(tmp_path, {**line, "H": 32})])


def test_no_safety_weights_is_a_refusal_that_names_the_flags(ckpt: str):
    with pytest.raises(UserError, match=r"--safety_ckpt, or choose --safety off"):
        parse("txt2img", ["--ckpt", ckpt, "--prompt", "x"])


def test_a_model_of_ones_own_has_no_default_prompt(ckpt: str):
    with pytest.raises(UserError, match="nothing to draw"):
        parse("txt2img", ["--ckpt", ckpt, "--safety", "off"])


@pytest.mark.parametrize("flags", [["--stepz", "4"], ["--H", "abc"], ["--rng", "none"], ["--prompt", "a", "--from_file", "b"], ["stray"]])
def test_what_the_parser_refuses_is_one_line_and_code_2(ckpt: str, flags: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse("txt2img", ["--ckpt", ckpt, *flags])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1


def test_a_prompt_file_is_repeated_line_by_line(ckpt: str, tmp_path: Path):
    (tmp_path / "p.txt").write_text("a\n\n# b\nc\n")
    options = parse("txt2img", ["--ckpt", ckpt, "--safety", "off", "--from-file", str(tmp_path / "p.txt"), "--repeat", "2"])
    assert [line.prompt for line in options.prompts] == ["a", "a", "c", "c"]


# ---------------------------------------------------------------------- --reproduce
def picture(ckpt: str, tmp_path: Path, **changes: object) -> str:
    """A PNG with the record of a run with `ckpt`."""
    options = dataclasses.replace(parse("txt2img", own(ckpt, "--seed", "9", "--steps", "3", "--negative_prompt", "no")))
    record = json.loads(json.dumps(recorded_options(options))) | changes
    batch = {"index": 0, "start": 0, "prompts": ["x"], "negatives": ["no"], "seeds": [9]}
    texts = metadata_texts(
        {"prompt": "x", "seed": 9, "options": record, "model": {"sha256": "0", "ckpt": "m"}, "batch": batch, "versions": {"ldm": "1"}}
        if {"steps", "sampler", "scale", "W", "H"} <= set(record)
        else {}
    )
    return str(OutputFolder(tmp_path / "seen").save_sample(np.zeros((64, 64, 3), np.uint8), texts))


def test_reproduce_takes_the_flags_from_the_picture(ckpt: str, tmp_path: Path):
    options = parse("txt2img", ["--reproduce", picture(ckpt, tmp_path), "--outdir", "elsewhere"])
    assert (options.seed, options.steps, options.negative_prompt, options.outdir) == (9, 3, "no", "elsewhere")
    assert options.ckpt == ckpt and options.safety == "off"


def test_a_picture_of_a_prompt_file_gets_no_other_prompt(shipped: Path, ckpt: str, tmp_path: Path):
    seen = picture(ckpt, tmp_path)
    with Image.open(seen) as image:
        said = json.loads(image.text["ldm_metadata"])  # type: ignore[attr-defined]
        said["options"] = {name: value for name, value in said["options"].items() if name not in ("ckpt", "config", "prompt")}
        path = OutputFolder(tmp_path / "file").save_sample(np.asarray(image), {"ldm_metadata": json.dumps(said)})
    assert parse("txt2img", ["--reproduce", str(path)]).prompt is None


def test_reproduce_goes_with_no_flag_that_changes_the_picture(ckpt: str, tmp_path: Path):
    with pytest.raises(UserError, match="leave out --seed, --steps"):
        parse("txt2img", ["--reproduce", picture(ckpt, tmp_path), "--steps", "5", "--seed", "1"])
    with pytest.raises(UserError, match=r"use scripts/txt2img\.py --reproduce"):
        parse("img2img", ["--reproduce", picture(ckpt, tmp_path)])


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "3"},
        {"seed": True},
        {"rng": "other"},
        {"safety": "none"},
        {"precision": "fp8"},
        {"original_size": ["a", 1]},
        {"crop": [True, 1]},
        {"target_size": 3},
        {"config": 5},
        {"refiner_config": {"model": {}}},
        {"aesthetic_score": 10**400},
        {"steps": 10**400},
        {"safety_ckpt": "a\0b"},
        {"vae": 5000 * "x"},
        {"refiner": "a\0b"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_tampered_record_is_refused(ckpt: str, tmp_path: Path, change: dict[str, object]):
    with pytest.raises(UserError, match="tampered"):
        parse("txt2img", ["--reproduce", picture(ckpt, tmp_path, **change)])


@pytest.mark.parametrize(
    ("task", "name", "value", "right"),
    [("unclip", "mix", ["x"], [0, 0.5]), ("sample_diffusion", "classes", ["x"], [3]), ("unclip", "mix", [[0.5]], [1.0])],
)
def test_lists_of_a_record_are_looked_into(tmp_path: Path, task: str, name: str, value: object, right: object):
    def kept(value: object) -> object:
        texts = {"ldm_metadata": json.dumps({"format": 1, "options": {"task": task, name: value}, "batch": {}})}
        path = OutputFolder(tmp_path).save_sample(np.zeros((8, 8, 3), np.uint8), texts)
        return module.from_picture(get_task(task), {"reproduce": str(path)})[name]

    with pytest.raises(UserError, match=f"tampered with: its record says {name} = "):
        kept(value)
    assert kept(right) == right


def test_what_a_record_leaves_out_is_the_default_of_the_class(zoo_model, tmp_path: Path):
    """Not the task's: `ddim_eta` 1 of sample_diffusion would be drawn instead of the sampler's own, which is not recorded."""
    base = zoo_model("models/ldm/celeba256/config.yaml")
    options = parse("sample_diffusion", [*base, "-n", "1"])
    assert options.ddim_eta == 1.0
    for eta in (None, 0.25):
        said = json.loads(json.dumps(recorded_options(dataclasses.replace(options, ddim_eta=eta))))
        texts = {"ldm_metadata": json.dumps({"format": 1, "options": said, "batch": {}})}
        path = OutputFolder(tmp_path).save_sample(np.zeros((8, 8, 3), np.uint8), texts)
        again = parse("sample_diffusion", ["--reproduce", str(path)])
        assert again.ddim_eta == eta
        assert recorded_options(again) == recorded_options(dataclasses.replace(options, ddim_eta=eta))


def test_another_config_beside_the_shipped_weights_is_recorded(shipped: Path, tmp_path: Path):
    weights, other = str(shipped / "model.safetensors"), tmp_path / "other.yaml"
    other.write_text(TINY.read_text())
    assert not {"config", "ckpt"} & set(recorded_options(parse("txt2img", [])))
    assert not {"config", "ckpt"} & set(recorded_options(parse("txt2img", ["--prompt", "x", "--ckpt", weights])))
    options = parse("txt2img", ["--prompt", "x", "--ckpt", weights, "--config", str(other)])
    said = json.loads(json.dumps(recorded_options(options)))
    assert (said["config"], said["ckpt"]) == (str(other), weights) and not options.own_model
    texts = {"ldm_metadata": json.dumps({"format": 1, "options": said, "batch": {}})}
    path = OutputFolder(tmp_path).save_sample(np.zeros((8, 8, 3), np.uint8), texts)
    again = parse("txt2img", ["--reproduce", str(path)])
    assert again.config == str(other) and recorded_options(again) == recorded_options(options)


def test_a_picture_can_neither_widen_trust_nor_choose_the_folder(ckpt: str, tmp_path: Path):
    options = parse("txt2img", ["--reproduce", picture(ckpt, tmp_path, trust=["os"], outdir="/etc", verbose=True)])
    assert options.trust == [] and options.outdir == "outputs/txt2img-samples" and not options.verbose
