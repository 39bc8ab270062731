"""Methods of each axis for small models, which pairs are legal, and plans that hold them all."""
import itertools

import vitcompact as vc
from tests import tiny

METHODS = {
    # Regions are of the whole grid, and so are the filters of heads beside them.
    "heads": [vc.HMHSA(), vc.HeadPruning(kept_heads=3, heads=vc.HMHSA(real_heads=2)),
              vc.MoH(active=3, shared=1, capacity=1.0), vc.HMHSA(layout="grid"),
              vc.MoH(active=3, shared=1, heads=vc.HMHSA())],
    "attention": [vc.Sparsifiner(keep=0.5, rank=4),
                  vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0),
                  vc.KeyMerging(keep=0.5, min_tokens=0), vc.InLine(local=False),
                  vc.ChannelAttention(), vc.BiFormer(keep=0.5, regions=2, lce=True, min_tokens=0)],
    "tokens": [vc.EViT(keep=0.6, blocks=(0,)), vc.DynamicViT(keep=0.6, blocks=(0,)),
               vc.ToMe(r=3), vc.MCTF(r=3, blocks=(0,)), vc.FastPath(keep=(0.6,), blocks=(0,))],
    "ffn": [vc.CFFN(), vc.GLU(ffn=vc.CFFN()), vc.ConvGLU()],
}
# A choice is {axis: its place in METHODS}.
PAIRS = [dict(zip(axes, places, strict=True)) for axes in itertools.combinations(METHODS, 2)
         for places in itertools.product(*(range(len(METHODS[axis])) for axis in axes))]


def plan_of(choice):
  return {axis: METHODS[axis][place] for axis, place in choice.items()}


def combined(plan):
  """Two blocks, so that one comes after what a reducer leaves; one where tokens are all there."""
  reduced = not isinstance(plan.get("tokens"), vc.FastPath | None)
  return tiny.deit(vc.Plan(**plan), depth=1 + reduced)


def is_legal(choice) -> bool:
  try:
    combined(plan_of(choice))
  except ValueError:
    return False
  return True


def pairs_in(choice):
  return set(itertools.combinations(sorted(choice.items()), 2))


def covering(legal):
  """Choices of up to four axes in which all these pairs are: a third as many as there are pairs."""
  allowed, choices = set().union(*map(pairs_in, legal)), []
  left = set(allowed)
  while left:
    choice = dict(min(left))
    for axis in METHODS:
      if axis not in choice:
        more = [{**choice, axis: place} for place in range(len(METHODS[axis]))]
        more = [each for each in more if pairs_in(each) <= allowed]
        more.sort(key=lambda each: -len(pairs_in(each) & left))
        choice = next(filter(is_legal, more), choice)
    left -= pairs_in(choice)
    choices.append({axis: choice[axis] for axis in METHODS if axis in choice})
  return choices


# Which these are is in a table of docs/methods.md, with the reasons, which `test_bench` holds.
LEGAL_PAIRS = list(filter(is_legal, PAIRS))
ILLEGAL = [plan_of(pair) for pair in PAIRS if pair not in LEGAL_PAIRS]
CHOICES = covering(LEGAL_PAIRS)
COVERING = list(map(plan_of, CHOICES))


def words(plan):
  return "-".join(getattr(spec, "granularity", type(spec).__name__) for spec in plan.values())
