"""LLM.int8(): does the decomposition save a model with outlying features that plain int8 products would spoil?

A small model has no such features, so they are planted: in two dimensions, the same in all layers, the norms before the
quantised layers get a shift of 40, and the layers a bias that takes its effect away. The function stays what it was; the
weights stay of their usual size; the values are like the large models' outliers: few dimensions, one sign, far above 6.
Small models suffer little from rounding. So what decides is how much of the loss that int8 products add is undone.
"""

from typing import TYPE_CHECKING

import torch

from ..arena.study import Cell, Decides, Seed, Study

if TYPE_CHECKING:
    from ..core.model import Model

HOST = "gpt/nano"
DIMENSIONS, SHIFT = 2, 40.0


@torch.no_grad()
def plant(model: "Model", seed: int) -> "Model":
    """Gives the model outlying features, in place; what it answers stays."""
    where = torch.randperm(model.stack.dim, generator=torch.Generator().manual_seed(seed))[:DIMENSIONS]
    for layer in model.stack.layers:
        mixer, channel = layer["mixer"], layer["channel"]
        for norm, linear in ((mixer.norm, mixer.inner.qkv), (channel.norm, channel.inner.fc1)):
            norm.bias[where] += SHIFT
            linear.bias -= SHIFT * linear.weight[:, where].sum(1)
    return model


def train(seed: Seed) -> None:
    seed.train(HOST, into="base", lr=3e-3)


def quantised(cell: Cell) -> dict[str, float]:
    from ..arena.config import read_json
    from ..core.transform import apply
    from ..weights.load import load

    assert cell.prepared is not None
    model = plant(load(cell.prepared / "base/last.safetensors"), cell.seed)
    transform = str(cell.model).partition("+")[2]
    found = cell.task.evaluate(apply(model, transform) if transform else model, "test")
    before = read_json(cell.prepared / "base/result.json")["test"]
    return {**found, "added_loss": found["loss"] - before["loss"]}


STUDY = Study(
    system="llm_int8",
    claim="In a model with a few outlying features, int8 products with the outliers taken out keep the loss that int8 "
          "products without this raise.",
    source="LLM.int8() (arXiv 2208.07339), abstract, and sections 3.2 and 4",
    arms={"decomposed": f"{HOST}+llm_int8", "plain": f"{HOST}+llm_int8(threshold=none)", "float": HOST},
    matched="parameters",
    task="stdlib",
    task_options={"context": 64},
    recipe={"steps": 600, "batch_size": 16},
    lrs=(),
    seeds=5,
    decides=Decides("added_loss", better="lower", by="ratio", at_least=0.5, unit="nats a byte"),
    prepare=train,
    measure=quantised,
    published="No degradation up to 175 B parameters (abstract); perplexity of 13 B parameters on C4 12.45 in float32 and "
              "with decomposition, 16.48 without it (the numbers quoted from memory)",
    scale="200 thousand parameters and planted outliers in 2 of 64 dimensions, against 125 M to 175 B parameters and "
          "outliers that came by training, in up to 7 of some thousand dimensions. So 3 % of what the planted layers read "
          "is in float, not 0.1 %.",
    cannot="Whether outliers come by themselves; half the memory and the speed on a GPU; tasks without examples.",
)
