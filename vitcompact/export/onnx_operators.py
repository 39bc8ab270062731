"""How jax2onnx translates what our models consist of: one node for a layer where ONNX has one.

jax2onnx walks the primitives of a traced program. Here are ours for those from which it makes a
graph that runtimes do not recognise: layers with a backward pass of their own (calls, known by the
name of their function), softmax, products of batches (it writes Einsum), and shapes that depend on
nothing but the number of images. Each returns None where the other translation is to be taken.
"""
import contextlib
import importlib
import math
import pkgutil

import jax
import numpy as np
from jax.extend.core import Literal
from jax2onnx.converter import conversion_api
from jax2onnx.plugins import plugin_system
from jax2onnx.plugins._ir_shapes import _stamp_type_and_shape

from vitcompact import layers


class Graph:
  """The graph being built, as the translation of one equation sees it."""

  def __init__(self, ctx, eqn):
    self.ctx, self.eqn = ctx, eqn

  def value(self, var):
    return self.ctx.get_value_for_var(var)

  def array(self, var):
    """What a variable is, where it is known; else None."""
    if isinstance(var, Literal):
      return np.asarray(var.val, var.aval.dtype)
    known = getattr(self.value(var), "const_value", None)
    return None if known is None else known.numpy()

  def constant(self, name: str, array):
    return self.ctx.builder.add_initializer_from_array(self.ctx.fresh_name(name), array)

  def add(self, operator: str, *inputs, like, shape, **attributes):
    """A node with one output, of the type of `like`."""
    out = getattr(self.ctx.builder, operator)(
        *inputs, _outputs=[self.ctx.fresh_name(operator)], **attributes)
    out.type = like.type
    _stamp_type_and_shape(out, tuple(shape))
    return out

  @property
  def shape(self):
    """Of the equation's output."""
    return self.eqn.outvars[0].aval.shape


def linear(graph, x, kernel, bias=None):
  y = graph.add("MatMul", x, kernel, like=x, shape=graph.shape)
  return y if bias is None else graph.add("Add", y, bias, like=x, shape=graph.shape)


def layer_norm(graph, x, scale, bias):
  # The program adds nothing else by a number: epsilon is no argument of it.
  added = [eqn.invars[1] for eqn in graph.eqn.params["call_jaxpr"].jaxpr.eqns
           if eqn.primitive.name == "add"]
  epsilons = [float(var.val) for var in added if isinstance(var, Literal)]
  if len(epsilons) != 1:
    return None
  return graph.add("LayerNormalization", x, scale, bias, like=x, shape=graph.shape, axis=-1,
                   epsilon=epsilons[0])


def gelu(graph, x):
  return graph.add("Gelu", x, like=x, shape=graph.shape, approximate="none")


def softmax(graph, x, *_):
  """Over the last axis, as all of ours are."""
  reduced = next(eqn for eqn in graph.eqn.params["call_jaxpr"].jaxpr.eqns
                 if eqn.primitive.name == "reduce_max")
  last = reduced.params["axes"] == (len(graph.shape) - 1,)
  return graph.add("Softmax", x, like=x, shape=graph.shape, axis=-1) if last else None


# {(file, function): its translation}
CALLS = {(layers.__file__, "linear"): linear, (layers.__file__, "layer_norm"): layer_norm,
         (layers.__file__, "gelu"): gelu,
         (jax.nn.softmax.__code__.co_filename, "_softmax"): softmax}


def call(graph):
  """A function with derivatives of its own."""
  name, _, where = graph.eqn.params["call_jaxpr"].jaxpr.debug_info.func_src_info.partition(" at ")
  operator = CALLS.get((where.rpartition(":")[0], name))
  return operator and operator(graph, *map(graph.value, graph.eqn.invars))


def reshape(graph):
  """With -1 for the number of images."""
  x = graph.value(graph.eqn.invars[0])
  if sum(not isinstance(n, int) for n in graph.shape) > 1 or 0 in graph.shape:
    return None
  sizes = [n if isinstance(n, int) else -1 for n in graph.shape]
  return graph.add("Reshape", x, graph.constant("shape", np.array(sizes, np.int64)), like=x,
                   shape=graph.shape)


def dot_general(graph):
  """As MatMul of transposed arrays, where each side has one axis of its own, or the left one many
  and no axis is shared."""
  (left_sum, right_sum), (left_batch, right_batch) = graph.eqn.params["dimension_numbers"]
  left, right = (var.aval for var in graph.eqn.invars)
  own_left, own_right = ([axis for axis in range(x.ndim) if axis not in (*summed, *batch)]
                         for x, summed, batch in ((left, left_sum, left_batch),
                                                  (right, right_sum, right_batch)))
  lefts_fit = len(own_left) == 1 or (own_left and not left_batch)
  if len(left_sum) != 1 or len(own_right) != 1 or not lefts_fit or left.dtype != right.dtype:
    return None
  x = transposed(graph, graph.eqn.invars[0], (*left_batch, *own_left, *left_sum))
  y = transposed(graph, graph.eqn.invars[1], (*right_batch, *right_sum, *own_right))
  return graph.add("MatMul", x, y, like=x, shape=graph.shape)


def transposed(graph, var, order):
  x = graph.value(var)
  if list(order) == list(range(len(order))):
    return x
  array = graph.array(var)
  if array is not None:
    return graph.constant("kernel", np.ascontiguousarray(array.transpose(order)))
  return graph.add("Transpose", x, like=x, shape=[var.aval.shape[axis] for axis in order],
                   perm=list(order))


def pad(graph):
  """At the ends; negative padding cuts, in ONNX too."""
  config = graph.eqn.params["padding_config"]
  if any(between for _, _, between in config):
    return None
  lows, highs, _ = zip(*config, strict=True)
  x, fill = map(graph.value, graph.eqn.invars)
  amounts = graph.constant("pads", np.array([*lows, *highs], np.int64))
  return graph.add("Pad", x, amounts, fill, like=x, shape=graph.shape, mode="constant")


def window_sum(graph):
  """Over the rows and columns of images (B, H, W, C): as AveragePool, times what it divides by."""
  params = graph.eqn.params
  window, strides = params["window_dimensions"], params["window_strides"]
  around, dilated = params["padding"], {*params["base_dilation"], *params["window_dilation"]}
  plain = len(window) == 4 and dilated == {1} and around[0] == around[3] == (0, 0) and \
      {window[0], window[3], strides[0], strides[3]} == {1}
  if not plain:
    return None
  batch, height, width, channels = graph.shape
  images = transposed(graph, graph.eqn.invars[0], (0, 3, 1, 2))
  (top, bottom), (left, right) = around[1:3]
  means = graph.add("AveragePool", images, like=images, shape=(batch, channels, height, width),
                    kernel_shape=list(window[1:3]), strides=list(strides[1:3]),
                    pads=[top, left, bottom, right], count_include_pad=1)
  area = graph.constant("area", np.array(math.prod(window), np.float32))
  sums = graph.add("Mul", means, area, like=images, shape=(batch, channels, height, width))
  return graph.add("Transpose", sums, like=images, shape=graph.shape, perm=[0, 2, 3, 1])


def divide(graph):
  """Nothing, where it is by the number 1."""
  x, by = graph.eqn.invars
  same = isinstance(by, Literal) and np.ndim(by.val) == 0 and by.val == 1
  return graph.value(x) if same else None


# jax2onnx's translations of primitives; those of functions of other libraries take long to import.
PRIMITIVES_OF = ("jax2onnx.plugins.jax.lax", "jax2onnx.plugins.jax.core")
# Of programs, whose own equations are translated.
CONTAINERS = ("jit", "pjit", "closed_call", "scan", "while", "cond", "custom_vjp_call",
              "custom_jvp_call")
PRIMITIVES = {"custom_vjp_call": call, "custom_jvp_call": call, "reshape": reshape,
              "dot_general": dot_general, "pad": pad, "div": divide,
              "reduce_window_sum": window_sum}


def is_fixed(shape) -> bool:
  return all(isinstance(n, int) for n in shape) and math.prod(shape) > 0


def computed(graph):
  """The result, an array, where everything that goes in is known: weights alone."""
  eqn = graph.eqn
  if len(eqn.outvars) != 1 or not is_fixed(graph.shape) or eqn.primitive.name in CONTAINERS:
    return None
  arrays = [graph.array(var) for var in eqn.invars]
  if not arrays or any(array is None for array in arrays):
    return None
  return np.asarray(eqn.primitive.bind(*arrays, **eqn.params))


class Translation(plugin_system.PrimitiveLeafPlugin):
  """One of ours for a primitive, or None, with jax2onnx's behind it."""

  def __init__(self, ours, theirs):
    self.ours, self.theirs = ours, theirs

  def lower(self, ctx, eqn):
    graph = Graph(ctx, eqn)
    array = computed(graph)
    if array is not None:
      ctx.bind_const_for_var(eqn.outvars[0], array)
      return
    out = self.ours and self.ours(graph)
    if out is None:
      self.theirs.lower(ctx, eqn)
    else:
      ctx.bind_value_for_var(eqn.outvars[0], out)


@contextlib.contextmanager
def known():
  """A context in which jax2onnx translates as above, and traces JAX's functions as they are: those
  that it would put in their place know less of a number of images that is left open."""
  for package in PRIMITIVES_OF:
    home = importlib.import_module(package)
    for module in pkgutil.iter_modules(home.__path__, f"{package}."):
      importlib.import_module(module.name)
  registry, theirs = plugin_system.PLUGIN_REGISTRY, dict(plugin_system.PLUGIN_REGISTRY)
  worlds, one_softmax = conversion_api._activate_plugin_worlds, jax.config.jax_softmax_custom_jvp
  registry.update({name: Translation(PRIMITIVES.get(name), plugin)
                   for name, plugin in theirs.items()
                   if isinstance(plugin, plugin_system.PrimitiveLeafPlugin)})
  conversion_api._activate_plugin_worlds = contextlib.nullcontext
  jax.config.update("jax_softmax_custom_jvp", True)
  try:
    yield
  finally:
    registry.update(theirs)
    conversion_api._activate_plugin_worlds = worlds
    jax.config.update("jax_softmax_custom_jvp", one_softmax)
