"""Every pair and triple of axes, and all four, is a model that trains, folds and is counted."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import trees
from vitcompact.models.lvvit import TokenLogits

METHODS = {
    "heads": [vc.HMHSA()],
    "attention": [vc.Sparsifiner(keep=0.5, rank=4),
                  vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0)],
    "tokens": [vc.EViT(keep=0.6, blocks=(0,)), vc.DynamicViT(keep=0.6, blocks=(1,)),
               vc.ToMe(r=3), vc.MCTF(r=3)],
    "ffn": [vc.CFFN()],
}
ALL = [dict(zip(axes, methods, strict=True))
       for count in (2, 3, 4) for axes in itertools.combinations(METHODS, count)
       for methods in itertools.product(*(METHODS[axis] for axis in axes))]
# MCTF fuses by the attention that a token receives from all.
ILLEGAL = [plan for plan in ALL if "attention" in plan and isinstance(plan.get("tokens"), vc.MCTF)]
PLANS = [plan for plan in ALL if plan not in ILLEGAL]


def words(plan):
  return "-".join(getattr(spec, "granularity", type(spec).__name__) for spec in plan.values())


def loss(model, variables, key):
  out, _ = model.apply(variables, tiny.images(model), train=True, rngs={"dropout": key},
                       mutable=["batch_stats"])
  out = out.logits if isinstance(out, TokenLogits) else out
  return jnp.sum(out ** 2)


@pytest.mark.parametrize("plan", PLANS, ids=words)
def test_it_trains_and_folds_to_the_same_function(plan):
  """Not compiled as a whole: their operations are the same, and compile once for all of them."""
  model = tiny.deit(vc.Plan(**plan))
  variables = tiny.init(model)
  grads = jax.grad(lambda params: loss(model, {**variables, "params": params},
                                       jax.random.key(0)))(variables["params"])
  for name, grad in trees.named_leaves(grads).items():
    assert np.all(np.isfinite(grad)), name
  assert all(np.any(grad) for name, grad in trees.named_leaves(grads).items()
             if name.endswith("attn/value/kernel"))
  deploy, folded = vc.fold(model, variables)
  np.testing.assert_allclose(deploy.apply(folded, tiny.images(model)),
                             model.apply(variables, tiny.images(model)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS, ids=words)
def test_what_the_axes_save_adds_up(plan):
  """Of axes that do not change each other's work, the savings are the sum of their savings."""
  count = vc.count(tiny.deit(vc.Plan(**plan)))
  assert 0 < count.ideal_macs <= count.macs
  assert 0 < count.ideal_attention_macs <= count.attention_macs <= count.macs
  if set(plan) <= {"heads", "ffn"} or set(plan) == {"attention", "ffn"}:
    dense = vc.count(tiny.deit())
    each = [vc.count(tiny.deit(vc.Plan(**{axis: spec}))) for axis, spec in plan.items()]
    for field in ("macs", "ideal_macs", "params"):
      saved = sum(getattr(dense, field) - getattr(one, field) for one in each)
      assert getattr(count, field) == getattr(dense, field) - saved


@pytest.mark.parametrize("plan", ILLEGAL, ids=words)
def test_what_does_not_compose_is_refused_with_the_reason(plan):
  with pytest.raises(ValueError, match="MCTF"):
    tiny.deit(vc.Plan(**plan))
