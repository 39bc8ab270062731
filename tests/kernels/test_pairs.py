"""The list of chosen block pairs, indexed by key block."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact.kernels.pairs import pairs_by_key


@pytest.mark.parametrize("queries,keys,count", [(5, 7, 3), (6, 3, 1), (4, 4, 4)])
def test_each_key_block_lists_the_query_blocks_that_chose_it(queries, keys, count):
  order = jax.random.normal(jax.random.key(queries), (2, 3, queries, keys))
  chosen = jnp.argsort(order, axis=-1)[..., :count].astype(jnp.int32)
  query, first = pairs_by_key(chosen, keys)
  assert query.shape == (2, 3, queries * count) and first.shape == (2, 3, keys + 1)
  for b, f in np.ndindex(2, 3):
    for k in range(keys):
      expected = [q for q in range(queries) if k in np.asarray(chosen[b, f, q])]
      assert query[b, f, first[b, f, k]:first[b, f, k + 1]].tolist() == expected


def test_key_block_chosen_by_no_query_block_has_an_empty_list():
  query, first = pairs_by_key(jnp.asarray([[[[2], [0], [2]]]], jnp.int32), 4)
  assert query[0, 0].tolist() == [1, 0, 2]
  assert first[0, 0].tolist() == [0, 1, 1, 3, 3]
