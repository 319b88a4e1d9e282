"""Our networks and loops beside diffusers', with the same random weights and inputs, as pairs that `stopwatch` times.

Diffusers makes the weights, our own converter takes them over, in memory. diffusers is an extra for tests and benchmarks: it is imported
when a pair is made, and its absence is a `UserError`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ldm.inference.weights.diffusers_config import first_stage_config, schedule_params, unet_params
from ldm.inference.weights.diffusers_folder import apply_recipe
from ldm.inference.weights.diffusers_names import UNET, VAE, to_ours
from ldm.metrics.stopwatch import Pair
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import UserError, instantiate_from_config

TOKENS = 77
# Stable Diffusion 1 (860 M and 84 M parameters); the same at 0.4 and 0.5 of its widths (142 M and 21 M); and one for tests.
WIDTHS = {
    "small": {"unet": (128, 256, 512, 512), "heads": 4, "context": 768, "vae": (64, 128, 256, 256)},
    "sd1": {"unet": (320, 640, 1280, 1280), "heads": 8, "context": 768, "vae": (128, 256, 512, 512)},
    "tiny": {"unet": (32, 64, 64, 64), "heads": 2, "context": 24, "vae": (32, 32, 32, 32)},
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def check_diffusers() -> None:
    """Raise `UserError` where there is no diffusers to compare with."""
    if importlib.util.find_spec("diffusers") is None:
        raise UserError('diffusers is not installed, and there is nothing to compare with: pip install -e ".[test]"')


@dataclass(frozen=True)
class Work:
    """What is measured, and on what."""

    size: str = "small"  # of WIDTHS
    latent: int = 32  # side of the latent, an eighth of the picture's
    batch: int = 1  # pictures; with guidance the network sees twice as many
    steps: int = 10  # of DDIM
    scale: float = 7.5  # guidance
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    channels_last: bool = False  # memory order of both
    compile: bool = False  # torch.compile of the networks of both

    def __post_init__(self) -> None:
        if self.size not in WIDTHS:
            raise UserError(f"size {self.size!r} is unknown: use {', '.join(WIDTHS)}")
        if self.latent < 8 or self.latent % 8:
            raise UserError(f"latent {self.latent} must be a multiple of 8")
        if self.batch < 1 or self.steps < 1 or SCHEDULE["num_train_timesteps"] % self.steps:
            raise UserError(f"batch {self.batch} must be 1 or more, and {self.steps} steps divide 1000, so that both take the same ones")


def relative(ours: Any, theirs: Any) -> float:
    """Norm of the difference by norm of theirs; for tensors, arrays and numbers."""
    a, b = (torch.as_tensor(x).detach().double().cpu() for x in (ours, theirs))
    if a.shape != b.shape:
        raise UserError(f"results of the shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    return float((a - b).norm() / b.norm())


class Contest:
    """Both libraries' networks for one `Work`; every method gives a pair."""

    def __init__(self, work: Work, seed: int = 0) -> None:
        check_diffusers()
        self.work = work
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)

    # -------------------------------------------------------------------------------------------------------- networks
    @cached_property
    def unets(self) -> tuple[nn.Module, nn.Module]:
        """(ours, theirs), with one set of weights in memory."""
        from ldm.modules.diffusionmodules.openaimodel import UNetModel

        theirs = their_unet(self.work)
        return self._ready(_filled(UNetModel, unet_params(dict(theirs.config)), UNET, theirs), theirs)

    @cached_property
    def first_stages(self) -> tuple[Any, Any]:
        """(ours, theirs), with one set of weights in memory."""
        from ldm.models.autoencoder import AutoencoderKL

        theirs = their_vae(self.work)
        return self._ready(_filled(AutoencoderKL, first_stage_config(dict(theirs.config))["params"], VAE, theirs), theirs)

    def _ready(self, ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
        order = torch.channels_last if self.work.channels_last else torch.contiguous_format
        for network in (ours, theirs):
            network.eval().requires_grad_(False).to(self.work.device, self.work.dtype).to(memory_format=order)
            if self.work.compile:
                network.compile()
        return ours, theirs

    def _model(self, unet: nn.Module, first_stage: nn.Module) -> Any:
        """A LatentDiffusion of ours around two networks."""
        nothing = {"target": "torch.nn.Identity"}
        config = {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "first_stage_config": nothing,
                "cond_stage_config": {"target": "ldm.modules.encoders.modules.IdentityEncoder"},
                "conditioning_key": "crossattn",
                "unet_config": nothing,
                "scale_factor": 0.18215,
                "channels": 4,
                "image_size": self.work.latent,
                "use_ema": False,
                **schedule_params(SCHEDULE),
            },
        }
        model = instantiate_from_config(config).eval().requires_grad_(False).to(self.work.device)
        model.first_stage_model, model.model.diffusion_model = first_stage, unet
        return model

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.work.device, self.work.dtype)

    def _latent(self, batch: int) -> Tensor:
        return self._normal(batch, 4, self.work.latent, self.work.latent)

    def _context(self, batch: int) -> Tensor:
        return self._normal(batch, TOKENS, WIDTHS[self.work.size]["context"])

    # ----------------------------------------------------------------------------------------------------------- pairs
    def unet(self) -> Pair:
        """One call of the network for a guided step: both halves in one batch."""
        ours, theirs = self.unets
        n = 2 * self.work.batch
        x, context = self._latent(n), self._context(n)
        t = torch.full((n,), 501, device=self.work.device)
        return Pair(
            f"UNet, {n} x {tuple(x.shape[1:])}",
            _quietly(lambda: ours(x, t, context)),
            _quietly(lambda: theirs(x, t, context).sample),
            relative,
        )

    def txt2img(self) -> Pair:
        """The whole guided DDIM loop from a prompt's embedding, and decoding, to pixels."""
        from diffusers import StableDiffusionPipeline

        w = self.work
        model = self._model(self.unets[0], self.first_stages[0])
        sampler = DDIMSampler(model)
        pipeline = StableDiffusionPipeline(
            self.first_stages[1], None, None, self.unets[1], their_scheduler(), None, None, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        x, cond, empty = self._latent(w.batch), self._context(w.batch), self._context(w.batch)

        def ours() -> Tensor:
            guidance: dict[str, Any] = {"unconditional_guidance_scale": w.scale, "unconditional_conditioning": empty}
            z, _ = sampler.sample(w.steps, w.batch, x.shape[1:], cond, x_T=x, verbose=False, **guidance)
            return model.decode_first_stage(z.to(w.dtype)).clamp(-1, 1)

        def theirs() -> Tensor:
            prompts = {"prompt_embeds": cond, "negative_prompt_embeds": empty}
            images = pipeline(**prompts, latents=x, num_inference_steps=w.steps, guidance_scale=w.scale, output_type="pt").images
            return 2.0 * images - 1.0

        return Pair(f"txt2img, DDIM, {w.steps} steps, guidance, decoding", _quietly(ours), _quietly(theirs), relative)

    def decode(self) -> Pair:
        """Latents to pictures."""
        ours, theirs = self.first_stages
        z = self._latent(self.work.batch)
        return Pair("decode", _quietly(lambda: ours.decode(z)), _quietly(lambda: theirs.decode(z).sample), relative)

    def encode(self) -> Pair:
        """Pictures to the moments of their latents."""
        ours, theirs = self.first_stages
        image = self._normal(self.work.batch, 3, 8 * self.work.latent, 8 * self.work.latent).clamp(-1, 1)
        return Pair(
            "encode",
            _quietly(lambda: ours.encode(image).parameters),
            _quietly(lambda: theirs.encode(image).latent_dist.parameters),
            relative,
        )

    def training(self) -> Pair:
        """Noise, forward, backward and AdamW, each side on weights of its own; the result is the loss."""
        ours, theirs = self.unets
        w = self.work
        model = self._model(_copy(ours), nn.Identity())
        target = their_scheduler()
        x0, context, noise = self._latent(w.batch), self._context(w.batch), self._latent(w.batch)
        t = torch.randint(0, 1000, (w.batch,), generator=self.generator).to(w.device)
        mine = model.model.diffusion_model

        def step(network: nn.Module, predict: Callable[[], Tensor]) -> Callable[[], Tensor]:
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

            def run() -> Tensor:
                loss = torch.nn.functional.mse_loss(predict().float(), noise.float())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            return run

        other = _copy(theirs)
        return Pair(
            f"training step, {w.batch} x {tuple(x0.shape[1:])}",
            step(mine, lambda: model.apply_model(model.q_sample(x0, t, noise).to(w.dtype), t, context)),
            step(other, lambda: other(target.add_noise(x0, noise, t), t, context).sample),
            relative,
        )


def _quietly(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.inference_mode()(run)


def _copy(network: nn.Module) -> nn.Module:
    """A network to be trained, with weights of its own."""
    import copy

    return copy.deepcopy(network).train().requires_grad_(True)


def _filled(cls: Callable[..., nn.Module], params: Mapping[str, Any], kind: str, theirs: nn.Module) -> nn.Module:
    """A network of ours with diffusers' weights: built without memory, it shares theirs."""
    with torch.device("meta"):
        network = cls(**params)
    weights = theirs.state_dict()
    network.load_state_dict({name: apply_recipe(recipe, weights) for name, recipe in to_ours(kind, weights).items()}, assign=True)
    return network


def their_unet(work: Work) -> Any:
    """Diffusers' UNet of Stable Diffusion 1's plan, random; biases and norms too, so that nothing multiplies by exactly 0 or 1."""
    from diffusers import UNet2DConditionModel

    size = WIDTHS[work.size]
    return _stirred(
        UNet2DConditionModel(
            sample_size=work.latent,
            block_out_channels=size["unet"],
            cross_attention_dim=size["context"],
            attention_head_dim=size["heads"],  # diffusers' word for the number of heads
        )
    )


def their_vae(work: Work) -> Any:
    """Diffusers' KL autoencoder of factor 8, random."""
    from diffusers import AutoencoderKL

    return _stirred(
        AutoencoderKL(
            block_out_channels=WIDTHS[work.size]["vae"],
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=8 * work.latent,
        )
    )


def _stirred(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def their_scheduler() -> Any:
    """DDIM over the timesteps that published samplers take."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")
