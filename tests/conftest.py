"""What all tests share: fixed seeds, and a registry that forgets a test's own systems."""

import sys

import pytest
import torch

from formarium.core import registry

torch.set_num_threads(1)  # the models are tiny: more threads wait for one another


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def forgets_systems(monkeypatch):
    """Systems that the test adds are gone after it."""
    monkeypatch.setattr(registry, "_added", {})
    yield
    for name in [n for n in sys.modules if n.startswith("formarium_user.")]:
        del sys.modules[name]
