"""Depth by reparameterisation: is a shallow ViT better if it is trained with branches that merge into it?

The branches become one between the 40th and the 140th of 200 steps; what is tested is the plain ViT that they merge into,
which has the size of the control. `difference`: how far the merge moves the logits.
"""

from ..arena.study import Cell, Decides, Study

IDEA = "vit_depth_reparam/nano:merge_steps=(40,140)"


def merged(cell: Cell) -> dict[str, float]:
    import torch

    model, numbers = cell.train()
    if cell.model != IDEA:
        return numbers
    model.merge_to(1)
    plain, x = model.reparameterize().eval(), cell.task.train_batch(cell.seed, 0, 64)[0]
    with torch.no_grad():
        apart = (plain(x) - model(x)).abs().max()
    found = cell.task.evaluate(plain, "val" if cell.quick else "test")
    return {**numbers, **{k: float(v) for k, v in found.items()}, "difference": float(apart)}


STUDY = Study(
    system="vit_depth_reparam",
    claim="A shallow ViT that is trained as two branches a block, which merge during training, is more accurate than the "
          "same ViT trained as it is.",
    source="Rethinking Vision Transformer Depth (arXiv 2511.19718), abstract",
    arms={"merged": IDEA, "plain": "vit/nano:depth=2"},
    matched="steps",
    task="mnist5k",
    recipe={"steps": 200, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", at_least=0.005),
    measure=merged,
    published="ViT-Tiny with 6, 4 or 3 layers keeps the ImageNet-1k accuracy of 12 (abstract; numbers could not be read).",
    scale="2 layers of 2 branches on handwritten digits, 200 steps, against 3 to 6 layers on ImageNet-1k over hundreds of "
          "epochs. How the branches are joined is our reconstruction.",
    cannot="Latency on phones; whether their own way of joining is better.",
)
