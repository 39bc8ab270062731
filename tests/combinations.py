"""Methods of each axis for small models, the legal pairs, and plans that cover all of them."""
import itertools

import vitcompact as vc
from tests import tiny

METHODS = {
    # Regions need the whole grid, and so do the filters of the heads combined with them.
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
# A choice is {axis: index into METHODS[axis]}.
PAIRS = [dict(zip(axes, places, strict=True)) for axes in itertools.combinations(METHODS, 2)
         for places in itertools.product(*(range(len(METHODS[axis])) for axis in axes))]


def plan_of(choice):
  return {axis: METHODS[axis][place] for axis, place in choice.items()}


def combined(plan):
  """Returns a model of two blocks, so that one follows the reducer; of one if all tokens stay."""
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
  """Returns choices of up to four axes that cover all these pairs, in a third as many models."""
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


# docs/methods.md lists the legal and illegal pairs in a table, with the reasons.
LEGAL_PAIRS = list(filter(is_legal, PAIRS))
ILLEGAL = [plan_of(pair) for pair in PAIRS if pair not in LEGAL_PAIRS]
CHOICES = covering(LEGAL_PAIRS)
COVERING = list(map(plan_of, CHOICES))


def words(plan):
  return "-".join(getattr(spec, "granularity", type(spec).__name__) for spec in plan.values())
