"""Attention between channels (DaViT, Ding et al., ECCV 2022, arXiv 2204.03645)."""
import jax
import jax.numpy as jnp

from vitcompact.attention.reference import SCOPE


def channel(query_bnhe, key_bmhd, value_bmhe, scale: float):
  """y_n = A q_n for each token n and head, A = softmax(scale sum_m k_m v_m^T) over its last axis.

  The map A over channels comes from keys and values, summed over all tokens, and averages the
  channels of queries. The order of the tokens does not matter, and a token whose key or value is
  zero adds nothing to the map. Sums over tokens and the softmax are computed in float32.

  Args:
    query_bnhe, key_bmhd, value_bmhe: (B, N, h, e), (B, M, h, d), (B, M, h, e), of one dtype.
    scale: d ** -0.5 in DaViT, so that scores grow with the number of tokens; with M ** -0.5 they do
      not, and `channel(value, query, key, scale)` is the later form of Florence-2.
  Returns:
    (B, N, h, d) in the queries' dtype.
  """
  with jax.named_scope(SCOPE):
    scores_bhde = scale * jnp.einsum("bmhd,bmhe->bhde", key_bmhd, value_bmhe,
                                     preferred_element_type=jnp.float32)
    maps_bhde = jax.nn.softmax(scores_bhde, axis=-1).astype(query_bnhe.dtype)
    return jnp.einsum("bhde,bnhe->bnhd", maps_bhde, query_bnhe)
