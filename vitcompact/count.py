"""count: parameters, and multiply-accumulates of the traced inference program."""
import functools
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention, trees
from vitcompact.checks import check_model, image_shapes
from vitcompact.depthwise import SHIFT_AND_ADD
from vitcompact.fold import fold
from vitcompact.models import check_value


class Macs(NamedTuple):
  total: int = 0
  attention: int = 0   # score and value products

  def __add__(self, other):
    return Macs(self.total + other.total, self.attention + other.attention)

  def times(self, n):
    return Macs(self.total * n, self.attention * n)


class Count(NamedTuple):
  """Parameters, and the cost of one image.

  Multiply-accumulates are counted for matrix products and convolutions, and one for each tap of a
  token filter. `macs` are those that the traced program executes; `ideal_macs` those that the
  method needs: its deployed form, only the pairs that are scored, only coefficients and basis
  entries that are not 0 (see `attention.share` and `layers.nonzero`). `attention_macs` are the
  score and value products among them, including those of mask predictors."""
  params: int
  macs: int
  ideal_macs: int
  attention_macs: int
  ideal_attention_macs: int


def count(model: nn.Module, image_size: int | tuple[int, int] | None = None,
          variables=None) -> Count:
  """Counts a model without running it; `image_size` defaults to the model's own.

  variables: the model's; if given, `ideal_macs` counts only the entries that are not 0 in them,
    for methods that need no others. Otherwise all entries count.
  """
  check_model(model)
  # Before the image size changes: the positions in `variables` have the model's own size.
  folded = {} if variables is None else fold(model, variables)[1]["params"]
  if image_size is not None:
    check_value("image_size", int | tuple[int, int], image_size)
  if image_size is not None and _pair(image_size) != _pair(model.image_size):
    model = model.clone(image_size=image_size)
    model.check()
  params, jaxpr = _trace(model)
  macs = _walk(jaxpr)
  ideal = jaxpr if model.deploy else _trace(model.clone(deploy=True))[1]
  ideal = _walk(ideal, folded=folded)
  return Count(params, macs.total, round(ideal.total), macs.attention, round(ideal.attention))


def _pair(size) -> tuple[int, int]:
  return tuple(np.broadcast_to(size, 2).tolist())


@functools.lru_cache(maxsize=16)   # the dense model is counted again with each compact one
def _trace(model):
  """(number of parameters, jaxpr of inference).

  Both come from one trace of `init`, which also computes the outputs: initialising parameters takes
  no products, and one trace takes half the time of two.
  """
  return _trace_inference(model, image_shapes(model))


def _trace_inference(module: nn.Module, x):
  jaxpr, (_, variables) = _program(module.init_with_output, jax.random.key(0), x)
  return trees.size(variables["params"]), jaxpr


def count_block(block: nn.Module, x) -> tuple[int, int]:
  """(multiply-accumulates, parameters) of an unbound block for an input x, a tree of shapes."""
  params, jaxpr = _trace_inference(block, x)
  return _walk(jaxpr).total, params


def macs_of(fn, *args) -> Macs:
  """Multiply-accumulates of one call; arguments may be ShapeDtypeStructs."""
  return _walk(_program(fn, *args)[0])


def _program(fn, *args):
  """(jaxpr, shapes of the results) of the device-independent program: attention is traced as
  einsums, so that the padding of a kernel is not counted."""
  with attention.using("einsum"):
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
  return jaxpr.jaxpr, shapes


def _walk(jaxpr, scope: str = "", folded: Mapping | None = None) -> Macs:
  """Sums the products of a jaxpr.

  folded: None counts what is executed; a mapping counts what the method needs, by the deployed
    parameters in it (it may be empty).
  """
  total = Macs()
  for eqn in jaxpr.eqns:
    # The name stack of an equation inside scan or jit is relative to that of its caller.
    path = f"{scope}/{eqn.source_info.name_stack}"
    total += (_products(eqn, path).times(_needed_share(path, folded)) +
              _inner_programs(eqn, path, folded))
  return total


def _products(eqn, scope: str) -> Macs:
  name = eqn.primitive.name
  if name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    n = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
  elif name == "conv_general_dilated":
    # One output element takes as many products as the kernel has entries per output channel.
    kernel = eqn.invars[1].aval.shape
    n = math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  elif name == "mul" and SHIFT_AND_ADD in scope:
    n = 1
  else:
    return Macs()
  macs = n * math.prod(eqn.outvars[0].aval.shape)
  return Macs(macs, macs if attention.SCOPE in scope else 0)


def _needed_share(scope: str, folded: Mapping | None):
  """The share of a product that the method needs, according to its name scopes."""
  if folded is None:
    return 1
  shares = [Fraction(int(part), int(whole)) for part, whole in
            re.findall(r"vitcompact\.share\((\d+):(\d+)\)", scope)]
  for leaf in re.findall(r"vitcompact\.nonzero\(([\w.]+)\)", scope):
    # Scopes name a module and, after a dot, its method: blocks_3._core/links.
    block = next((name for name in re.split("[/.]", scope) if name in folded), None)
    if block is not None:
      entries = trees.named_leaves(folded[block])[leaf.replace(".", "/")]
      shares.append(float(jnp.mean(entries != 0)))
  return math.prod(shares)


def _inner_programs(eqn, scope: str, folded) -> Macs:
  name = eqn.primitive.name
  if name == "while":
    if (macs := _sum(eqn.params["body_jaxpr"], scope, folded)).total:
      raise ValueError(f"the program has products in a while loop of unknown length ({macs.total} "
                       "an iteration); write it as a scan to count it")
    return Macs()
  if name == "cond":
    return max((_sum(jaxpr, scope, folded) for jaxpr in eqn.params["branches"]), default=Macs())
  times = 1
  if name == "scan":
    times = eqn.params["length"]
  elif name == "pallas_call":
    times = math.prod(eqn.params["grid_mapping"].grid)
  jaxprs = [eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params]
  return sum((_sum(jaxpr, scope, folded).times(times) for jaxpr in jaxprs[:1]), Macs())


def _sum(jaxpr, scope: str, folded) -> Macs:
  return _walk(getattr(jaxpr, "jaxpr", jaxpr), scope, folded)
