"""Cached traces do not skip any check."""
import jax
import jax.numpy as jnp
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from tests import tiny
from vitcompact import checks, layers, trees

MODEL = tiny.deit(depth=1)
LEAF = "blocks_0/mlp/fc1/bias"


def with_leaf(leaf):
  """Returns the shapes of the model's variables, with one changed or missing."""
  named = trees.named_leaves(checks.variable_shapes(MODEL)["params"])
  named[LEAF] = leaf
  return {"params": trees.nested({name: leaf for name, leaf in named.items() if leaf is not None})}


@pytest.mark.parametrize("leaf,error", [
    (jax.ShapeDtypeStruct((95,), jnp.float32), ScopeParamShapeError),
    (jax.ShapeDtypeStruct((1, 96), jnp.float32), ScopeParamShapeError),
    (None, ScopeParamNotFoundError)])
def test_a_missing_or_misshapen_leaf_is_refused_as_by_linen(leaf, error):
  with pytest.raises(error, match=r"bias.*/blocks_0/mlp/fc1"):
    jax.eval_shape(MODEL.apply, with_leaf(leaf), checks.image_shapes(MODEL))


def test_callers_cannot_change_the_cached_shapes():
  checks.variable_shapes(MODEL)["params"].pop("blocks_0")
  assert "blocks_0" in checks.variable_shapes(MODEL)["params"]


def test_the_body_of_a_layer_is_traced_once_per_shape():
  calls = []
  body = layers.traced_once(lambda x: calls.append(x.shape) or 2 * x)
  program = jax.make_jaxpr(lambda x: body(body(x)) + body(x[:1]))(jnp.ones((2, 3)))
  assert calls == [(2, 3), (1, 3)]
  assert [eqn.primitive.name for eqn in program.eqns].count("mul") == 3   # inlined, not called
