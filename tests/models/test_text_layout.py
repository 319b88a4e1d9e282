"""A text tower that learns where things are: what is predicted, that word order is learnt, and that a diffusion model can start from it."""

from __future__ import annotations

import pytest
import torch

from ldm.models.text_layout import TextLayout
from ldm.modules.encoders.text import FrozenOpenCLIPEmbedder
from ldm.util import ConfigError

ARCH = {"embed_dim": 32, "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
TEXT = {"arch": ARCH, "version": "none", "max_length": 16, "layer": "last"}
COLORS = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def model(freeze: bool = False, **params) -> TextLayout:
    config = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": {**TEXT, "freeze": freeze}}
    return TextLayout(config, **{"context_dim": 32, "channels": 3, "grid": 2, "width": 32, **params})


def scenes(n: int) -> dict:
    """Half of the picture in one colour, half in another; the caption says which half."""
    z, captions = torch.zeros(n, 3, 4, 4), []
    for i in range(n):
        (a, b), word = [list(COLORS)[k] for k in torch.randperm(3)[:2]], ("left of", "right of")[i % 2]
        left, right = (a, b) if word == "left of" else (b, a)
        z[i, COLORS[left], :, :2] = z[i, COLORS[right], :, 2:] = 1.0
        captions.append(f"{a} {word} {b}")
    return {"z": z, "caption": captions}


def test_target_is_the_mean_of_each_cell():
    z = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model().target({"z": z})[:, :, 0, 1], z[:, :, :2, 2:].mean((2, 3)))
    torch.testing.assert_close(model().target({"image": z.movedim(1, -1)}), model().target({"z": z}))


def test_word_order_is_learnt():
    layout = model()
    optimizer = torch.optim.AdamW([p for p in layout.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = layout._loss(scenes(32))
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        a, b = layout(["red left of blue"]), layout(["red right of blue"])
    red = COLORS["red"]
    assert loss < 0.2 and (a[0, red, :, 0] > a[0, red, :, 1] + 0.5).all() and (b[0, red, :, 1] > b[0, red, :, 0] + 0.5).all()


def test_a_diffusion_model_starts_from_its_checkpoint(tmp_path):
    layout, path = model(), tmp_path / "last.ckpt"
    torch.save({"state_dict": layout.state_dict()}, path)
    text = FrozenOpenCLIPEmbedder(**{**TEXT, "version": str(path)})
    torch.testing.assert_close(text.encode(["red left of blue"]), layout.cond_stage_model.encode(["red left of blue"]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="freeze: false"):
        model(freeze=True)
    with pytest.raises(ConfigError, match="neither 'z' nor 'image', but caption"):
        model().target({"caption": ["red"]})
    for shape in ((1, 4, 4, 4), (1, 3, 5, 4)):
        with pytest.raises(ConfigError, match="grid divide the sides"):
            model().target({"z": torch.zeros(shape)})
