"""Names of leaves: a typo fails at the start, differences are named, a digest covers every bit."""
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact import trees

TREE = {"blocks_0": {"fc1": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}},
        "pos_embed": jnp.ones((1, 4, 2))}


def test_the_first_rule_that_matches_the_full_name_wins():
  rules = [(r".*/kernel", "k"), (r"blocks_\d+/.*", "b"), (r"pos_embed", "p")]
  assert trees.first_match(rules, TREE) == {
      "blocks_0": {"fc1": {"kernel": "k", "bias": "b"}}, "pos_embed": "p"}


def test_a_leaf_without_a_rule_and_a_rule_without_a_leaf_are_errors():
  with pytest.raises(ValueError, match=r"no rule for parameter blocks_0/fc1/bias \(3,\)"):
    trees.first_match([(r".*/kernel", 1), (r"pos_embed", 1)], TREE)
  rules = [(r".*", 1), (r".*/kernal", 2)]
  with pytest.raises(ValueError, match="kernal"):
    trees.first_match(rules, TREE)
  assert trees.first_match(rules, TREE, may_be_idle=True)["pos_embed"] == 1


def test_differences_name_every_leaf_that_is_not_as_expected():
  got = {"blocks_0": {"fc1": {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(3)}},
         "pos_embed": jnp.ones((1, 4, 2), jnp.bfloat16)}
  assert trees.differences(got, TREE) == [
      "blocks_0/fc1/kernel is (3, 2), not (2, 3)", "missing blocks_0/fc1/bias (3,)",
      "pos_embed is bfloat16, not float32", "unexpected blocks_0/fc1/scale (3,)"]
  assert trees.differences(TREE, TREE) == []


def test_nested_is_the_inverse_of_named_leaves():
  assert trees.nested({"a/b/c": 1, "a/d": 2, "e": 3}) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
  again = trees.nested(trees.named_leaves(TREE))
  assert trees.differences(again, TREE) == [] and trees.digest(again) == trees.digest(TREE)


def test_a_digest_depends_on_bits_names_and_shapes_but_not_on_order():
  digest = trees.digest(TREE)
  assert digest == trees.digest(dict(reversed(TREE.items())))
  bits = np.ones((1, 4, 2), np.float32)
  bits.view(np.uint32)[0, 3, 1] ^= 1
  for other in (bits, np.ones((1, 2, 4), np.float32), np.ones((1, 4, 2), np.float64)):
    assert trees.digest({**TREE, "pos_embed": other}) != digest
  assert trees.digest({"blocks_0": TREE["blocks_0"], "pos": TREE["pos_embed"]}) != digest
  assert trees.size(TREE) == 17
