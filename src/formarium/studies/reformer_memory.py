"""Reformer: does memory stop growing with depth when layers are reversible?

The highest point of a training step, weights and optimiser included, of a model of 2 layers and one of 10, on the same
batch: what each further layer adds decides. Both arms are trained as well, to show whether it costs accuracy.
"""

from ..arena.study import Cell, Decides, Study

HOST = "gpt/nano:dim=32,depth="
SHALLOW, DEEP = 2, 10


def memory_of_a_layer(cell: Cell) -> dict[str, float]:
    from ..arena.measure import peak_memory
    from ..arena.train import build_for

    _, found = cell.train()
    peaks = {n: peak_memory(build_for(str(cell.model).replace(f"={DEEP}", f"={n}"), cell.task), cell.task, 16) / 1e6
             for n in (SHALLOW, DEEP)}
    return found | {f"megabytes_at_{n}_layers": peak for n, peak in peaks.items()} | {
        "megabytes_a_layer": (peaks[DEEP] - peaks[SHALLOW]) / (DEEP - SHALLOW)}


STUDY = Study(
    system="reformer",
    claim="With reversible layers the memory of a training step hardly grows with depth.",
    source="Reformer (arXiv 2001.04451), section 3 and figure 3 (right)",
    arms={"reversible": f"{HOST}{DEEP},residual=reversible", "plain": f"{HOST}{DEEP}"},
    matched="parameters",
    task="shakespeare",
    task_options={"context": 128},
    recipe={"steps": 100, "batch_size": 8},
    lrs=(3e-3, 1e-2),
    seeds=3,
    decides=Decides("megabytes_a_layer", better="lower", by="ratio", at_least=0.75),
    measure=memory_of_a_layer,
    published="Activations are stored once, not once a layer; loss curves on enwik8 and ImageNet64 as without (in words)",
    scale="10 layers of width 32 on 128 bytes, 100 steps, against up to 20 layers of width 1,024 on 64,000. What still "
          "grows is weights, gradients and the optimiser's state, a fixed number of bytes a parameter.",
    cannot="The time that the second computation costs: times are not compared between busy machines.",
)
