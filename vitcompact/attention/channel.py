"""Attention between channels (DaViT, Ding et al., ECCV 2022, arXiv 2204.03645)."""
import jax
import jax.numpy as jnp

from vitcompact.attention.reference import SCOPE


def channel(query_bnhe, key_bmhd, value_bmhe, scale: float):
  """y_n = A q_n for each token n and head, A = softmax(scale sum_m k_m v_m^T) over its last axis.

  Keys and values make the map, of channels and over all tokens; queries are what it averages. The
  order of the tokens does not matter, and one whose key or value is zero adds nothing to the map.
  Sums over tokens and the softmax are computed in float32.

  Args:
    query_bnhe, key_bmhd, value_bmhe: (B, N, h, e), (B, M, h, d), (B, M, h, e), of one dtype.
    scale: d ** -0.5 in DaViT, with which scores grow with the number of tokens; M ** -0.5 does not.
      With the latter, `channel(value, query, key, scale)` is the later form of Florence-2.
  Returns:
    (B, N, h, d) in the queries' dtype.
  """
  with jax.named_scope(SCOPE):
    scores_bhde = scale * jnp.einsum("bmhd,bmhe->bhde", key_bmhd, value_bmhe,
                                     preferred_element_type=jnp.float32)
    maps_bhde = jax.nn.softmax(scores_bhde, axis=-1).astype(query_bnhe.dtype)
    return jnp.einsum("bhde,bnhe->bnhd", maps_bhde, query_bnhe)
