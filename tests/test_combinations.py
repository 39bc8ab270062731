"""Every pair of methods of two axes trains, folds and is counted in a model with methods of
the other axes, or is refused with a reason."""
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.combinations import (
  CHOICES,
  COVERING,
  ILLEGAL,
  LEGAL_PAIRS,
  METHODS,
  combined,
  pairs_in,
  plan_of,
  words,
)
from vitcompact.count import macs_of

ON_GRID = {"heads": vc.HMHSA(layout="grid")}


def test_every_legal_pair_is_in_a_plan_that_is_trained():
  held = set().union(*map(pairs_in, CHOICES))
  assert held == set().union(*map(pairs_in, LEGAL_PAIRS)) and len(COVERING) < len(LEGAL_PAIRS) / 2


@pytest.mark.parametrize("plan", COVERING, ids=words)
def test_a_combination_trains_and_folds_to_the_same_function(plan):
  model = combined(plan)
  variables = tiny.init(model)
  grads = tiny.gradients(model, variables, tiny.images(model))
  for name, grad in grads.items():
    assert np.all(np.isfinite(grad)), name
  assert all(np.any(grad) for name, grad in grads.items()
             if name.endswith("attn/value/kernel"))
  deploy, folded = tiny.fold(model, variables)
  np.testing.assert_allclose(tiny.apply(deploy, folded, tiny.images(model)),
                             tiny.apply(model, variables, tiny.images(model)), rtol=1e-4, atol=1e-4)
  count = vc.count(model)
  assert 0 < count.ideal_macs <= count.macs
  assert 0 < count.ideal_attention_macs <= count.attention_macs <= count.macs
  # `count` reads the program of `init`, which must have the same products as that of `apply`.
  assert macs_of(model.apply, variables, tiny.images(model, 1)).total == count.macs


# Both axes at once in the default run, and each alone as well in the full one.
@pytest.mark.parametrize("plan", [
    {**ON_GRID, "ffn": vc.CFFN()},
    *(pytest.param(plan, marks=pytest.mark.slow) for plan in (ON_GRID, {"ffn": vc.CFFN()}))],
                         ids=words)
def test_a_backbone_with_routing_trains_and_folds_under_the_other_axes(plan):
  model = tiny.biformer(vc.Plan(**plan))
  variables = tiny.init(model)
  grads = tiny.gradients(model, variables, tiny.images(model))
  for name, grad in grads.items():
    assert np.all(np.isfinite(grad)) and np.any(grad), name
  deploy, folded = tiny.fold(model, variables)
  np.testing.assert_allclose(tiny.apply(deploy, folded, tiny.images(model)),
                             tiny.apply(model, variables, tiny.images(model)), rtol=1e-4, atol=1e-4)


# Axes that do not affect each other's cost.
ADDED = [plan for plan in map(plan_of, LEGAL_PAIRS)
         if "ffn" in plan and plan.keys() & {"heads", "attention"}]


@pytest.mark.parametrize("plan", ADDED, ids=words)
def test_the_savings_of_independent_axes_add_up(plan):
  dense, both = vc.count(tiny.deit(depth=1)), vc.count(tiny.deit(vc.Plan(**plan), depth=1))
  counts = [vc.count(tiny.deit(vc.Plan(**{axis: spec}), depth=1)) for axis, spec in plan.items()]
  for field in ("macs", "ideal_macs", "params"):
    saved = sum(getattr(dense, field) - getattr(one, field) for one in counts)
    assert getattr(both, field) == getattr(dense, field) - saved


def test_shvit_accepts_ffn_methods_and_ignores_head_methods():
  model = tiny.shvit(vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()))
  assert [model.plan.at(site).heads for site in model.sites()] == [None] * 3
  assert vc.count(model).params != vc.count(tiny.shvit()).params


@pytest.mark.parametrize("plan", [{axis: method} for axis in ("attention", "tokens")
                                  for method in METHODS[axis]], ids=words)
def test_shvit_refuses_methods_that_it_has_no_place_for(plan):
  with pytest.raises(ValueError, match=r"a single head there|may be dropped or merged|may bypass"
                     ) as error:
    tiny.shvit(vc.Plan(**plan))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("plan", ILLEGAL, ids=words)
def test_methods_that_do_not_compose_are_refused_with_the_reason(plan):
  with pytest.raises(ValueError, match=r"needs .* which .* removes.*; ") as error:
    combined(plan)
  assert "\n" not in str(error.value)
