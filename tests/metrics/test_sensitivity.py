"""Which words a model has understood."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from ldm.data.shapes_near import CHANGES
from ldm.data.shapes_text import parse
from ldm.metrics.sensitivity import markdown, sensitivity, wrong_captions


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_captions_differ_from_right_ones_in_one_thing(change):
    scenes, right, wrong = wrong_captions(change, 12)
    assert len(scenes) == len(right) == len(wrong) == 12
    for scene, told, other in zip(scenes, right, wrong, strict=True):
        a, b = parse(told), parse(other)
        assert a != b and a.background == scene.background and all(part.size for part in a.parts)
        assert (a.background != b.background) == (change == "background")
        assert (a.relation != b.relation) == (change == "relation")
        assert (a.count != b.count) == (change == "count")
        for field in ("shape", "color", "size"):
            differ = [getattr(p, field) for p in a.parts] != [getattr(p, field) for p in b.parts]
            assert differ == (change == field or (change == "binding" and field == "color")), (told, other)
    assert wrong_captions(change, 12) == (scenes, right, wrong)


class Reader:
    """Knows the picture if the caption's background is the picture's, and nothing of all else."""

    device, num_timesteps = torch.device("cpu"), 1000

    def encode_first_stage(self, x):
        return SimpleNamespace(mode=lambda: x[:, :, ::32, ::32])

    def get_first_stage_encoding(self, z):
        return z

    def get_learned_conditioning(self, texts):
        from ldm.data.shapes_world import BACKGROUNDS

        return torch.tensor([BACKGROUNDS[parse(text).background] for text in texts])[:, :, None, None] / 127.5 - 1

    def q_sample(self, z, t, noise):
        self.z = z
        return z + noise

    def training_target(self, z, noise, t):
        return z

    def apply_model(self, x, t, c):
        return torch.where((self.z[:, :, :1, :1] - c).abs().amax(1, keepdim=True) < 0.01, self.z, self.z + 1)


def test_what_is_understood_is_told_from_what_is_not(monkeypatch):
    found = sensitivity(Reader(), timesteps=(900, 10), n=20, batch=8)
    assert set(found) == set(CHANGES) and all(len(row) == 2 for row in found.values())
    for change, row in found.items():
        for entry in row:
            if change == "background":
                assert entry.right == 0 and entry.worse == pytest.approx(1) and entry.noticed == 1
            else:
                assert entry.worse == entry.noticed == 0
    assert "| background | 100% (+1.0000) | 100% (+1.0000) |" in markdown(found, (900, 10))


def test_every_scene_has_its_own_noise_whatever_the_batches_are():
    class Listener(Reader):
        def q_sample(self, z, t, noise):
            self.heard.append(noise)
            return super().q_sample(z, t, noise)

    noises = []
    for batch in (4, 8):
        model = Listener()
        model.heard = []
        sensitivity(model, changes=["background"], timesteps=(900,), n=8, batch=batch)
        noises.append(torch.cat(model.heard))
    assert torch.equal(*noises) and len(noises[0].flatten(1).unique(dim=0)) == 8


def test_the_script_measures_the_model_that_ships(tmp_path, monkeypatch, capsys):
    from scripts import prompt_sensitivity

    path = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["prompt_sensitivity.py", "--n", "8", "--timesteps", "600", "--json", str(path), "--device", "cpu"])
    assert prompt_sensitivity.main() == 0
    out = capsys.readouterr().out
    assert "| background |" in out and json.loads(path.read_text())["wrong"]["background"][0]["noticed"] > 0.5
    assert prompt_sensitivity.main() == 2 and "exists already" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["prompt_sensitivity.py", "--timesteps", "1000", "--ckpt", "not-read.safetensors"])
    assert prompt_sensitivity.main() == 2 and "this model has 0 to 999" in capsys.readouterr().err
