"""freeze(): pinned to eval, no gradients, and otherwise the module it was."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from ldm.modules.freezing import freeze, is_frozen


def test_stays_in_eval_mode_when_its_parent_trains():
    parent = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)), nn.Linear(2, 2))
    child = freeze(parent[0])
    assert child is parent[0]
    parent.train()
    assert parent.training and parent[1].training
    assert not any(m.training for m in child.modules())
    x = torch.ones(4, 2)
    assert torch.equal(child(x), child(x))


def test_gradients_are_off_inside_only():
    parent = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze(parent[0])
    assert [p.requires_grad for p in parent.parameters()] == [False, False, True, True]


def test_train_and_eval_return_the_module():
    module = freeze(nn.Linear(2, 2))
    assert module.train() is module and module.eval() is module and module.train(True) is module
    assert not module.training


def test_is_still_what_it_was():
    module = nn.Linear(2, 3)
    keys = list(module.state_dict())
    freeze(module)
    assert isinstance(module, nn.Linear) and type(module).__name__ == "Linear"
    assert list(module.state_dict()) == keys
    assert repr(module) == repr(nn.Linear(2, 3))
    assert not is_frozen(nn.Linear(2, 3)) and nn.Linear(2, 3).train().training  # others of its class are not touched


def test_freezing_twice_is_harmless():
    module = freeze(nn.Linear(2, 2))
    kind = type(module)
    assert freeze(module) is module and type(module) is kind


def test_copies_and_pickles_stay_frozen():
    module = freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert is_frozen(other) and not other.train().training
        assert torch.equal(other[0].weight, module[0].weight)
        assert other[0].weight is not module[0].weight


def test_frozen_in_frozen():
    parent = nn.Sequential(freeze(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert is_frozen(freeze(parent)) and not parent.train().training
