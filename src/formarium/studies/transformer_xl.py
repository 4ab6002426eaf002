"""Transformer-XL: does a memory of the segments before lower the loss, and how far back does it help?

Both arms are the same model on segments of 32 bytes. One trains with a memory of 32 bytes a layer, one without. Then each
is read with memories of several lengths, and takes the one that validates best: so the control may use one too, as in the
paper's ablation (its column of attention lengths).
"""

from ..arena.study import Cell, Decides, Study

SEGMENT = 32
MEMORIES = (0, 32, 64, 128)


def at_best_memory(cell: Cell) -> dict[str, float]:
    trained = 0 if cell.arm == "no memory" else SEGMENT
    model, found = cell.train(task=cell.get_task(mem_len=trained))
    tasks = {n: cell.get_task(mem_len=n) for n in MEMORIES}
    val = {n: task.evaluate(model, "val")["bits_per_byte"] for n, task in tasks.items()}
    best = min(val, key=lambda n: val[n])
    test = found if best == trained else tasks[best].evaluate(model, "val" if cell.quick else "test")
    return {"bits_at_best_memory": test["bits_per_byte"], "best_memory": best, "val": val[best],
            **{f"val_bits_at_{n}": bits for n, bits in val.items()}}


STUDY = Study(
    system="transformer_xl",
    claim="A model that trains with a memory of earlier segments has a lower loss, at the memory length that suits it, "
          "than the same model trained without.",
    source="Transformer-XL (arXiv 1901.02860), table 6, rows with relative positions and full loss",
    arms={"memory": f"transformer_xl/nano:mem_len={SEGMENT}", "no memory": f"transformer_xl/nano:mem_len={SEGMENT}"},
    matched="parameters",
    task="shakespeare",
    task_options={"context": SEGMENT},
    recipe={"steps": 400, "batch_size": 16},
    lrs=(1e-3, 3e-3),
    seeds=3,
    decides=Decides("bits_at_best_memory", better="lower", by="ratio", at_least=0.02),
    measure=at_best_memory,
    published="Perplexity 26.77 (attention length 500) with recurrence, 29.02 (260) without, on WikiText-103: 2.4 % of "
              "the loss",
    scale="4 layers of width 64, segments of 32 bytes and 400 steps on 1 MB of plays, against 16 layers and 128 M "
          "parameters on 100 M words. The steps are equal; a step with memory also reads the 32 bytes before, without "
          "gradient.",
    cannot="Relative effective context lengths of hundreds of words, and the speed of evaluation.",
)
