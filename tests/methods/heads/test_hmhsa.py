"""hMHSA: folding onto values and outputs equals filtering the maps."""
import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import attention, trees
from vitcompact.block import Attention
from vitcompact.methods.heads import hmhsa

GRID, PREFIX = (3, 4), 2
TOKENS = PREFIX + GRID[0] * GRID[1]


def qkv(real, heads, keys=TOKENS, dtype=jnp.float32):
  shapes = [(2, TOKENS, real, 5), (2, keys, real, 5), (2, keys, heads, 5)]
  return [tiny.normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes)]


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def filter_matrix(taps, gain, grid, tokens):
  """The definition: the (tokens, tokens) matrix F with F[i, i + offset] = tap, by plain loops."""
  matrix = np.zeros((tokens, tokens))
  half = taps.shape[-1] // 2
  if taps.ndim == 1:
    for i in range(tokens):
      for t, tap in enumerate(taps):
        if 0 <= i + t - half < tokens:
          matrix[i, i + t - half] = tap
    return matrix
  prefix = tokens - grid[0] * grid[1]
  for i in range(prefix):
    matrix[i, i] = gain[i]
  for y, x in itertools.product(range(grid[0]), range(grid[1])):
    for s, t in itertools.product(range(len(taps)), repeat=2):
      v, u = y + s - half, x + t - half
      if 0 <= v < grid[0] and 0 <= u < grid[1]:
        matrix[prefix + y * grid[1] + x, prefix + v * grid[1] + u] = taps[s, t]
  return matrix


def filter_maps(params, q, k, v, key_grid=GRID, np_=np, softmax=softmax):
  """The definition: A^_g = sum_r U_gr A_(g mod f) W_gr, forming every map, as an einsum.

  np_, softmax: of NumPy, or of JAX for gradients.
  """
  params = jax.tree.map(np.asarray, params)
  real, hallucinated = q.shape[2], v.shape[2] - q.shape[2]
  maps = softmax(np_.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5)
  maps_by_head = [maps[:, f] for f in range(real)]
  for g in range(hallucinated):
    total = 0
    for r in range(params["query_taps"].shape[1]):
      gains = [params[f"{side}_gain"][g, r] if f"{side}_gain" in params else None
               for side in ("query", "key")]
      u = filter_matrix(params["query_taps"][g, r], gains[0], GRID, q.shape[1])
      # Correlation along the map's key axis: A^[i, j] = sum_t v[t] A[i, j + t], so W is transposed.
      w = filter_matrix(params["key_taps"][g, r], gains[1], key_grid, k.shape[1]).T
      total = total + np_.einsum("in,bnm,mj->bij", u, maps[:, g % real], w)
    maps_by_head.append(total)
  return np_.einsum("bhnm,bmhe->bnhe", np_.stack(maps_by_head, axis=1), v)


@pytest.mark.parametrize("layout", ["map", "grid"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("real,heads", [(2, 4), (2, 3), (2, 7)])
def test_folding_onto_values_equals_forming_the_maps(layout, rank, real, heads):
  spec = vc.HMHSA(layout=layout, rank=rank, real_heads=real)
  module = hmhsa.Hallucinate(spec, GRID, GRID, PREFIX)
  q, k, v = qkv(real, heads)
  params = tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), q, k, v))["params"]
  expected = filter_maps(params, q, k, v)
  np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, q, k, v), expected,
                             atol=1e-5)


@pytest.mark.parametrize("layout,rank", [("map", 1), ("map", 2), ("grid", 1), ("grid", 3)])
def test_gradients_equal_those_with_maps_formed(layout, rank):
  module = hmhsa.Hallucinate(vc.HMHSA(layout=layout, rank=rank), GRID, GRID, PREFIX)
  args = qkv(2, 4)
  params = tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), *args))["params"]

  def loss(fn):
    return jax.jit(jax.grad(lambda args: jnp.sum(jnp.sin(fn(params, *args)))))(args)

  by_maps = functools.partial(filter_maps, np_=jnp, softmax=jax.nn.softmax)
  for got, expected in zip(loss(lambda p, *a: module.apply({"params": p}, *a)), loss(by_maps),
                           strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["map", "grid"])
def test_gradients_of_the_taps_match_finite_differences(layout):
  module = hmhsa.Hallucinate(vc.HMHSA(layout=layout, rank=2), GRID, GRID, PREFIX)
  args = qkv(2, 4)
  params = tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), *args))["params"]
  loss = jax.jit(lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, *args))))
  grads, step = jax.jit(jax.grad(loss))(params), 1e-2
  for name, leaf in jax.device_get(params).items():
    way = tiny.normal(*leaf.shape, seed=7)
    up, down = (float(loss({**params, name: leaf + np.float32(sign * step) * way}))
                for sign in (1, -1))
    np.testing.assert_allclose(np.sum(np.asarray(grads[name]) * way), (up - down) / (2 * step),
                               rtol=2e-2, atol=2e-2)


def test_without_a_grid_taps_run_along_the_token_order():
  module = hmhsa.Hallucinate(vc.HMHSA(layout="grid"), GRID, None, PREFIX)
  q, k, v = qkv(2, 4, keys=5)
  params = tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), q, k, v))["params"]
  assert params["key_taps"].shape == (2, 1, 3) and params["query_taps"].shape == (2, 1, 3, 3)
  assert "key_gain" not in params
  np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, q, k, v),
                             filter_maps(params, q, k, v, key_grid=None), atol=1e-5)


def test_logits_site_filters_the_scores_before_the_softmax():
  module = hmhsa.Hallucinate(vc.HMHSA(site="logits"))
  q, k, v = qkv(2, 4)
  params = tiny.randomised(jax.eval_shape(module.init, jax.random.key(0), q, k, v))["params"]
  scores = np.einsum("bnhd,bmhd->bhnm", q, k) / 5 ** 0.5
  mixed = np.pad(np.einsum("bfnm,fg->bgnm", scores, params["mix"]), [(0, 0)] * 2 + [(1, 1)] * 2)
  made = np.zeros_like(scores)
  for s, t in itertools.product(range(3), repeat=2):
    made += np.asarray(params["taps"])[None, :, s, t, None, None] * \
        mixed[:, :, s:s + TOKENS, t:t + TOKENS]
  maps = softmax(np.concatenate([scores, made], axis=1))
  np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, q, k, v),
                             np.einsum("bhnm,bmhe->bnhe", maps, v), atol=1e-5)


@pytest.mark.parametrize("spec", [vc.HMHSA(), vc.HMHSA(rank=3), vc.HMHSA(layout="grid", rank=2),
                                  vc.HMHSA(site="logits")])
def test_new_hallucinated_heads_copy_the_maps_of_their_source_heads(spec):
  module = hmhsa.Hallucinate(spec, GRID, GRID, PREFIX)
  q, k, v = qkv(2, 4)
  out, _ = jax.jit(module.init_with_output)(jax.random.key(0), q, k, v)
  copied = jax.jit(attention.DENSE.__call__)(
      np.tile(q, (1, 1, 2, 1)), np.tile(k, (1, 1, 2, 1)), v)
  np.testing.assert_allclose(out, copied, atol=1e-6)


def test_additional_filter_terms_start_at_zero_but_get_gradients():
  module = hmhsa.Hallucinate(vc.HMHSA(rank=2))
  args = qkv(2, 4)
  params = jax.device_get(jax.jit(module.init)(jax.random.key(0), *args)["params"])
  assert not params["query_taps"][:, 1].any() and params["key_taps"][:, 1].all()
  grads = jax.jit(jax.grad(lambda p: jnp.sum(module.apply({"params": p}, *args) ** 2)))(params)
  assert np.abs(grads["query_taps"])[:, 1].min() > 0


def test_all_heads_real_is_dense_attention_bit_for_bit():
  dense, same = tiny.deit(), tiny.deit(vc.Plan(heads=vc.HMHSA(real_heads=4)))
  variables, x = tiny.init(dense), tiny.images(dense)
  programs = [str(jax.make_jaxpr(model.apply)(variables, x)) for model in (dense, same)]
  assert programs[0] == programs[1]


def test_no_map_is_formed_for_hallucinated_heads():
  """No array of the traced program holds more N x N maps than there are real heads."""
  tokens = 50
  module = Attention(tiny.site(), vc.HMHSA())
  x = jax.ShapeDtypeStruct((1, tokens, 24), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  sizes = []

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      sizes.extend((var.aval.shape, np.prod(var.aval.shape)) for var in eqn.outvars)
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        walk(inner)

  walk(jax.make_jaxpr(module.apply)(variables, x).jaxpr)
  assert max(n for _, n in sizes) == 2 * tokens * tokens
  maps = [shape for shape, n in sizes if n == 2 * tokens * tokens]
  assert all(sorted(shape)[-2:] == [tokens, tokens] for shape in maps)


def test_bfloat16_stays_bfloat16():
  module = hmhsa.Hallucinate(vc.HMHSA(layout="grid"), GRID, GRID, PREFIX)
  args = qkv(2, 4, dtype=jnp.bfloat16)
  out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), *args)
  assert out.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_compacting_keeps_the_first_heads_and_copies_them():
  plan = vc.Plan(heads=vc.HMHSA())
  model = tiny.deit()
  variables = tiny.init(model)
  small, got = vc.compact(model, variables, plan)
  old, new = variables["params"]["blocks_1"], got["params"]["blocks_1"]
  for name in ("query", "key"):
    np.testing.assert_array_equal(new["attn"][name]["kernel"], old["attn"][name]["kernel"][:, :2])
    np.testing.assert_array_equal(new["attn"][name]["bias"], old["attn"][name]["bias"][:2])
  assert new["attn"]["value"] is old["attn"]["value"] and new["mlp"] is old["mlp"]
  # Equals the dense model in which heads 2 and 3 have the maps of heads 0 and 1.
  copied = jax.device_get(variables)
  for i in range(2):
    attn = copied["params"][f"blocks_{i}"]["attn"]
    for name in ("query", "key"):
      attn[name] = {leaf: np.concatenate([a[..., :2, :]] * 2, axis=-2)
                    for leaf, a in attn[name].items()}
  x = tiny.images(model)
  np.testing.assert_allclose(tiny.apply(small, got, x), tiny.apply(model, copied, x),
                             atol=1e-5)
  assert trees.differences(got, jax.eval_shape(small.init, jax.random.key(0), x)) == []


@pytest.mark.parametrize("fields,words", [
    ({"site": "scores"}, "'probs' or 'logits'"), ({"rank": 4}, "1 to kernel=3"),
    ({"kernel": 2}, "odd"), ({"layout": "tree"}, "'map' or 'grid'"), ({"real_heads": 0}, "'half'"),
    ({"site": "logits", "rank": 2}, "rank=1"), ({"site": "logits", "layout": "grid"}, "layout=")])
def test_invalid_option_is_rejected_with_the_rule(fields, words):
  with pytest.raises(ValueError, match="HMHSA") as error:
    vc.HMHSA(**fields)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_at_least_one_head_stays_real():
  assert vc.HMHSA().count_real(1) == 1 and vc.HMHSA().count_real(5) == 3
  with pytest.raises(ValueError, match="has only 2 heads"):
    vc.HMHSA(real_heads=3).count_real(2)
