"""Pretraining objectives, on each host of the card: they learn, in the encoder too, and leave a plain encoder behind."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from contract import answer, check
from formarium.core.build import create_model
from formarium.core.checkpoint import save
from formarium.core.errors import FormariumError, UnknownName
from formarium.core.spec import option_names
from formarium.skeletons.objective import Objective, objective
from formarium.weights.load import load

SETTINGS = {"minilm": "minilm(teacher=bert/nano)"}  # what an objective cannot do without


def wrapped(case, host: str) -> Objective:
    """Around a new host, in training mode."""
    torch.manual_seed(0)
    return objective(SETTINGS.get(case.name, case.name))(create_model(host)).train()


@check("objective")
def objective_learns(case):
    """The loss of one batch falls in 20 steps, with fixed random choices; its numbers are scalars without a graph."""
    for host in case.card.hosts:
        made = wrapped(case, host)
        batch = made.example(2)
        optimizer = torch.optim.AdamW(made.parameter_groups(0.05), lr=3e-3)

        def loss(made=made, batch=batch):
            torch.manual_seed(1)
            return made(batch)[0]

        before = loss().item()
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert loss().item() < before, host
        value, numbers = made(batch)
        assert value.shape == ()
        assert all(n.shape == () and n.isfinite() and not n.requires_grad for n in numbers.values())


@check("objective")
def objective_reaches_all(case):
    """Its own parameters have a gradient, and the encoder's: but for a head that it does not use, and for what comes after
    the attention of the last layer, where the loss is taken there."""
    for host in case.card.hosts:
        made = wrapped(case, host)
        made(made.example(4))[0].backward()
        named = {n: p for n, p in made.named_parameters() if p.requires_grad}
        idle = {n for n, p in named.items() if p.grad is None or not p.grad.any()}
        last = f"model.stack.layers.{getattr(getattr(made.model, 'stack', None), 'depth', 0) - 1}."
        assert all(n.startswith(("model.head.", last)) for n in idle), idle
        assert len(idle) < len(named) / 2


@check("objective")
def objective_exports(case):
    """It loads into the plain model, and answers as it did inside the objective."""
    for host in case.card.hosts:
        made = wrapped(case, host)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        made(made.example(4))[0].backward()
        optimizer.step()
        encoder, batch = made.export(), made.example(2)
        assert encoder.recipe == {"name": host, "changes": {}}
        with tempfile.TemporaryDirectory() as folder:
            save(encoder, Path(folder) / "encoder.safetensors")
            again = load(Path(folder) / "encoder.safetensors")
        assert type(again) is type(create_model(host))
        assert_close(answer(again, batch), answer(made.model, batch), atol=0, rtol=0)


@check("objective")
def objective_evaluates_alike(case):
    """In eval mode the loss depends on the batch and the random numbers alone, not on the progress of the training."""
    made = wrapped(case, case.card.hosts[0]).eval()
    batch, found = made.example(4), []
    for progress in (0.0, 0.7):
        made.progress.fill_(progress)
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(made(batch)[0])
    assert torch.equal(*found)


@check("objective")
def objective_checkpointing(case):
    """Recomputed layers give the same loss and gradients."""
    def gradients(enable: bool) -> list[torch.Tensor]:
        made = wrapped(case, case.card.hosts[0])
        made.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        loss = made(made.example(2))[0]
        loss.backward()
        return [loss.detach(), *(p.grad for p in made.parameters() if p.grad is not None)]

    assert_close(gradients(True), gradients(False))


@check("objective")
def objective_refuses_names(case):
    option = option_names(objective(case.name).target)[0]
    with pytest.raises(UnknownName, match=f"{option}x'; did you mean {option}"):
        objective(f"{case.name}({option}x=1)")
    with pytest.raises(UnknownName, match=f"did you mean .*{case.name}"):
        objective(f"{case.name}x")
    with pytest.raises(FormariumError, match="a parenthesis is not closed"):
        objective(f"{case.name}({option}=1")
