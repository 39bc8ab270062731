"""Attention between channels: its equation, and how the scale changes with the number of tokens."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact.attention.channel import channel
from vitcompact.count import macs_of

B, N, H, D, E = 2, 7, 3, 4, 5


def draw(*shapes, spread=1.0):
  rng = np.random.default_rng(0)
  return [spread * rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def qkv(tokens=N, width=D):
  return draw(*[(B, tokens, H, width)] * 3)


def by_loops(query, key, value, scale):
  """Computes one image and head at a time, in float64."""
  query, key, value = (x.astype(np.float64) for x in (query, key, value))
  out = np.zeros((*query.shape[:3], key.shape[3]))
  for b in range(len(query)):
    for h in range(query.shape[2]):
      exp = np.exp(scale * key[b, :, h].T @ value[b, :, h])
      map_de = exp / exp.sum(axis=1, keepdims=True)
      out[b, :, h] = (map_de @ query[b, :, h].T).T
  return out


def test_keys_and_values_form_the_map_and_queries_are_averaged():
  query, key, value = draw((B, N, H, E), (B, 9, H, D), (B, 9, H, E))
  got = channel(query, key, value, 0.3)
  assert got.shape == (B, N, H, D)
  np.testing.assert_allclose(got, by_loops(query, key, value, 0.3), atol=2e-6)


def test_each_row_of_the_map_sums_to_one():
  _, key, value = qkv()
  np.testing.assert_allclose(channel(jnp.ones((B, N, H, D)), key, value, 2.0), 1, atol=1e-6)


def test_permuting_the_tokens_permutes_the_output():
  order = np.random.default_rng(1).permutation(N)
  arrays = qkv()
  np.testing.assert_allclose(channel(*(x[:, order] for x in arrays), 0.5),
                             channel(*arrays, 0.5)[:, order], atol=1e-6)


def test_tokens_with_zero_keys_or_values_do_not_change_the_map():
  query, key, value = qkv()
  longer = [np.concatenate([x, 3 * np.ones((B, 2, H, D), np.float32)], axis=1)
            for x in (query, key, value)]
  for zeroed in (1, 2):
    arrays = list(longer)
    arrays[zeroed] = np.concatenate([arrays[zeroed][:, :N], np.zeros((B, 2, H, D))], axis=1)
    np.testing.assert_allclose(channel(*arrays, 0.5)[:, :N], channel(query, key, value, 0.5),
                               atol=1e-6)


@pytest.mark.parametrize("scale,factor", [(lambda tokens: D ** -0.5, 2),
                                          (lambda tokens: tokens ** -0.5, 2 ** 0.5)])
def test_doubling_the_tokens_scales_the_scores_by_2_or_by_sqrt_2(scale, factor):
  """Duplicates an image. Scores are the log of the map, up to a constant in each row."""
  _, key, value = qkv()
  eye = np.broadcast_to(np.eye(D, dtype=np.float32)[None, :, None], (B, D, H, D))

  def scores(key, value):
    map_behd = np.log(channel(eye, key, value, scale(key.shape[1])))   # token e has only channel e
    return map_behd - map_behd.mean(axis=1, keepdims=True)

  twice = [np.concatenate([x, x], axis=1) for x in (key, value)]
  np.testing.assert_allclose(scores(*twice), factor * scores(key, value), rtol=1e-3, atol=1e-4)


def test_florence2_form_is_the_same_function_with_its_arguments_swapped():
  """In Florence-2, queries and keys form the map, with scale N ** -0.5, and values are averaged."""
  query, key, value = qkv()
  scores = np.einsum("bnhd,bnhe->bhde", query, key) * N ** -0.5
  expected = np.einsum("bhde,bnhe->bnhd", np.asarray(jax.nn.softmax(scores)), value)
  np.testing.assert_allclose(channel(value, query, key, N ** -0.5), expected, atol=1e-6)


def test_bfloat16_inputs_are_summed_over_tokens_in_float32():
  """Scores of 1001 and 1000, which would be equal in bfloat16."""
  ones = jnp.ones((1, 1001, 1, 1), jnp.bfloat16)
  value = jnp.concatenate([ones, ones.at[0, 0].set(0)], axis=-1)
  query = jnp.asarray([1, 0], jnp.bfloat16).reshape(1, 1, 1, 2)
  out = channel(query, ones, value, 1.0)
  assert out.dtype == jnp.bfloat16 and out.shape == (1, 1, 1, 1)
  np.testing.assert_allclose(float(out[0, 0, 0, 0]), np.e / (np.e + 1), rtol=4e-3)


def test_counted_as_attention_with_a_cost_linear_in_tokens():
  for tokens in (N, 2 * N):
    shape = jax.ShapeDtypeStruct((1, tokens, H, D), "float32")
    macs = macs_of(lambda *x: channel(*x, 0.5), shape, shape, shape)
    assert macs == (2 * tokens * H * D * D, 2 * tokens * H * D * D)
