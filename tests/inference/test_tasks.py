"""The scripts beside txt2img and img2img, with tiny models made from the shipped YAMLs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.inference.cli import main
from ldm.inference.facts import REPO
from ldm.inference.output import METADATA_KEY, read_metadata, write_new_png
from ldm.inference.tasks import sample
from tests.inference.zoo import write_zoo_model

SD = "configs/stable-diffusion"
YAMLS = {
    "inpaint": f"{SD}/v2-inpainting-inference.yaml",
    "big": "models/ldm/inpainting_big/config.yaml",
    "text": f"{SD}/v2-inference.yaml",
    "faces": "models/ldm/celeba256/config.yaml",
    "depth": f"{SD}/v2-midas-inference.yaml",
    "x4": f"{SD}/x4-upscaling.yaml",
    "bsr": "models/ldm/bsr_sr/config.yaml",
    "unclip": f"{SD}/v2-1-stable-unclip-h-inference.yaml",
    "classes": "configs/latent-diffusion/cin256-v2.yaml",
    "layout": "models/ldm/layout2img-openimages256/config.yaml",
    "semantic": "models/ldm/semantic_synthesis256/config.yaml",
}


class DepthNet(nn.Module):
    """Stands for MiDaS: a bright pixel is near."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x.mean(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    """Weights of a shrunken shipped model by name, written when first asked for."""
    root, written = tmp_path_factory.mktemp("zoo"), {}

    def weights(name: str) -> str:
        if name not in written:
            changes = {"overrides": {"depth_stage_config": {"target": f"{__name__}.DepthNet"}}} if name == "depth" else {}
            written[name] = str(write_zoo_model(root / name, YAMLS[name], **changes))
        return written[name]

    return weights


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a picture, another one, and a mask of its middle, 64x64."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:40, 24:48] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


@pytest.fixture
def run(zoo, folder: Path):
    """Run a script with a model of the zoo; gives the pictures that it adds."""

    def call(task: str, model: str, *flags: str, steps: int | None = 2) -> list[np.ndarray]:
        before = set(Path("out/samples").glob("*.png"))
        argv = ["--ckpt", zoo(model), "--safety", "off", "--outdir", "out", *flags, *(["--steps", str(steps)] if steps else [])]
        assert (sample.main(argv) if task == "sample_diffusion" else main(task, argv)) == 0
        return [np.asarray(Image.open(path)) for path in sorted(set(Path("out/samples").glob("*.png")) - before)]

    return call


@pytest.fixture
def refusal(zoo, folder: Path, capsys: pytest.CaptureFixture[str]):
    """Run a script with what it must refuse; gives its one line."""

    def call(task: str, model: str, *flags: str) -> str:
        argv = ["--ckpt", zoo(model), "--safety", "off", "--outdir", "out", *flags]
        assert (sample.main(argv) if task == "sample_diffusion" else main(task, argv)) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1 and not Path("out").exists()
        return said.err

    return call


def picture(name: str) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB"))


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    return int(np.abs(a.astype(int) - b).max()) > 2


# ---------------------------------------------------------------------- inpaint
PAIR = ("--init-img", "one.png", "--mask", "mask.png")


def zones(blur: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(where to draw, what must come back to the bit)."""
    inside, far = np.zeros((64, 64), bool), np.ones((64, 64), bool)
    inside[16:40, 24:48] = True
    far[16 - blur : 40 + blur, 24 - blur : 48 + blur] = False
    return inside, far


@pytest.mark.parametrize(
    ("model", "flags"),
    [("inpaint", ("--prompt", "x")), ("big", ()), ("text", ("--prompt", "x")), ("faces", ())],
    ids=["9 channels", "LDM", "text model", "unconditional"],
)
def test_inpainting_keeps_what_is_not_masked(run, model, flags):
    (drawn,) = run("inpaint", model, *PAIR, *flags, "--H", "64", "--W", "64")
    inside, far = zones()
    assert np.array_equal(drawn[far], picture("one.png")[far])
    assert np.abs(drawn.astype(int) - picture("one.png"))[inside].mean() > 5


@pytest.mark.parametrize("model", ["inpaint", "big"])
def test_inpainting_networks_see_the_picture_around(run, model):
    """The same mask over another picture: what is drawn inside is another thing, from the same noise."""
    first, second = (run("inpaint", model, "--init-img", name, "--mask", "mask.png")[0] for name in ("one.png", "two.png"))
    assert differ(first[zones()[0]], second[zones()[0]])


def test_inpainting_follows_the_prompt_and_a_hard_edge(run):
    a, b = (run("inpaint", "inpaint", *PAIR, "--prompt", text, "--mask_blur", "0")[0] for text in ("a", "some other words"))
    inside, _ = zones()
    assert differ(a[inside], b[inside]) and np.array_equal(a[~inside], picture("one.png")[~inside])


def test_inpainting_from_the_picture_itself(run):
    """Strength 0 only passes the first stage, and so does the kept part of the latent at any strength."""
    kept, drawn = (run("inpaint", "text", *PAIR, "--prompt", "x", "--strength", strength)[0] for strength in ("0", "0.9"))
    assert differ(kept, drawn) and np.array_equal(kept[zones()[1]], picture("one.png")[zones()[1]])


def test_inpainting_a_folder_of_pairs(run):
    Path("pairs").mkdir()
    for name, size in (("a", (64, 64)), ("b", (70, 100))):  # b becomes 64x96
        Image.open("one.png").resize(size).save(f"pairs/{name}.png")
        Image.open("mask.png").resize(size).save(f"pairs/{name}_mask.png")
    first, second = run("inpaint", "big", "--indir", "pairs")
    assert first.shape == (64, 64, 3) and second.shape == (96, 64, 3)
    assert np.array_equal(first, run("inpaint", "big", *PAIR)[0])
    options = read_metadata("out/samples/00001.png")["options"]
    assert (options["init_img"], options["mask"], options["H"]) == ("pairs/b.png", "pairs/b_mask.png", 96)


def test_padding_is_drawn(run):
    Image.open("one.png").crop((0, 0, 64, 32)).save("wide.png")
    Image.new("L", (64, 32), 0).save("none.png")
    (drawn,) = run(
        "inpaint", "big", "--init-img", "wide.png", "--mask", "none.png", "--fit", "pad", "--H", "64", "--W", "64", "--mask_blur", "0"
    )
    assert np.array_equal(drawn[16:48], picture("wide.png")) and drawn[:16].std() > 0


def test_inpainting_with_sdxl_and_its_refiner(folder: Path, sdxl: tuple[Path, Path]):
    base, refiner = (str(path) for path in sdxl)
    flags = ["--ckpt", base, "--refiner", refiner, *PAIR, "--prompt", "x", "--steps", "4", "--safety", "off", "--outdir", "out"]
    assert main("inpaint", [*flags, "--save_progress", "webp"]) == 0
    drawn, far = picture("out/samples/00000.png"), zones()[1]
    assert np.array_equal(drawn[far], picture("one.png")[far]) and differ(drawn, picture("one.png"))
    film = Image.open("out/samples/00000.webp")
    assert film.n_frames > 3
    film.seek(1)
    assert np.array_equal(np.asarray(film.convert("RGB"))[far], picture("one.png")[far])


def test_inpainted_pictures_can_be_drawn_again(run, zoo):
    (drawn,) = run("inpaint", "inpaint", *PAIR, "--prompt", "x")
    argv = ["--reproduce", "out/samples/00000.png", "--safety_ckpt", "none", "--outdir", "again"]
    assert main("inpaint", argv[:2] + argv[4:]) == 0
    assert np.array_equal(picture("again/samples/00000.png"), drawn)
    Image.open("two.png").save("one.png")
    assert main("inpaint", argv[:2] + argv[4:]) == 2


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("inpaint", ("--init-img", "one.png", "--prompt", "x"), "needs a mask, white where to draw: --mask FILE"),
        ("inpaint", ("--mask", "mask.png", "--prompt", "x"), "needs a picture: --init-img FILE"),
        ("inpaint", ("--init-img", "one.png", "--mask", "lost.png", "--prompt", "x"), "'lost.png' does not exist"),
        ("inpaint", ("--init-img", "one.png", "--mask", "flat.png", "--prompt", "x"), "mask 'flat.png' is 64x32, the picture 64x64"),
        ("inpaint", (*PAIR, "--prompt", "x", "--H", "70"), "--H 70 must be a multiple of 64"),
        ("inpaint", (*PAIR, "--prompt", "x", "--mask_blur", "-1"), "--mask_blur -1"),
        ("inpaint", ("--indir", "out", "--prompt", "x"), "has no masks"),
        ("inpaint", ("--indir", ".", *PAIR, "--prompt", "x"), "leave out --init-img, --mask"),
        ("text", PAIR, "nothing to draw: give --prompt"),
        ("big", (*PAIR, "--prompt", "x"), "knows no text"),
        ("big", (*PAIR, "--scale", "3"), "--scale 3"),
        (
            "depth",
            (*PAIR, "--prompt", "x"),
            "describes a depth-to-image model, which scripts/inpaint.py cannot draw with: use scripts/depth2img.py",
        ),
    ],
)
def test_wrong_inpainting_is_refused(refusal, model, flags, message):
    Image.open("mask.png").crop((0, 0, 64, 32)).save("flat.png")
    assert message in refusal("inpaint", model, *flags)


def test_a_mask_without_white_is_refused(zoo, folder: Path, capsys):
    Image.new("L", (64, 64), 100).save("mask.png")
    assert main("inpaint", ["--ckpt", zoo("big"), "--safety", "off", *PAIR]) == 2
    assert "has no white" in capsys.readouterr().err


# ---------------------------------------------------------------------- depth2img
def write_depth(name: str, values: np.ndarray) -> None:
    if name.endswith(".npy"):
        np.save(name, values)
    else:
        Image.fromarray(values.astype(np.uint16)).save(name)


def test_depth_from_the_picture_or_from_a_file(run):
    gray = picture("one.png").astype(np.float32).mean(axis=2)
    write_depth("same.npy", gray)
    write_depth("same.png", gray * 200)  # 16 bits: only the order of the values counts, and their ratios
    flags = ("--init-img", "one.png", "--prompt", "x", "--n_samples", "1")
    (estimated,) = run("depth2img", "depth", *flags)
    for name in ("same.npy", "same.png"):
        (given,) = run("depth2img", "depth", *flags, "--depth", name)
        assert np.abs(given.astype(int) - estimated).mean() < 4  # MiDaS saw it at 384x384
    write_depth("other.npy", gray[::-1].copy())
    (other,) = run("depth2img", "depth", *flags, "--depth", "other.npy")
    assert np.abs(other.astype(int) - estimated).mean() > np.abs(given.astype(int) - estimated).mean() + 1


def test_a_depth_map_makes_midas_unnecessary(zoo, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Neither its weights nor its class are needed: the shipped YAML names the real one."""
    weights = write_zoo_model(
        tmp_path / "model", YAMLS["depth"], leave_out="depth_model.", overrides={"depth_stage_config": {"target": "torch.nn.Identity"}}
    )
    config = Path(weights).with_name("config.yaml")
    config.write_text(
        config.read_text().replace("target: torch.nn.Identity\n    unet", "target: ldm.modules.midas.api.MiDaSInference\n    unet")
    )
    write_depth("depth.png", np.arange(64 * 128).reshape(64, 128))
    base = ["--ckpt", str(weights), "--safety", "off", "--n_samples", "1", "--steps", "2", "--outdir", "out"]
    assert main("depth2img", [*base, "--prompt", "x", "--depth", "depth.png"]) == 0
    assert picture("out/samples/00000.png").shape == (64, 128, 3)
    lines = [{"prompt": text, "depth": "depth.png"} for text in "ab"]
    Path("maps.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main("depth2img", [*base, "--from-file", "maps.jsonl"]) == 0  # each line has its own
    assert picture("out/samples/00002.png").shape == (64, 128, 3)
    assert main("depth2img", [*base, "--prompt", "x", "--init-img", "depth.png"]) == 2
    assert "give the depth map by --depth FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("depth", ("--prompt", "x"), "needs a picture whose depth is kept"),
        ("depth", ("--prompt", "x", "--depth", "d.npy", "--strength", "0.5"), "name it by --init-img"),
        ("depth", ("--prompt", "x", "--depth", "lost.npy"), "depth map 'lost.npy' does not exist"),
        ("depth", ("--prompt", "x", "--depth", "three.npy"), "must be one channel"),
        ("depth", ("--prompt", "x", "--depth", "d.npy", "--init-img", "one.png"), "depth map is 40x20, the picture 64x64"),
        ("depth", ("--prompt", "x", "--init-img", "one.png", "--strength", "2"), "--strength 2.0"),
        ("inpaint", ("--prompt", "x", "--init-img", "one.png"), "use scripts/inpaint.py"),
    ],
)
def test_wrong_depth_is_refused(refusal, model, flags, message):
    np.save("d.npy", np.zeros((20, 40)))
    np.save("three.npy", np.zeros((20, 40, 3)))
    assert message in refusal("depth2img", model, *flags)


# ---------------------------------------------------------------------- upscale
@pytest.fixture
def small(folder: Path) -> tuple[str, str]:
    Image.open("one.png").resize((20, 13)).save("small.png")
    return ("--init-img", "small.png")


@pytest.mark.parametrize("model", ["x4", "bsr"])
def test_pictures_become_four_times_as_large_whatever_their_size(run, small, model):
    (drawn,) = run("upscale", model, *small)
    assert drawn.shape == (52, 80, 3)
    options = read_metadata("out/samples/00000.png")["options"]
    assert (options["H"], options["W"]) == (64, 96) and main("upscale", ["--reproduce", "out/samples/00000.png", "--outdir", "again"]) == 0
    assert np.array_equal(picture("again/samples/00000.png"), drawn)


def test_a_record_that_does_not_fit_its_small_picture_is_refused(run, small, capsys):
    run("upscale", "x4", *small)
    drawn = "out/samples/00000.png"
    Image.open("one.png").resize((40, 13)).save("small.png")
    assert main("upscale", ["--reproduce", drawn, "--outdir", "again"]) == 2
    assert "'small.png' is 40x13, too large for a result of 96x64" in capsys.readouterr().err
    record = read_metadata(drawn)
    record["options"]["zoom"] = 0
    write_new_png(Path("tampered.png"), picture(drawn), {METADATA_KEY: json.dumps(record)})
    assert main("upscale", ["--reproduce", "tampered.png", "--outdir", "again"]) == 2
    assert "the record says upscale by 0; this model is for upscale by 4" in capsys.readouterr().err


def test_the_small_picture_and_the_noise_level_count(run, small):
    first, noisier = (run("upscale", "x4", *small, "--noise_level", level)[0] for level in ("0", "300"))
    Image.open("two.png").resize((20, 13)).save("small.png")
    (other,) = run("upscale", "x4", *small, "--noise_level", "0")
    assert differ(first, noisier) and differ(first, other)


def test_noise_of_the_small_picture_belongs_to_the_seed(run, small):
    both = run("upscale", "x4", *small, "--n_samples", "2", "--seed", "5")
    (second,) = run("upscale", "x4", *small, "--seed", "6")
    assert differ(both[0], both[1]) and np.abs(both[1].astype(int) - second).max() <= 1


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("x4", (), "needs a picture: --init-img FILE"),
        ("x4", ("--init-img", "small.png", "--noise_level", "350"), "--noise_level 350 must lie in 0 to 349"),
        ("bsr", ("--init-img", "small.png", "--noise_level", "3"), "adds no noise"),
        ("bsr", ("--init-img", "small.png", "--prompt", "x"), "knows no text"),
        ("text", ("--init-img", "small.png"), "use scripts/txt2img.py"),
    ],
)
def test_wrong_upscaling_is_refused(refusal, small, model, flags, message):
    assert message in refusal("upscale", model, *flags)


# ---------------------------------------------------------------------- unclip
UNCLIP = ("--H", "64", "--W", "64")


def test_variations_follow_the_picture(run):
    a, b = (run("unclip", "unclip", *UNCLIP, "--init-img", name, "--n_samples", "1")[0] for name in ("one.png", "two.png"))
    (noisy,) = run("unclip", "unclip", *UNCLIP, "--init-img", "one.png", "--n_samples", "1", "--noise_level", "900")
    assert differ(a, b) and differ(a, noisy)


def test_the_way_from_one_picture_to_another(run):
    way = run("unclip", "unclip", *UNCLIP, "--init-img", "one.png", "--second_img", "two.png", "--n_samples", "3", "--noise_level", "50")
    flags = ("--n_samples", "3", "--fixed_code", "--noise_level", "50")
    ends = [run("unclip", "unclip", *UNCLIP, "--init-img", name, *flags)[0] for name in ("one.png", "two.png")]
    assert np.abs(way[0].astype(int) - ends[0]).max() <= 1 and np.abs(way[2].astype(int) - ends[1]).max() <= 1
    assert differ(way[0], way[1]) and differ(way[1], way[2])
    argv = ["--reproduce", "out/samples/00001.png", "--outdir", "again"]
    assert main("unclip", argv) == 0 and np.array_equal(picture("again/samples/00000.png"), way[1])
    pair = ("--init-img", "one.png", "--second_img", "two.png", "--noise_level", "50")
    middle = run("unclip", "unclip", *UNCLIP, *pair, "--mix", "0.5", "0.5", "0")
    assert len(middle) == 3 and all(np.abs(middle[i].astype(int) - way[j]).max() <= 1 for i, j in ((0, 1), (1, 1), (2, 0)))


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("unclip", (), "needs a picture to vary: --init-img FILE"),
        ("unclip", ("--init-img", "one.png", "--mix", "0.5"), "--mix says nothing without --second-img"),
        ("unclip", ("--init-img", "one.png", "--second_img", "two.png", "--mix", "0.5", "2"), "must lie in 0 to 1"),
        ("unclip", ("--init-img", "one.png", "--second_img", "two.png", "--mix", "0", "1", "--n_samples", "3"), "gives 2 shares"),
        ("unclip", ("--init-img", "one.png", "--noise_level", "1000"), "--noise_level 1000 must lie in 0 to 999"),
        ("classes", ("--init-img", "one.png"), "use scripts/sample_diffusion.py"),
    ],
)
def test_wrong_variations_are_refused(refusal, model, flags, message):
    assert message in refusal("unclip", model, *flags)


# ---------------------------------------------------------------------- sample_diffusion
SIZE = ("--H", "64", "--W", "64")


def test_classes_in_turn(run, zoo):
    drawn = run("sample_diffusion", "classes", *SIZE, "--classes", "3", "7", "-n", "3", "--batch_size", "2", "-e", "0", "--seed", "1")
    assert [read_metadata(f"out/samples/0000{i}.png")["prompt"] for i in range(3)] == ["class 3", "class 7", "class 3"]
    packed = np.load("out/3x64x64x3-samples.npz")["arr_0"]
    assert packed.dtype == np.uint8 and all(np.array_equal(a, b) for a, b in zip(packed, drawn, strict=True))
    (again,) = run("sample_diffusion", "classes", *SIZE, "--classes", "7", "-n", "1", "-e", "0", "--seed", "2")
    assert np.abs(again.astype(int) - drawn[1]).max() <= 1
    (other,) = run("sample_diffusion", "classes", *SIZE, "--classes", "8", "-n", "1", "-e", "0", "--seed", "2")
    (unguided,) = run("sample_diffusion", "classes", *SIZE, "--classes", "7", "-n", "1", "-e", "0", "--seed", "2", "--scale", "1")
    assert differ(again, other) and differ(again, unguided)
    assert sample.main(["--reproduce", "out/samples/00001.png", "--outdir", "again"]) == 0
    assert np.array_equal(picture("again/samples/00000.png"), drawn[1]) and not list(Path("again").glob("*.npz"))


def test_nothing_is_overwritten(run):
    for _ in range(2):
        run("sample_diffusion", "faces", *SIZE, "-n", "1")
    assert sorted(p.name for p in Path("out").glob("*.npz")) == ["1x64x64x3-samples-1.npz", "1x64x64x3-samples.npz"]


def test_vanilla_sampling_walks_all_timesteps(run, zoo, tmp_path: Path):
    weights = write_zoo_model(tmp_path / "short", YAMLS["faces"], overrides={"timesteps": 6})
    argv = ["-r", str(weights.parent), "-v", "-n", "1", *SIZE, "--safety", "off", "-l", "out"]
    assert sample.main(argv) == 0
    options = read_metadata("out/samples/00000.png")["options"]
    assert (options["sampler"], options["steps"]) == ("ddpm", 6)
    assert sample.main([*argv, "-c", "3"]) == 2


def test_layouts_and_label_maps_decide(run):
    boxes = [{"class": 3, "box": [0.1, 0.2, 0.5, 0.5]}, {"class": 30, "box": [0.5, 0.2, 0.5, 0.5]}]
    drawn = []
    for layout in (boxes, boxes[:1]):
        Path("layout.json").write_text(json.dumps(layout))
        drawn += run("sample_diffusion", "layout", *SIZE, "--layout", "layout.json", "-n", "1")
    assert differ(*drawn)
    drawn = []
    for label in (0, 181):
        Image.fromarray(np.full((8, 8), label, np.uint8)).save("labels.png")
        drawn += run("sample_diffusion", "semantic", *SIZE, "--segmentation", "labels.png", "-n", "1")
    assert differ(*drawn)


def test_folders_of_runs_and_of_released_models(zoo, folder: Path):
    weights = Path(zoo("faces"))
    (folder / "logs/run/configs").mkdir(parents=True)
    (folder / "logs/run/checkpoints").mkdir()
    (folder / "logs/run/configs/2026-01-01T00-00-00-project.yaml").write_text("model: {target: ldm.models.clip.ContrastiveCLIP}")
    (folder / "logs/run/configs/2026-01-02T00-00-00-project.yaml").write_text(weights.with_name("config.yaml").read_text())
    from ldm.inference.checkpoint import read_state_dict

    torch.save({"state_dict": read_state_dict(weights)}, folder / "logs/run/checkpoints/last.ckpt")
    for resume in ("logs/run", "logs/run/checkpoints/last.ckpt", str(weights.parent), str(weights)):
        assert sample.main(["-r", resume, "-n", "1", "-c", "2", "--safety", "off", *SIZE, "-l", "out", "--seed", "3"]) == 0
    drawn = [picture(str(path)) for path in sorted(Path("out/samples").glob("*.png"))]
    assert len(drawn) == 4 and all(np.abs(drawn[0].astype(int) - other).max() <= 1 for other in drawn)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("classes", ("--classes", "1001"), "--classes 1001: this model has classes 0 to 1000"),
        ("faces", ("--classes", "1"), "--classes has no meaning for this model (unconditional)"),
        ("faces", ("--scale", "2"), "--scale 2: only class-conditional"),
        ("layout", (), "name it by --layout"),
        ("layout", ("--layout", "wrong.json"), "object 1: class must be a whole number, and the box lie within"),
        ("semantic", ("--segmentation", "one.png"), "has colours"),
        ("semantic", ("--segmentation", "mask.png"), "has class 255; this model knows 0 to 181"),
        ("faces", ("--skip_save",), "add --skip_npz"),
        ("text", (), "describes a text-to-image model, which scripts/sample_diffusion.py cannot draw with: use scripts/txt2img.py"),
        ("bsr", (), "use scripts/upscale.py"),
    ],
)
def test_wrong_sampling_is_refused(refusal, model, flags, message):
    Path("wrong.json").write_text('[{"class": 1, "box": [0.5, 0.5, 0.9, 0.1]}]')
    assert message in refusal("sample_diffusion", model, *flags)


def test_a_missing_run_is_named(folder: Path, capsys):
    (folder / "empty").mkdir()
    for resume, message in (("lost", "does not exist"), ("empty", "has no weights")):
        assert sample.main(["-r", resume]) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------- all of them
def test_help_needs_no_torch():
    code = (
        "import sys; from ldm.inference.flags import build_parser; from ldm.inference.tasks import TASKS, reconstruct; "
        "[build_parser(name).format_help() for name in TASKS]; reconstruct.build_parser().format_help(); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


@pytest.mark.parametrize("task", ["txt2img", "img2img"])
def test_models_that_need_more_than_a_prompt_are_sent_to_their_script(refusal, task):
    flags = ("--prompt", "x", *(["--init-img", "one.png"] if task == "img2img" else []))
    for model, script in (("inpaint", "inpaint"), ("unclip", "unclip"), ("classes", "sample_diffusion"), ("bsr", "upscale")):
        assert f"use scripts/{script}.py" in refusal(task, model, *flags)


def test_flagged_pictures_are_replaced_in_every_script(zoo, folder: Path, strict: Path):
    from ldm.inference.safety import safety_card

    flags = ["--safety_ckpt", str(strict), "--outdir", "out", "--steps", "1", "--H", "64", "--W", "64"]
    assert main("inpaint", ["--ckpt", zoo("big"), *PAIR, *flags]) == 0
    assert sample.main(["--ckpt", zoo("faces"), "-n", "1", *flags]) == 0
    assert np.array_equal(picture("out/samples/00000.png"), safety_card(64, 64))
    assert np.array_equal(np.load("out/1x64x64x3-samples.npz")["arr_0"][0], safety_card(64, 64))
