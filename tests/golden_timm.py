"""Records what timm's models are called inside, and that timm reads our files: tests/layouts/timm.json.gz.

Needs timm, which needs torchvision:

    python tests/golden_timm.py

Written are names and shapes of the state dict of each model that a preset of ours stands for, and for a small one of each
system how far timm's answer is from ours when it reads, strictly, a file that we wrote in its layout. The fingerprint of a
hybrid goes to tests/golden.
"""

import gzip
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from formarium.core.build import create_model
from formarium.core.registry import find
from golden_replay import load_filled, record

FACTS = Path(__file__).parent / "layouts" / "timm.json.gz"
HYBRID = "vit_tiny_r_s16_p8_224"
VIT = {"tiny": "tiny_patch16", "small": "small_patch16", "small_p32": "small_patch32", "base": "base_patch16",
       "base_p8": "base_patch8", "base_p32": "base_patch32", "large": "large_patch16", "large_p32": "large_patch32",
       "huge_p14": "huge_patch14", "giant_p14": "giant_patch14", "r_tiny_p8": "tiny_r_s16_p8", "r26_small": "small_r26_s32",
       "r50_base": "base_r50_s16", "r50_large": "large_r50_s32"}
ONE_SIZE = {"base_p8", "huge_p14", "giant_p14"}
CAIT = ("xxs24_224", "xxs24_384", "xxs36_224", "xxs36_384", "xs24_384", "s24_224", "s24_384", "s36_384", "m36_384",
        "m48_448")
CROSSVIT = {"tiny": "tiny_240", "small": "small_240", "base": "base_240", "9": "9_240", "9_dagger": "9_dagger_240",
            "15": "15_240", "15_dagger": "15_dagger_240", "15_dagger_384": "15_dagger_408", "18": "18_240",
            "18_dagger": "18_dagger_240", "18_dagger_384": "18_dagger_408"}
TNT = {"small": "s", "base": "b", "small_legacy": "s_legacy"}
PIT = {"tiny": "ti", "xs": "xs", "small": "s", "base": "b"}
DEIT = {"tiny": "tiny_distilled_patch16_224", "small": "small_distilled_patch16_224", "base": "base_distilled_patch16_224",
        "base_384": "base_distilled_patch16_384"}
SWIN = {"tiny": "tiny", "small": "small", "base": "base", "large": "large"}
OURS = {  # timm's name -> preset, changes
    **{f"vit_{theirs}_224": (f"vit/{ours}", {}) for ours, theirs in VIT.items()},
    **{f"vit_{theirs}_384": (f"vit/{ours}", {"img_size": 384}) for ours, theirs in VIT.items() if ours not in ONE_SIZE},
    **{f"swin_{theirs}_patch4_window7_224": (f"swin/{ours}", {}) for ours, theirs in SWIN.items()},
    **{f"swin_{size}_patch4_window12_384": (f"swin/{size}_384", {}) for size in ("base", "large")},
    **{f"poolformer_{size}": (f"poolformer/{size}", {"pool_first": True}) for size in ("s12", "s24", "s36", "m36", "m48")},
    **{f"cait_{size}": (f"cait/{size.removesuffix('_224')}", {}) for size in CAIT[:-1]},
    "cait_m48_448": ("cait/m48_448", {}),
    **{f"tnt_{theirs}_patch16_224": (f"tnt/{ours}", {}) for ours, theirs in TNT.items()},
    **{f"crossvit_{theirs}": (f"crossvit/{ours}", {}) for ours, theirs in CROSSVIT.items()},
    **{f"pit_{theirs}_224": (f"pit/{ours}", {}) for ours, theirs in PIT.items()},
    **{f"pit_{theirs}_distilled_224": (f"pit/{ours}_distilled", {}) for ours, theirs in PIT.items()},
    **{f"deit_{theirs}": (f"deit/{ours.replace('_384', '')}_distilled{'_384' if '_384' in ours else ''}", {})
       for ours, theirs in DEIT.items()},
    **{f"deit3_{size}_patch16_224": (f"deit/iii_{size}", {}) for size in ("small", "medium", "base", "large")},
    **{f"deit3_{size}_patch16_384": (f"deit/iii_{size}_384", {}) for size in ("small", "base", "large")},
    "deit3_huge_patch14_224": ("deit/iii_huge_p14", {}),
    **{f"twins_{kind}_{size}": (f"twins/{kind}_{size}", {})
       for kind in ("svt", "pcpvt") for size in ("small", "base", "large")},
    **{f"vit_{size}_224": (f"three_things/{size.replace('_patch16', '')}", {"position_first": False})
       for size in ("small_patch16_18x2", "base_patch16_18x2", "small_patch16_36x1")},
}
TWO_SYSTEMS = {f"twins_svt_{size}": "polyvit" for size in ("small", "base", "large")}  # with the same tensors
READ = ("vit_tiny_patch16_224", HYBRID, "swin_tiny_patch4_window7_224", "poolformer_s12", "cait_xxs24_224",
        "tnt_s_patch16_224", "tnt_s_legacy_patch16_224", "crossvit_9_dagger_240", "crossvit_tiny_240", "pit_ti_224",
        "pit_ti_distilled_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "twins_svt_small",
        "twins_pcpvt_small", "vit_small_patch16_18x2_224")


def in_their_names(name: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model of ours as timm calls it; nothing may be left."""
    made = find(name.split("/")[0]).module.KEYS["timm"].convert(model.state_dict(), back=True)
    assert not made.unmatched, made.unmatched
    return {k: v.contiguous() for k, v in made.state.items()}


@torch.no_grad()
def difference(theirs: str) -> float:
    """Our answer less that of timm's model with our file, at most, in units of the answer's spread."""
    import timm
    from timm.models import load_checkpoint

    name, changes = OURS[theirs]
    ours = create_model(name, **changes).eval()
    load_filled(ours)
    model = timm.create_model(theirs, pretrained=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ours.safetensors")
        save_file(in_their_names(name, ours), file)
        load_checkpoint(model, str(file), strict=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    out = ours(images)
    return ((model(images) - out).abs().max() / out.std()).item()


def main() -> None:
    import timm

    tensors = {}
    for name in OURS:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=1000)  # some stand without their classifier
        tensors[name] = {k: list(v.shape) for k, v in model.state_dict().items()}
    facts = {"timm": timm.__version__, "torch": torch.__version__, "models": tensors,
             "reads_our_file": {name: difference(name) for name in READ}}
    FACTS.parent.mkdir(exist_ok=True)
    FACTS.write_bytes(gzip.compress(json.dumps(facts).encode(), mtime=0))
    record(timm.create_model(HYBRID, pretrained=False), [{"shape": [2, 3, 224, 224], "seed": 0}],
           FACTS.parents[1] / "golden" / f"vit__{HYBRID}.json.gz", source=f"timm=={timm.__version__}", variant=HYBRID)
    print(facts["reads_our_file"])


if __name__ == "__main__":
    main()
