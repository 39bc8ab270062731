"""The list of chosen block pairs, indexed by key block."""
import jax
import numpy as np
import pytest

from tests import tiny
from vitcompact.kernels.pairs import pairs_by_key


def by_key(chosen, keys):
  return map(np.asarray, jax.jit(pairs_by_key, static_argnums=1)(chosen, keys))


@pytest.mark.parametrize("queries,keys,count", [(5, 7, 3), (6, 3, 1), (4, 4, 4)])
def test_each_key_block_lists_the_query_blocks_that_chose_it(queries, keys, count):
  order = np.argsort(tiny.normal(2, 3, queries, keys, seed=queries), axis=-1)
  chosen = order[..., :count].astype(np.int32)
  query, first = by_key(chosen, keys)
  assert query.shape == (2, 3, queries * count) and first.shape == (2, 3, keys + 1)
  for b, f in np.ndindex(2, 3):
    for k in range(keys):
      expected = [q for q in range(queries) if k in chosen[b, f, q]]
      assert query[b, f, first[b, f, k]:first[b, f, k + 1]].tolist() == expected


def test_key_block_chosen_by_no_query_block_has_an_empty_list():
  query, first = by_key(np.int32([[[[2], [0], [2]]]]), 4)
  assert query[0, 0].tolist() == [1, 0, 2]
  assert first[0, 0].tolist() == [0, 1, 1, 3, 3]
