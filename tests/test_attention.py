"""The attention core: whichever backend computes it, the same function, and no map in memory."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from vitcompact import attention, backends
from vitcompact.attention import Core
from vitcompact.heads.hmhsa import ScoreFilter

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 21, 19, 3, 4


def draw(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def arrays(queries=QUERIES, keys=KEYS, wide=7, heads=HEADS):
  return (draw(BATCH, queries, HEADS, WIDTH), draw(BATCH, keys, HEADS, WIDTH, seed=1),
          draw(BATCH, keys, heads, wide, seed=2))


SIZE = np.exp(draw(BATCH, KEYS, seed=3))
MASK = (draw(BATCH, HEADS, QUERIES, KEYS, seed=4) > 0).at[..., 0].set(True)
FILTER = ScoreFilter(draw(HEADS, 2, seed=5), draw(2, 3, 3, seed=6))
# name: (core of the differentiable fields, queries, heads of values, filter)
CASES = {
    "plain": ({}, QUERIES, HEADS, False),
    "size": ({"size": SIZE}, QUERIES, HEADS, False),
    "alive": ({"alive": jnp.float32(draw(BATCH, KEYS, seed=7) > 0)}, KEYS, HEADS, False),
    "mask": ({"mask": MASK}, QUERIES, HEADS, False),
    "filter": ({"size": SIZE}, QUERIES, HEADS + 2, True),
    "masked filter": ({"mask": MASK}, QUERIES, HEADS + 2, True),
}


@pytest.fixture
def small_tiles(monkeypatch):
  """Tiles of a few queries, the last one not full."""
  monkeypatch.setattr(backends, "tile_rows", lambda queries, keys: (5, -(-queries // 5)))
  monkeypatch.setattr(attention, "ROW_ENTRIES", 8 * KEYS * HEADS)
  monkeypatch.setattr(attention, "LEAST_ROWS", 4)


@pytest.mark.parametrize("name", CASES)
def test_every_backend_computes_the_same_function_and_gradients(name, small_tiles):
  fields, queries, heads, filtered = CASES[name]
  mask = {key: fields[key] for key in fields if key == "mask"}
  floats = {key: fields[key] for key in fields if key != "mask"}

  def run(backend):
    def loss(floats, query, key, value, taps):
      rescore = FILTER._replace(taps=taps) if filtered else None
      out = Core(**floats, **mask)(query, key, value, rescore)
      return jnp.sum(jnp.sin(out)), out
    with attention.using(backend):
      return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(
          floats, *arrays(queries, heads=heads), FILTER.taps)

  wanted = run("einsum")
  for backend in ("images", "tiled"):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6),
                 run(backend), wanted)
