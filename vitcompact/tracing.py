"""What tracing a model need not do again for each of its blocks."""
import functools

import flax.linen as nn
import jax
import numpy as np
from flax.errors import ScopeParamShapeError

# A function of arrays alone is traced once for all who call it with arrays of the same shapes, and
# then written out in each: the program is the same, made in less time.
traced_once = functools.partial(jax.jit, inline=True)


def param(module: nn.Module, name: str, init, shape, *dtype):
  """`module.param(name, init, shape, *dtype)`: the leaf, or in `init` a new one that `init` draws.

  To check a leaf's shape, Linen traces `init` in every `apply`, which is close to half of the time
  that tracing a DeiT takes. Here the shape is compared as it is given.
  """
  if not module.has_variable("params", name):
    return module.param(name, init, shape, *dtype)
  leaf = module.get_variable("params", name)
  if np.shape(leaf) != tuple(shape):
    raise ScopeParamShapeError(name, module.scope.path_text, np.shape(leaf), tuple(shape))
  return nn.unbox(leaf)
