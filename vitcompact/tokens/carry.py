"""Tokens: what goes from block to block, and where each token came from."""
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Tokens:
  """Tokens between two blocks: prefix tokens first, then by ascending source, a fused one last.

  x: (B, N, width).
  size: (B, N) float32, how many source tokens each holds, or None where nothing was merged.
  source: (B, S) int32, for each of the S tokens at the start the index of the one that holds it
    now, -1 where it was dropped; or None where no token was reduced yet.
  fused: whether the last token is a fused remainder, which is no patch.
  proportional: whether attention counts a token `size` times.
  """
  x: jax.Array
  size: jax.Array | None = None
  source: jax.Array | None = None
  fused: bool = flax.struct.field(pytree_node=False, default=False)
  proportional: bool = flax.struct.field(pytree_node=False, default=False)


def take(array_bn, index_bk):
  """Rows of (B, N, ...) by an index (B, K) for each image: (B, K, ...)."""
  index = index_bk.reshape(*index_bk.shape, *(1,) * (array_bn.ndim - 2))
  return jnp.take_along_axis(array_bn, index, axis=1)


def identity_source(tokens: Tokens):
  """The source map, made where there is none yet."""
  if tokens.source is not None:
    return tokens.source
  batch, count = tokens.x.shape[:2]
  return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))


def follow(source_bs, moved_bn):
  """The source map after token i went to moved[i] (-1: dropped)."""
  return jnp.where(source_bs < 0, -1, jnp.take_along_axis(moved_bn, jnp.maximum(source_bs, 0), 1))


def unmerge(tokens: Tokens):
  """(B, S, width): every source token with the features of the one that holds it, 0 if dropped."""
  source = identity_source(tokens)
  features = take(tokens.x, jnp.maximum(source, 0))
  return jnp.where(source[..., None] < 0, 0, features)
