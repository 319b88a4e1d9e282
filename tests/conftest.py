"""Shared fixtures: two threads at most, and the stored reference numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference_rule import compare

REFERENCE = Path(__file__).parent / "reference"
torch.set_num_threads(min(2, torch.get_num_threads()))


@cache
def _tolerances() -> dict[str, dict[str, tuple[float, float, bool]]]:
    return json.loads((REFERENCE / "tolerances.json").read_text())


class Reference(Mapping[str, np.ndarray]):
    """Arrays of one reference case: `ref["name"]` an output, `ref.input("name")` an input, `ref.check(**outputs)`."""

    def __init__(self, case_id: str) -> None:
        path = REFERENCE / "npz" / f"{case_id}.npz"
        if not path.is_file():
            raise FileNotFoundError(f"no reference numbers {path.name} in {path.parent}")
        self.case_id = case_id
        self.tolerances = _tolerances()[case_id]
        with np.load(path, allow_pickle=False) as stored:
            self._arrays = {name.replace("|", "/"): stored[name] for name in stored.files}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolerances)

    def __len__(self) -> int:
        return len(self.tolerances)

    def input(self, name: str) -> torch.Tensor:
        """Input `name` as a tensor."""
        return torch.from_numpy(np.array(self._arrays["in__" + name]))

    def check(self, outputs: Mapping[str, object] | None = None, **named: object) -> None:
        """Compare outputs with the stored ones within the tolerances stored for them."""
        for name, got in {**(outputs or {}), **named}.items():
            rtol, atol, exact = self.tolerances[name]
            try:
                compare(got, self[name], rtol, atol, exact)
            except AssertionError as error:
                raise AssertionError(f"{self.case_id}/{name}: {error}") from None

    def check_all(self, outputs: Mapping[str, object]) -> None:
        """As `check`, and every stored output must be among `outputs`."""
        missing = sorted(set(self.tolerances) - set(outputs))
        assert not missing, f"{self.case_id}: outputs not produced: {missing}"
        self.check({name: outputs[name] for name in self.tolerances})


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """`reference(case_id)` loads one case of tests/reference."""
    return Reference
