"""What is not traced again is checked all the same."""
import jax
import jax.numpy as jnp
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from tests import tiny
from vitcompact import checks, layers, trees

MODEL = tiny.deit(depth=1)
LEAF = "blocks_0/mlp/fc1/bias"


def with_leaf(leaf):
  """Shapes of the model's variables, one of them another, or without it."""
  named = trees.named_leaves(checks.variable_shapes(MODEL)["params"])
  named[LEAF] = leaf
  return {"params": trees.nested({name: leaf for name, leaf in named.items() if leaf is not None})}


@pytest.mark.parametrize("leaf,error", [
    (jax.ShapeDtypeStruct((95,), jnp.float32), ScopeParamShapeError),
    (jax.ShapeDtypeStruct((1, 96), jnp.float32), ScopeParamShapeError),
    (None, ScopeParamNotFoundError)])
def test_a_leaf_of_another_shape_or_none_is_refused_as_linen_does(leaf, error):
  with pytest.raises(error, match=r"bias.*/blocks_0/mlp/fc1"):
    jax.eval_shape(MODEL.apply, with_leaf(leaf), checks.image_shapes(MODEL))


def test_shapes_that_are_kept_are_not_changed_by_who_got_them():
  checks.variable_shapes(MODEL)["params"].pop("blocks_0")
  assert "blocks_0" in checks.variable_shapes(MODEL)["params"]


def test_the_body_of_a_layer_is_traced_once_for_arrays_of_equal_shapes():
  calls = []
  body = layers.traced_once(lambda x: calls.append(x.shape) or 2 * x)
  program = jax.make_jaxpr(lambda x: body(body(x)) + body(x[:1]))(jnp.ones((2, 3)))
  assert calls == [(2, 3), (1, 3)]
  assert [eqn.primitive.name for eqn in program.eqns].count("mul") == 3   # written out, not called
