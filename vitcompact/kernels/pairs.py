"""The list of chosen blocks, sorted by keys instead of queries."""
import jax
import jax.numpy as jnp


def pairs_by_key(chosen_bfqs, keys: int):
  """Sorts the chosen pairs of blocks by their keys, as the gradients of keys are summed over them.

  Args:
    chosen_bfqs: int32, the blocks of keys chosen for each block of queries.
    keys: number of blocks of keys.
  Returns:
    query (B, f, q s) and first (B, f, keys + 1), int32: block k of keys was chosen for the blocks
    of queries query[first[k]:first[k + 1]], in ascending order, which may be none.
  """
  batch, heads, queries, count = chosen_bfqs.shape
  key = chosen_bfqs.astype(jnp.int32).reshape(batch, heads, -1)
  query = jnp.broadcast_to(jnp.arange(queries, dtype=jnp.int32)[:, None], (queries, count))
  query = jnp.broadcast_to(query.reshape(-1), key.shape)
  _, query = jax.lax.sort((key, query), num_keys=1, is_stable=True)
  at = (jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None])
  counts = jnp.zeros((batch, heads, keys + 1), jnp.int32).at[(*at, key + 1)].add(1)
  return query, jnp.cumsum(counts, axis=-1, dtype=jnp.int32)
