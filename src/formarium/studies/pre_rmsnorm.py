"""Pre-RMSNorm: is a model that is trained in the training form and then compressed as good as its Pre-LN twin?

Both start from the same weights and see the same data. The one is trained as Pre-RMSNorm, converted to Pre-CRMSNorm with a
channel less, and then tested; the other is trained and tested as it is. `difference` is how far the conversion alone moves
the logits, in units of their spread. A model that has RMSNorm in place of layer norm, nothing else changed, is shown.
"""

from ..arena.study import Cell, Decides, Study

IDEA = "vit/nano+pre_rmsnorm(form=training)"


def trained_and_compressed(cell: Cell) -> dict[str, float]:
    import torch

    from ..core.transform import apply

    model, numbers = cell.train()
    if cell.model != IDEA:
        return numbers
    small = apply(model, "pre_rmsnorm", form="crms")
    x = cell.task.train_batch(cell.seed, 0, 64)[0]
    with torch.no_grad():
        before, after = model(x), small(x)
    found = cell.task.evaluate(small, "val" if cell.quick else "test")
    return {**numbers, **{k: float(v) for k, v in found.items()},
            "difference": float((after - before).abs().max() / before.std())}


STUDY = Study(
    system="pre_rmsnorm",
    claim="A model trained as Pre-RMSNorm and converted to Pre-CRMSNorm is as accurate as its Pre-LN twin.",
    source="Pre-RMSNorm (arXiv 2305.14858), section 3 and the training of ViT in section 4",
    arms={"pre-crmsnorm": IDEA, "pre-ln": "vit/nano", "rmsnorm": "vit/nano:norm=rms_norm"},
    matched="parameters",
    task="mnist5k",
    recipe={"steps": 250, "batch_size": 32},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("accuracy", better="higher", by="difference", no_worse_by=0.005),
    measure=trained_and_compressed,
    published="Arithmetically equal; trained ViTs on ImageNet-1k differ by rounding alone (from memory of section 4)",
    scale="4 layers of width 64 on handwritten digits, against ViTs of up to 632 M parameters on ImageNet-1k and "
          "decoders of the sizes of GPT-3.",
    cannot="The 1 to 10 % of time saved, which depend on width, processor and kernels.",
)
