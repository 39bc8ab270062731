"""The tokens passed to the next block match the definitions, over several reductions."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.methods.tokens import reference
from vitcompact import attention, token_state
from vitcompact.attention import Core
from vitcompact.methods import merging
from vitcompact.methods.tokens import mctf
from vitcompact.token_state import Tokens

BATCH, COUNT, WIDTH = 2, 20, 6


def draw(seed, *shape):
  return tiny.normal(*shape, seed=seed)


def heads(seed, count):
  return draw(seed, BATCH, count, 3, 4), draw(seed + 100, BATCH, count, 3, 4)


def run_chain(step, steps=2):
  """Returns tokens after each of several step(tokens, query, key), with the queries and keys."""
  tokens, out = Tokens(draw(0, BATCH, COUNT, WIDTH)), []
  for i in range(steps):
    query, key = heads(i + 1, tokens.x.shape[1])
    tokens = jax.device_get(jax.jit(step)(tokens, query, key))
    out.append((tokens, np.asarray(query, float), np.asarray(key, float)))
  return out


def assert_same(tokens, image, expected):
  np.testing.assert_allclose(tokens.x[image], [t["x"] for t in expected], atol=2e-5)
  if tokens.size is not None:
    np.testing.assert_allclose(tokens.size[image], [t["size"] for t in expected])
    assert float(tokens.size[image].sum()) == COUNT
  source = np.full(COUNT, -1)
  for index, token in enumerate(expected):
    source[token["of"]] = index
  np.testing.assert_array_equal(tokens.source[image], source)
  patch = [t["patch"] for t in expected]
  remainder = np.zeros(len(expected), bool) if tokens.remainder is None else tokens.remainder[image]
  np.testing.assert_array_equal(remainder, np.logical_not(patch))


def assert_follows(chain, redo):
  """Checks a chain against redo(tokens of the reference, query, key) -> tokens."""
  for image in range(BATCH):
    expected = reference.start(draw(0, BATCH, COUNT, WIDTH)[image].astype(float))
    for tokens, query, key in chain:
      expected = redo(expected, query[image], key[image])
      assert_same(tokens, image, expected)


@pytest.mark.parametrize("keep,fuse,prefix", [(0.7, True, 1), (0.7, False, 2), (0.9, True, 2)])
def test_evit_keeps_what_the_class_token_attends_to(keep, fuse, prefix):
  spec = vc.EViT(keep=keep, fuse=fuse)
  chain = run_chain(lambda t, q, k: spec.reduce(t, q, k, prefix), steps=3)
  assert_follows(chain, lambda t, q, k: reference.evit(t, q, k, prefix, keep, fuse))
  assert chain[-1][0].fused == fuse


def test_kept_remainder_still_does_not_count_as_a_patch():
  """In the second reduction, the class token attends most to the remainder of the first."""
  spec = vc.EViT(keep=0.5)
  query, key = heads(2, 12)
  key[:, -1] = 20 * query[:, 0]

  @jax.jit
  def run():
    first = spec.reduce(Tokens(draw(0, BATCH, COUNT, WIDTH)), *heads(1, COUNT), 1)
    second = spec.reduce(first, query, key, 1)
    return second, token_state.by_patch(second.x[:, 1:], second, 1)

  second, (rows, keep_mask) = jax.device_get(run())
  assert second.x.shape[1] == 1 + 6 + 1      # half of 11
  np.testing.assert_array_equal(second.remainder, [[False] * 6 + [True] * 2] * BATCH)
  assert keep_mask.sum() == BATCH * 5 and not rows[keep_mask == 0].any()
  np.testing.assert_array_equal(np.unique(rows[0].sum(-1)[keep_mask[0] > 0]),
                                np.unique(second.x[0, 1:6].sum(-1)))


@pytest.mark.parametrize("order", ["position", "code"])
@pytest.mark.parametrize("prefix", [1, 2])
def test_tome_merges_the_most_similar_tokens(order, prefix):
  spec = vc.ToMe(r=4, order=order)
  chain = run_chain(lambda t, q, k: spec.reduce(4, t, q, k, prefix))
  assert_follows(chain, lambda t, q, k: reference.tome(t, k, prefix, 4, order))


@pytest.mark.parametrize("prefix,fields", [
    (1, {}), (2, {"order": "code"}), (1, {"order": "code", "pooling": "size_attention_mean"}),
    (2, {"bidirectional": False, "pooling": "max"}),
    (1, {"bidirectional": False, "order": "code", "prop_attn": False, "tau_size": 0.1}),
    (2, {"pooling": "mean", "tau_info": 2.0, "tau_sim": 0.5})])
def test_mctf_fuses_by_its_three_criteria(prefix, fields):
  spec = vc.MCTF(r=5, **fields)
  chain = run_chain(lambda t, q, k: spec.fuse(t, q, k, prefix)[0])
  assert [tokens.x.shape[1] for tokens, _, _ in chain] == [15, 10]
  assert_follows(chain, lambda t, q, k: reference.mctf(t, q, k, prefix, 5, spec)[0])


@pytest.mark.parametrize("fields", [{}, {"pooling": "size_attention_mean"}, {"pooling": "mean"},
                                    {"pooling": "max"}, {"pooling": "max", "order": "code"},
                                    {"pooling": "mean", "bidirectional": False}])
def test_mctf_attends_one_step_ahead_as_if_its_maps_were_merged(fields):
  """A'V' with A' formed and its rows pooled as the features are; rows pooled by means sum to 1."""
  spec, prefix = vc.MCTF(r=5, **fields), 1
  size = np.random.default_rng(9).integers(1, 5, (BATCH, 15)).astype(np.float32)
  first = Tokens(draw(0, BATCH, 15, WIDTH), size=size, proportional=True)
  query, key = heads(2, 15)
  value = draw(3, BATCH, 10, 3, 4)

  @jax.jit
  def run(first):
    fused, to_fused = spec.fuse(first, query, key, prefix)
    core = to_fused(first.core())
    return fused, core(query, key, value), core.merged(core.maps(query, key))

  fused, got, got_maps = jax.device_get(run(first))
  assert fused.x.shape[1] == 10
  for image in range(BATCH):
    tokens = reference.start(first.x[image].astype(float))
    for token, size in zip(tokens, first.size[image], strict=True):
      token["size"] = float(size)
    q, k = query[image].astype(float), key[image].astype(float)
    _, maps = reference.mctf(tokens, q, k, prefix, 5, spec)
    np.testing.assert_allclose(got_maps[image], maps, atol=1e-5)
    if spec.pooling != "max":
      np.testing.assert_allclose(got_maps[image].sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(got[image], np.einsum("hnm,mhe->nhe", maps, value[image]),
                               atol=1e-5)


def test_received_attention_is_summed_in_tiles(monkeypatch):
  monkeypatch.setattr(mctf, "TILE", 7)      # 20 queries make three tiles, the last one padded
  query, key = heads(1, COUNT)
  size = np.arange(1, COUNT + 1, dtype=np.float32)[None].repeat(BATCH, 0)
  maps, received = jax.jit(lambda query, key: (
      Core(size=size).maps(query, key), mctf.received_attention(query, key, size)))(query, key)
  np.testing.assert_allclose(received, np.mean(np.asarray(maps), axis=(1, 2)), atol=1e-6)
  shapes = [v.aval.shape for eqn in jax.make_jaxpr(mctf.received_attention)(query, key).jaxpr.eqns
            for v in eqn.outvars]
  assert (BATCH, 3, COUNT, COUNT) not in shapes


def pairs_of_twins():
  """The class token, an unpaired token, then nine pairs of equal neighbours."""
  x = draw(0, BATCH, COUNT // 2, WIDTH)
  x = np.repeat(x, 2, axis=1)
  x[:, 0] = 3
  return Tokens(x)


@pytest.mark.parametrize("spec", [vc.ToMe(r=9), vc.MCTF(r=9)])
def test_merging_then_unmerging_identical_tokens_is_the_identity(spec):
  tokens = pairs_of_twins()
  if isinstance(spec, vc.ToMe):
    same = tokens.x[:, :, None]
    fewer = jax.jit(lambda t: spec.reduce(9, t, same, same, 1))(tokens)
  else:
    flat = np.zeros((BATCH, COUNT, 1, 4), np.float32)      # all tokens receive the same attention
    fewer = jax.jit(lambda t: spec.fuse(t, flat, flat, 1)[0])(tokens)
  assert fewer.x.shape[1] == COUNT - 9 and set(np.unique(fewer.size)) == {1, 2}
  np.testing.assert_allclose(jax.jit(token_state.unmerge)(fewer), tokens.x, atol=1e-6)


def test_attention_with_sizes_is_attention_over_repeated_tokens():
  query, key, value = (draw(i, BATCH, 7, 3, 4) for i in range(3))
  size = [1, 3, 2, 1, 1, 4, 2]
  core = Core(size=np.broadcast_to(np.array(size, np.float32), (BATCH, 7)))
  got = jax.jit(lambda *qkv: core(*qkv))(query, key, value)
  expected = jax.jit(lambda *qkv: attention.DENSE(*qkv))(
      query, *(np.repeat(x, size, axis=1) for x in (key, value)))
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_recomputed_attention_over_equal_tokens_equals_one_step_ahead():
  """If only equal tokens are fused, A' is the attention of the fused tokens."""
  tokens, weight = pairs_of_twins(), draw(5, WIDTH, 8)
  spec = vc.MCTF(r=9, tau_info=1e9)     # by similarity only

  def project(x):
    return (x @ weight).reshape(*x.shape[:2], 2, 4)

  @jax.jit
  def run(tokens):
    old = project(tokens.x)
    fused, to_fused = spec.fuse(tokens, old, old, 1)
    again, none = dataclasses.replace(spec, one_step_ahead=2).fuse(tokens, old, old, 1)
    assert none is None
    new = project(again.x)
    return to_fused(tokens.core())(old, old, project(fused.x)), again.core()(new, new, new)

  to_fused, precise = run(tokens)
  np.testing.assert_allclose(to_fused, precise, atol=1e-5)
  assert to_fused.shape[1] == COUNT - 9


def test_no_gradient_flows_through_a_choice():
  x, (query, key) = draw(0, BATCH, COUNT, WIDTH), heads(1, COUNT)

  def gradients_of(reducer):
    return jax.device_get(jax.jit(jax.grad(
        lambda q, k: jnp.sum(jnp.sin(reducer(Tokens(x), q, k))), argnums=(0, 1)))(query, key))

  for reducer in (lambda t, q, k: vc.ToMe().reduce(4, t, q, k, 1).x,
                  lambda t, q, k: vc.MCTF(r=5, pooling="size_attention_mean").fuse(t, q, k, 1)[0].x,
                  lambda t, q, k: vc.EViT(fuse=False).reduce(t, q, k, 1).x):
    assert not any(np.any(grad) for grad in gradients_of(reducer))
  assert all(np.any(grad) for grad in gradients_of(lambda t, q, k: vc.EViT().reduce(t, q, k, 1).x))
  fused = jax.jit(jax.grad(
      lambda x: jnp.sum(vc.MCTF(r=5).fuse(Tokens(x), query, key, 1)[0].x ** 2)))(x)
  assert np.isfinite(fused).all() and np.abs(fused).min() > 0


def test_all_zero_tokens_match_without_nan():
  zero = Tokens(jnp.zeros((1, COUNT, WIDTH)))
  flat = jnp.zeros((1, COUNT, 1, 4))
  x, chosen = jax.jit(lambda: (vc.MCTF(r=5).fuse(zero, flat, flat, 1)[0].x,
                               merging.match(flat[:, :, 0], 9, 1)[0]))()
  assert np.isfinite(x).all() and len(set(np.asarray(chosen[0]).tolist())) == 9


def test_merge_decisions_use_no_scatter():
  """XLA took 28 s to compile the 11 fusions of DeiT-S, a quarter of it for scatters of
  indices."""
  rank = jnp.broadcast_to(jnp.arange(COUNT), (BATCH, COUNT))

  def merge(weight):
    return merging.merge_of(mctf.pairings(weight, 6, bidirectional=True)[0], rank)

  traced = jax.make_jaxpr(merge)(draw(1, BATCH, COUNT // 2, COUNT // 2))
  assert " = scatter" not in str(traced)
