"""The attention core: everything that attends goes through `attend`."""
import flax.linen as nn
import jax
import jax.numpy as jnp

# A name scope: `count` finds the score and value products of a traced program by it.
SCOPE = "vitcompact.attention"


def scores(query_bnhd, key_bmhd):
  """Scaled scores q.k / sqrt(d), in float32: (B, N, h, d), (B, M, h, d) -> (B, h, N, M)."""
  scale = query_bnhd.shape[-1] ** -0.5
  with jax.named_scope(SCOPE):
    return jnp.einsum("bnhd,bmhd->bhnm", query_bnhd * scale, key_bmhd,
                      preferred_element_type=jnp.float32)


def weigh(maps_bhnm, value_bmhe):
  """Values averaged under attention maps: (B, h, N, M), (B, M, h, e) -> (B, N, h, e)."""
  with jax.named_scope(SCOPE):
    return jnp.einsum("bhnm,bmhe->bnhe", maps_bhnm.astype(value_bmhe.dtype), value_bmhe)


def attend(query_bnhd, key_bmhd, value_bmhe):
  """softmax(q k^T / sqrt(d)) v for each head.

  Args:
    query_bnhd: (B, N, h, d).
    key_bmhd: (B, M, h, d).
    value_bmhe: (B, M, h, e); e may differ from d.
  Returns:
    (B, N, h, e) in the values' dtype; the softmax runs in float32.
  """
  return weigh(jax.nn.softmax(scores(query_bnhd, key_bmhd), axis=-1), value_bmhe)


def wants_maps(module: nn.Module) -> bool:
  """Whether somebody asked for attention maps: they are formed, and sown as "maps", only then."""
  return module.is_mutable_collection("maps") and not module.is_initializing()
