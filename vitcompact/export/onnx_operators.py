"""Translations of JAX primitives for jax2onnx, which map a layer to one ONNX node if there is one.

jax2onnx walks the primitives of a traced program. The functions here replace its translations that
give graphs which runtimes do not recognise and fuse: layers with a custom derivative (calls,
identified by the name of their function), softmax, batched products (jax2onnx writes Einsum), and
shapes that depend on the batch size only. They return None to fall back to jax2onnx's translation.
"""
import contextlib
import importlib
import math
import pkgutil

import jax
import numpy as np
from jax.extend.core import Literal
from jax2onnx.converter import conversion_api, output_binding
from jax2onnx.plugins import plugin_system
from jax2onnx.plugins._ir_shapes import _stamp_type_and_shape

from vitcompact import layers

SEARCH = getattr(output_binding, "_value_is_graph_connected", None)   # private; of 0.17.1


class Graph:
  """The graph being built, as the translation of one equation sees it."""

  def __init__(self, ctx, eqn):
    self.ctx, self.eqn = ctx, eqn

  def value(self, var):
    return self.ctx.get_value_for_var(var)

  def array(self, var):
    """The value of a variable if it is a constant, else None."""
    if isinstance(var, Literal):
      return np.asarray(var.val, var.aval.dtype)
    known = getattr(self.value(var), "const_value", None)
    return None if known is None else known.numpy()

  def constant(self, name: str, array):
    return self.ctx.builder.add_initializer_from_array(self.ctx.fresh_name(name), array)

  def add(self, operator: str, *inputs, like, shape, **attributes):
    """Adds a node with one output, of the type of `like`, and returns the output."""
    out = getattr(self.ctx.builder, operator)(
        *inputs, _outputs=[self.ctx.fresh_name(operator)], **attributes)
    out.type = like.type
    _stamp_type_and_shape(out, tuple(shape))
    return out

  @property
  def shape(self):
    """The shape of the equation's output."""
    return self.eqn.outvars[0].aval.shape


def linear(graph, x, kernel, bias=None):
  y = graph.add("MatMul", x, kernel, like=x, shape=graph.shape)
  return y if bias is None else graph.add("Add", y, bias, like=x, shape=graph.shape)


def layer_norm(graph, x, scale, bias):
  # Epsilon is not an argument of the call, but the only literal that its program adds.
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
  """Softmax over the last axis; all of ours are."""
  reduced = next(eqn for eqn in graph.eqn.params["call_jaxpr"].jaxpr.eqns
                 if eqn.primitive.name == "reduce_max")
  last = reduced.params["axes"] == (len(graph.shape) - 1,)
  return graph.add("Softmax", x, like=x, shape=graph.shape, axis=-1) if last else None


# {(file, function): translation}
CALLS = {(layers.__file__, "linear"): linear, (layers.__file__, "layer_norm"): layer_norm,
         (layers.__file__, "gelu"): gelu,
         (jax.nn.softmax.__code__.co_filename, "_softmax"): softmax}


def call(graph):
  """A call of a function with a custom derivative."""
  name, _, where = graph.eqn.params["call_jaxpr"].jaxpr.debug_info.func_src_info.partition(" at ")
  operator = CALLS.get((where.rpartition(":")[0], name))
  return operator and operator(graph, *map(graph.value, graph.eqn.invars))


def reshape(graph):
  """Reshape, with -1 for the batch size."""
  x = graph.value(graph.eqn.invars[0])
  if sum(not isinstance(n, int) for n in graph.shape) > 1 or 0 in graph.shape:
    return None
  sizes = [n if isinstance(n, int) else -1 for n in graph.shape]
  return graph.add("Reshape", x, graph.constant("shape", np.array(sizes, np.int64)), like=x,
                   shape=graph.shape)


def dot_general(graph):
  """MatMul of transposed arrays, if each operand has one free axis, or the left one several and
  there is no batch axis."""
  (left_sum, right_sum), (left_batch, right_batch) = graph.eqn.params["dimension_numbers"]
  left, right = (var.aval for var in graph.eqn.invars)
  free_left, free_right = ([axis for axis in range(x.ndim) if axis not in (*summed, *batch)]
                           for x, summed, batch in ((left, left_sum, left_batch),
                                                    (right, right_sum, right_batch)))
  left_fits = len(free_left) == 1 or (free_left and not left_batch)
  if len(left_sum) != 1 or len(free_right) != 1 or not left_fits or left.dtype != right.dtype:
    return None
  x = transposed(graph, graph.eqn.invars[0], (*left_batch, *free_left, *left_sum))
  y = transposed(graph, graph.eqn.invars[1], (*right_batch, *right_sum, *free_right))
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
  """Padding at the ends of axes; negative padding crops, in ONNX too."""
  config = graph.eqn.params["padding_config"]
  if any(interior for _, _, interior in config):
    return None
  lows, highs, _ = zip(*config, strict=True)
  x, fill = map(graph.value, graph.eqn.invars)
  amounts = graph.constant("pads", np.array([*lows, *highs], np.int64))
  return graph.add("Pad", x, amounts, fill, like=x, shape=graph.shape, mode="constant")


def window_sum(graph):
  """A sum over windows of images (B, H, W, C): AveragePool times the size of the window."""
  params = graph.eqn.params
  window, strides = params["window_dimensions"], params["window_strides"]
  padding, dilations = params["padding"], {*params["base_dilation"], *params["window_dilation"]}
  spatial_only = len(window) == 4 and dilations == {1} and padding[0] == padding[3] == (0, 0) and \
      {window[0], window[3], strides[0], strides[3]} == {1}
  if not spatial_only:
    return None
  batch, height, width, channels = graph.shape
  images = transposed(graph, graph.eqn.invars[0], (0, 3, 1, 2))
  (top, bottom), (left, right) = padding[1:3]
  means = graph.add("AveragePool", images, like=images, shape=(batch, channels, height, width),
                    kernel_shape=list(window[1:3]), strides=list(strides[1:3]),
                    pads=[top, left, bottom, right], count_include_pad=1)
  area = graph.constant("area", np.array(math.prod(window), np.float32))
  sums = graph.add("Mul", means, area, like=images, shape=(batch, channels, height, width))
  return graph.add("Transpose", sums, like=images, shape=graph.shape, perm=[0, 2, 3, 1])


def divide(graph):
  """Division by the literal 1 becomes no node at all."""
  x, divisor = graph.eqn.invars
  by_one = isinstance(divisor, Literal) and np.ndim(divisor.val) == 0 and divisor.val == 1
  return graph.value(x) if by_one else None


# jax2onnx's translations of primitives. We skip those of other libraries' functions, which are slow
# to import.
PRIMITIVES_OF = ("jax2onnx.plugins.jax.lax", "jax2onnx.plugins.jax.core")
# Primitives that hold programs, whose equations are translated one by one.
CONTAINERS = ("jit", "pjit", "closed_call", "scan", "while", "cond", "custom_vjp_call",
              "custom_jvp_call")
PRIMITIVES = {"custom_vjp_call": call, "custom_jvp_call": call, "reshape": reshape,
              "dot_general": dot_general, "pad": pad, "div": divide,
              "reduce_window_sum": window_sum}


def is_fixed(shape) -> bool:
  return all(isinstance(n, int) for n in shape) and math.prod(shape) > 0


def constant_result(graph):
  """The equation's result as an array if all of its inputs are constants (weights), else None."""
  eqn = graph.eqn
  if len(eqn.outvars) != 1 or not is_fixed(graph.shape) or eqn.primitive.name in CONTAINERS:
    return None
  arrays = [graph.array(var) for var in eqn.invars]
  if not arrays or any(array is None for array in arrays):
    return None
  return np.asarray(eqn.primitive.bind(*arrays, **eqn.params))


class Translation(plugin_system.PrimitiveLeafPlugin):
  """Translates a primitive by our function, or by jax2onnx's if ours is None or returns None."""

  def __init__(self, ours, theirs):
    self.ours, self.theirs = ours, theirs

  def lower(self, ctx, eqn):
    graph = Graph(ctx, eqn)
    array = constant_result(graph)
    if array is not None:
      ctx.bind_const_for_var(eqn.outvars[0], array)
      return
    out = self.ours and self.ours(graph)
    if out is None:
      self.theirs.lower(ctx, eqn)
    else:
      ctx.bind_value_for_var(eqn.outvars[0], out)


def is_in_graph(ctx, value) -> bool:
  """What jax2onnx's `SEARCH` says. For each operation it goes through all nodes of the graph, which
  is most of the time that a large graph takes."""
  node, graph = value.producer(), ctx.builder.graph
  if (node is not None and node.graph is graph) or graph.initializers.get(value.name) is value:
    return True
  return SEARCH(ctx, value)


@contextlib.contextmanager
def translations():
  """A context in which jax2onnx uses the translations above and traces JAX's own functions: its
  replacements for them do not fully support an unknown batch size."""
  for package in PRIMITIVES_OF:
    home = importlib.import_module(package)
    for module in pkgutil.iter_modules(home.__path__, f"{package}."):
      importlib.import_module(module.name)
  registry, theirs = plugin_system.PLUGIN_REGISTRY, dict(plugin_system.PLUGIN_REGISTRY)
  worlds, custom_jvp = conversion_api._activate_plugin_worlds, jax.config.jax_softmax_custom_jvp
  registry.update({name: Translation(PRIMITIVES.get(name), plugin)
                   for name, plugin in theirs.items()
                   if isinstance(plugin, plugin_system.PrimitiveLeafPlugin)})
  conversion_api._activate_plugin_worlds = contextlib.nullcontext
  if SEARCH:
    output_binding._value_is_graph_connected = is_in_graph
  jax.config.update("jax_softmax_custom_jvp", True)
  try:
    yield
  finally:
    registry.update(theirs)
    conversion_api._activate_plugin_worlds = worlds
    if SEARCH:
      output_binding._value_is_graph_connected = SEARCH
    jax.config.update("jax_softmax_custom_jvp", custom_jvp)
