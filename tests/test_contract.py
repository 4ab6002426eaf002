"""The contract, for every system of the registry. `python tests/test_contract.py --update` commits new counts."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

import contract
from formarium.core.build import create_model
from formarium.core.errors import DoesNotFit, UnknownName

COUNTS = Path(__file__).with_name("contract_counts.json")
CASES = list(contract.cases())
RAN: Counter[str] = Counter()


def _param(check: str, case: contract.Case):
    reason = case.card.exceptions.get(check)
    marks = () if reason is None else (pytest.mark.xfail(reason=reason, strict=True),)
    return pytest.param(check, case, id=f"{case.name}-{check}", marks=marks)


@pytest.mark.parametrize(("check", "case"), [_param(*c) for c in CASES])
def test_check(check, case):
    RAN[check] += 1
    try:
        contract.CHECKS[check].run(case)
    except pytest.skip.Exception as skip:
        raise AssertionError(f"a check holds, or the card's exceptions say why not; it may not skip: {skip}") from None


@pytest.mark.parametrize(("name", "options"), [
    ("vit/nano:pool=mean,mixer=pooling", {}),
    ("vit/nano:pool=mean,mixer=window(window=4)", {}),
    ("poolformer/nano:mixers=(pooling(size=5),attention(heads=3))", {}),
    ("gpt/nano", {"mixer": "cosformer", "residual": "denseformer(dilation=2,period=2)", "norm": "rms_norm"}),
    ("swin/nano", {"residual": "post_norm", "channel": "swiglu(ratio=2)"}),
])
def test_combinations(name, options):
    """Parts with options, by name, several at once."""
    model = create_model(name, **options)
    grads = contract.gradients(model, model.example(2))
    assert all(g is not None and g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize(("name", "error", "why"), [
    ("gpt/nano:mixer=cosformer,position=rotary", DoesNotFit, "CosFormer does not fit here: Rotary works on the scores"),
    ("vit/nano:pool=mean,mixer=pooling,position=rotary", DoesNotFit, "Pooling does not fit here: Rotary works on the"),
    ("gpt/nano:norm=group_norm,residual=post_norm", DoesNotFit, "no token may see a later one"),
    ("gpt/nano:residual=pre_norm(norm=group_norm)", DoesNotFit, "no token may see a later one"),
    ("gpt/nano:heads=64,position=rotary", DoesNotFit, "head size must be even, got 1"),
    ("gpt/nano:mixer=attention(position=learned)", DoesNotFit, "LearnedPosition is added to the tokens"),
    ("vit/nano:heads=5", DoesNotFit, "5 heads do not divide a width of 64; the nearest number that does is 4"),
    ("vit/nano:pool=max", DoesNotFit, "'token' or 'mean', not 'max'"),
    ("vit/nano:num_classes=-1", DoesNotFit, "not -1"),
    ("poolformer/nano:mixers=(pooling,pooling,pooling)", DoesNotFit, "2 stages .* as many depths and mixers, got 2 and 3"),
    ("poolformer/nano:mixers=pooling(size=2)", DoesNotFit, "must be odd to keep the grid, got 2"),
    ("gpt/nano:residual=denseformer(dilation=0)", DoesNotFit, "1 or more, got 0 and 1"),
    ("swin/nano:position=rotary", UnknownName, "unknown option of Swin 'position'"),
])
def test_what_does_not_fit(name, error, why):
    with pytest.raises(error, match=why):
        create_model(name)


def test_counts(request):
    """The number of checks that ran, by check, is the committed one; of those generated, where this is a part of them."""
    mine = [item for item in request.session.items if getattr(item, "function", None) is test_check]
    whole = len(mine) == len(CASES) and not hasattr(request.config, "workerinput")
    counts, committed = RAN if whole else Counter(check for check, _ in CASES), Counter(json.loads(COUNTS.read_text()))
    changed = {c: f"{committed[c]} -> {counts[c]}" for c in {*counts, *committed} if counts[c] != committed[c]}
    assert not changed, ("other checks ran than are committed; if systems or checks were added or removed on purpose: "
                         "python tests/test_contract.py --update")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/test_contract.py --update")
    COUNTS.write_text(json.dumps(dict(sorted(Counter(check for check, _ in CASES).items())), indent=1) + "\n")
