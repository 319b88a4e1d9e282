"""Tiny models, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.inference.tiny import write_model, write_safety


@pytest.fixture(scope="session")
def tiny_ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a text-to-image model with its config beside them."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a safety check that flags nothing."""
    return write_safety(tmp_path_factory.mktemp("safety") / "lenient", 2.0)


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a safety check that flags everything."""
    return write_safety(tmp_path_factory.mktemp("safety") / "strict", -2.0)
