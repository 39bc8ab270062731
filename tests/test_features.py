"""features returns a model's activations on request, and costs nothing otherwise."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact.count import macs_of


@pytest.mark.parametrize("spec", [None, vc.HMHSA(), vc.HMHSA(layout="grid", rank=2),
                                  vc.HMHSA(site="logits")])
def test_attention_maps_times_values_give_the_models_attention(spec):
  model = tiny.deit(vc.Plan(heads=spec))
  variables, x = tiny.init(model), tiny.images(model)
  seen = jax.jit(lambda v, x: vc.features(model, v, x, maps=True))(variables, x)
  assert list(seen.features) == ["block_0", "block_1"]
  assert list(seen.maps) == ["blocks_0", "blocks_1"] and seen.maps["blocks_0"].shape[1] == 4
  np.testing.assert_allclose(seen.logits, tiny.apply(model, variables, x), atol=1e-5)
  # Recompute the attention of block 1 from its maps.
  p = variables["params"]["blocks_1"]

  def mean(a):
    return a.mean(-1, keepdims=True)

  y = seen.features["block_0"]
  y = (y - mean(y)) / jnp.sqrt(mean((y - mean(y)) ** 2) + 1e-6)
  y = y * p["norm1"]["scale"][None, None] + p["norm1"]["bias"][None, None]
  v = jnp.einsum("bnw,whd->bnhd", y, p["attn"]["value"]["kernel"]) + p["attn"]["value"]["bias"][
      None, None]
  out = jnp.einsum("bhnm,bmhd->bnhd", seen.maps["blocks_1"], v)
  out = jnp.einsum("bnhd,hdw->bnw", out, p["attn"]["out"]["kernel"])
  got = model.apply(variables, x, capture_intermediates=lambda m, _: m.name == "attn",
                    mutable=["intermediates"])[1]["intermediates"]["blocks_1"]["attn"]
  np.testing.assert_allclose(out + p["attn"]["out"]["bias"][None, None], got["attend"][0],
                             atol=1e-4)


def test_nothing_extra_is_computed_without_a_request():
  model = tiny.deit(vc.Plan(heads=vc.HMHSA()))
  variables, x = tiny.init(model), tiny.images(model)
  plain = macs_of(model.apply, variables, x)
  assert macs_of(lambda v, x: vc.features(model, v, x).logits, variables, x) == plain
  assert macs_of(lambda v, x: vc.features(model, v, x, maps=True), variables, x).total > plain.total
  assert set(model.init(jax.random.key(0), x)) == {"params"}
