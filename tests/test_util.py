"""instantiate_from_config builds what a config may name, and refuses the rest on the object that was found."""

import sys
import types

import pytest
import torch
from omegaconf import OmegaConf

from ldm import util
from ldm.util import ConfigError, get_obj_from_str, instantiate_from_config


def test_builds_a_class_with_params():
    layer = instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 3}})
    assert layer.weight.shape == (3, 2)


def test_takes_omegaconf_and_overrides():
    config = OmegaConf.create({"n": 4, "target": "torch.nn.Linear", "params": {"in_features": "${n}", "out_features": 3}})
    assert instantiate_from_config(config, out_features=5).weight.shape == (5, 4)


@pytest.mark.parametrize("marker", ["__is_first_stage__", "__is_unconditional__"])
def test_markers_build_nothing(marker):
    assert instantiate_from_config(marker) is None


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "posix.system",
        "logging.os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.hub.load",
        "torch.load",
        "numpy.load",
        "ldm.util.trust",
        "ldm.util.get_obj_from_str",
        "pathlib.Path",
        "ldm.util.importlib.import_module",
        "ldm.util.sys.exit",
        "torch.serialization.os.system",
        "torch.jit.load",
    ],
)
def test_refuses_what_is_not_a_component(target):
    with pytest.raises(ConfigError):
        get_obj_from_str(target)


def test_refuses_an_alias_in_a_trusted_module(monkeypatch):
    """The rule looks at the object, so a name inside our own package does not help."""
    import os

    from ldm.modules import attention

    monkeypatch.setattr(attention, "harmless", os.system, raising=False)
    with pytest.raises(ConfigError, match="refused"):
        get_obj_from_str("ldm.modules.attention.harmless")


def test_the_standard_library_is_not_even_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    with pytest.raises(ConfigError):
        get_obj_from_str("antigravity.webbrowser")
    assert "antigravity" not in sys.modules


def test_own_modules_and_trusted_packages(monkeypatch):
    module = types.ModuleType("my_project")

    class Net(torch.nn.Module):
        pass

    class Helper:
        pass

    Net.__module__ = Helper.__module__ = "my_project"
    module.Net, module.Helper = Net, Helper
    monkeypatch.setitem(sys.modules, "my_project", module)
    monkeypatch.setattr(util, "_TRUSTED", {"ldm"})
    assert get_obj_from_str("my_project.Net") is Net
    with pytest.raises(ConfigError, match="--trust"):
        get_obj_from_str("my_project.Helper")
    util.trust("my_project")
    assert get_obj_from_str("my_project.Helper") is Helper


@pytest.mark.parametrize("name", ["", "not a name", "a-b"])
def test_trust_wants_an_import_name(name):
    with pytest.raises(ConfigError):
        util.trust(name)


def test_errors_say_what_is_wrong():
    with pytest.raises(ConfigError, match="did you mean UNetModel"):
        get_obj_from_str("ldm.modules.diffusionmodules.openaimodel.UnetModel")
    with pytest.raises(ConfigError, match=r"torch.nn.Identity: params must be a mapping of names to values, not \[1\]"):
        instantiate_from_config({"target": "torch.nn.Identity", "params": [1]})
    with pytest.raises(ConfigError, match="needs the key 'target'"):
        instantiate_from_config({"params": {}})
    with pytest.raises(ConfigError, match="colour"):
        instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1, "colour": 2}})
    with pytest.raises(ConfigError, match="no module"):
        get_obj_from_str("no_such_package.Thing")
    with pytest.raises(ConfigError, match="form"):
        get_obj_from_str("Thing")


def test_legacy_addresses():
    from ldm.data.datamodule import DataModuleFromConfig
    from ldm.modules.vqvae.quantize import VectorQuantizer2

    assert get_obj_from_str("main.DataModuleFromConfig") is DataModuleFromConfig
    assert get_obj_from_str("taming.modules.vqvae.quantize.VectorQuantizer2") is VectorQuantizer2


def test_small_helpers():
    x = torch.zeros(2, 5, 4, 4)
    assert util.ismap(x) and not util.isimage(x) and util.isimage(x[:, :3]) and not util.isimage("text")
    assert util.default(None, lambda: 3) == 3 and util.default(0, 3) == 0
    assert util.mean_flat(torch.ones(2, 3, 4)).shape == (2,)
    assert util.count_params(torch.nn.Linear(2, 3)) == 9
    picture = util.log_txt_as_img((64, 32), ["a red circle", "two"])
    assert picture.shape == (2, 3, 32, 64) and picture.min() < 0 < picture.max() <= 1
