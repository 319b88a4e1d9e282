"""From the start of a process to a picture on the disk: our library and diffusers on one folder of weights, each in a process of its own.

A process is `python -m ldm.metrics.first_picture SIDE FOLDER PICTURE OPTIONS`; this module imports nothing heavy, so each side pays for
its own imports and nothing else. It says its seconds of processor time and its peak memory; the wall clock is the caller's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.metrics.against_diffusers import Work
    from ldm.metrics.stopwatch import Row

PROMPT = "a photograph of a lighthouse"
_PROMPT_IDS = [320, 8853, 539, 320, 13717]
TEXT_LAYERS = {"sd1": 12}
_LENGTH, _START, _END = 77, 49406, 49407


def write_folder(work: Work, folder: Path, seed: int = 0) -> Path:
    """A model with random weights as diffusers saves it: UNet, first stage, text encoder, scheduler."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm.metrics.against_diffusers import WIDTHS, their_scheduler, their_unet, their_vae

    torch.manual_seed(seed)
    size = WIDTHS[work.size]
    text = CLIPTextConfig(
        vocab_size=_END + 1,
        hidden_size=size["context"],
        intermediate_size=4 * size["context"],
        num_hidden_layers=TEXT_LAYERS.get(work.size, 2),
        num_attention_heads=12 if size["context"] % 12 == 0 else 2,
        bos_token_id=_START,
        eos_token_id=_END,
    )
    models = {"unet": their_unet(work), "vae": their_vae(work), "text_encoder": CLIPTextModel(text), "scheduler": their_scheduler()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}), encoding="utf-8")
    return folder


def first_picture(work: Work, folder: Path, rounds: int, threads: int, clock: str = "wall") -> list[Row]:
    """Two rows: seconds from start to picture, and peak memory in MB (of the process; on an accelerator, of its tensors)."""
    import numpy as np
    from PIL import Image

    from ldm.metrics.against_diffusers import relative
    from ldm.metrics.stopwatch import Row, alternate

    options = {
        "latent": work.latent, "steps": work.steps, "scale": work.scale, "device": str(work.device), "dtype": str(work.dtype).split(".")[1],
        "threads": threads,
    }  # fmt: skip

    def ask(side: str) -> tuple[float, float]:
        began = time.perf_counter()
        command = [sys.executable, "-m", "ldm.metrics.first_picture", side, str(folder), str(folder / f"{side}.png"), json.dumps(options)]
        done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the process of {side} failed:\n{done.stderr[-2000:]}")
        wall, said = time.perf_counter() - began, json.loads(done.stdout.splitlines()[-1])
        return (wall if clock == "wall" else said["seconds"]), said["peak"] / 1e6

    alternate(1, lambda: ask("ours"), lambda: ask("theirs"))  # files come into the page cache
    ours, theirs = alternate(rounds, lambda: ask("ours"), lambda: ask("theirs"))
    drawn = [np.asarray(Image.open(folder / f"{side}.png"), dtype=np.float64) for side in ("ours", "theirs")]
    difference = relative(*drawn)
    (seconds, peak), (their_seconds, their_peak) = (tuple(zip(*side, strict=True)) for side in (ours, theirs))
    return [
        Row(f"new process to first picture, {work.steps} steps", seconds, their_seconds, difference),
        Row("its peak memory", peak, their_peak, difference, "MB"),
    ]


# ---------------------------------------------------------------------------------------------------- inside the processes
def start_noise(options: dict[str, Any]) -> Any:
    """The same for both."""
    import torch

    side = options["latent"]
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))


def draw_ours(folder: str, options: dict[str, Any]) -> Any:
    """A picture, uint8 (H, W, 3), as a program over this library draws it."""
    import torch

    from ldm.imaging import to_uint8
    from ldm.inference.models import load_model
    from ldm.inference.weights.families import resolve_model
    from ldm.models.diffusion.ddim import DDIMSampler

    dtype = getattr(torch, options["dtype"])
    model = load_model(*resolve_model(None, folder), device=options["device"]).to(dtype)
    x = start_noise(options).to(options["device"])
    with torch.inference_mode():
        cond, empty = (model.get_learned_conditioning([text]) for text in (PROMPT, ""))
        guidance: dict[str, Any] = {"unconditional_guidance_scale": options["scale"], "unconditional_conditioning": empty}
        z, _ = DDIMSampler(model).sample(options["steps"], 1, x.shape[1:], cond, x_T=x, verbose=False, **guidance)
        return to_uint8(model.decode_first_stage(z.to(dtype)))[0]


def draw_theirs(folder: str, options: dict[str, Any]) -> Any:
    """A picture, uint8 (H, W, 3), as a program over diffusers draws it. The prompt is given as the ids that a tokeniser would find."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    dtype = getattr(torch, options["dtype"])
    parts = [
        cls.from_pretrained(f"{folder}/{name}", torch_dtype=dtype)
        for cls, name in ((AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"), (UNet2DConditionModel, "unet"))
    ]
    vae, text, unet = (part.eval().to(options["device"]) for part in parts)
    scheduler = DDIMScheduler.from_pretrained(f"{folder}/scheduler")
    pipeline = StableDiffusionPipeline(vae, text, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        words, nothing = (text(ids.to(options["device"]))[0] for ids in (_ids(_PROMPT_IDS), _ids([])))
        x = start_noise(options).to(options["device"], dtype)
        prompts = {"prompt_embeds": words, "negative_prompt_embeds": nothing}
        known = {"num_inference_steps": options["steps"], "guidance_scale": options["scale"], "output_type": "np"}
        image = pipeline(**prompts, latents=x, **known).images[0]
    return np.rint(image * 255.0).astype(np.uint8)


def _ids(words: list[int]) -> Any:
    import torch

    return torch.tensor([[_START, *words] + [_END] * (_LENGTH - 1 - len(words))])


def peak_memory(device: str) -> int:
    """Bytes: of the process on the CPU, of tensors on an accelerator."""
    if device != "cpu":
        import torch

        return torch.accelerator.max_memory_allocated()
    import resource  # of Unix alone

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> int:
    """One process: draw, save, and say what it took."""
    side, folder, picture, text = sys.argv[1:]
    options = json.loads(text)
    import torch

    torch.set_num_threads(options["threads"])
    image = (draw_ours if side == "ours" else draw_theirs)(folder, options)
    from PIL import Image

    Image.fromarray(image).save(picture)
    sys.stdout.write(json.dumps({"seconds": time.process_time(), "peak": peak_memory(options["device"])}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
