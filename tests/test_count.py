"""count reads the traced program and follows every construct that repeats or hides work."""
import jax
import jax.numpy as jnp
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact.count import Macs, macs_of

X, W = jnp.zeros((4, 8)), jnp.zeros((8, 8))


def test_products_inside_scan_jit_cond_and_remat_are_counted():
  once = 4 * 8 * 8
  assert macs_of(lambda x: x @ W, X) == Macs(once, 0)
  assert macs_of(lambda x: jax.lax.scan(lambda c, _: (c @ W, None), x, None, length=7)[0],
                 X).total == 7 * once
  assert macs_of(jax.jit(lambda x: x @ W), X).total == once
  assert macs_of(jax.checkpoint(lambda x: x @ W), X).total == once
  assert macs_of(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ W @ W, lambda: x), X).total == \
      2 * once
  assert macs_of(jax.vmap(lambda x: x @ W), X[None]).total == once


def test_groups_of_convolutions_are_counted():
  x = jnp.zeros((1, 6, 6, 8))

  def conv(groups):
    w = jnp.zeros((3, 3, 8 // groups, 8))
    return macs_of(lambda x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups), x).total

  assert conv(1) == 36 * 9 * 8 * 8 and conv(8) == 36 * 9 * 8


def test_a_loop_of_unknown_length_is_refused():
  with pytest.raises(ValueError, match="unknown length"):
    macs_of(lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ W, x), X)


@pytest.mark.parametrize("spec,filters", [
    (vc.HMHSA(), 3), (vc.HMHSA(rank=2), 6), (vc.HMHSA(kernel=5), 5),
    (vc.HMHSA(layout="grid"), 9)])
def test_hallucinated_heads_cost_their_values_and_taps(spec, filters):
  """Against arithmetic: one block, 16 patches + 1 token, 4 heads of 6, two of them real."""
  n, dh, real, hallucinated = 17, 6, 2, 2
  model = tiny.deit(vc.Plan(heads=spec), depth=1)
  dense = vc.count(tiny.deit(depth=1))
  count = vc.count(model)
  assert dense.attention_macs == 2 * 4 * n * n * dh
  assert count.attention_macs == n * n * dh * (real + real + hallucinated * spec.rank)
  taps = 2 * hallucinated * n * dh * filters
  if spec.layout == "grid":      # prefix tokens have a single gain instead
    taps = 2 * hallucinated * dh * (16 * 9 + 1)
  projections = 2 * n * 24 * hallucinated * dh
  assert dense.macs - count.macs == projections + dense.attention_macs - count.attention_macs - taps


def test_the_training_form_counts_all_branches_but_sums_them_first():
  plan = vc.Plan(ffn=vc.CFFN())
  trained, deployed = vc.count(tiny.deit(plan)), vc.count(tiny.deit(plan, deploy=True))
  branch = 96 * 12 + 12 * 24
  assert trained.params - deployed.params > 2 * branch   # two blocks, one more branch, and norms
  assert trained.macs == trained.ideal_macs == deployed.macs == deployed.ideal_macs


def test_another_image_size_has_its_own_count():
  model = tiny.deit()
  assert vc.count(model, image_size=64).macs == vc.count(tiny.deit(image_size=64)).macs
  with pytest.raises(ValueError, match="not a multiple of patch_size=8"):
    vc.count(model, image_size=30)
