"""Every form of attention matches the reference, gradients included; which form is chosen where."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vitcompact import attention
from vitcompact.attention import Core, Device, choose, reference, tuning, vendor
from vitcompact.methods.heads.hmhsa import ScoreFilter

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 21, 19, 3, 4
CPU, SPLIT, GPU = Device("cpu"), Device("cpu", count=8, split=True), Device("gpu")
HOPPER, TPU = Device("gpu", capability="9.0"), Device("tpu")


draw = tiny.normal


def arrays(queries=QUERIES, keys=KEYS, wide=7, heads=HEADS):
  return (draw(BATCH, queries, HEADS, WIDTH), draw(BATCH, keys, HEADS, WIDTH, seed=1),
          draw(BATCH, keys, heads, wide, seed=2))


def shapes(queries, keys, dtype, wide=64):
  return [jax.ShapeDtypeStruct((2, n, 6, width), dtype)
          for n, width in ((queries, 64), (keys, 64), (keys, wide))]


SIZE = np.exp(draw(BATCH, KEYS, seed=3))
KEEP = np.float32(draw(BATCH, KEYS, seed=7) > 0)
MASK = jax.device_put((draw(BATCH, HEADS, QUERIES, KEYS, seed=4) > 0) | (np.arange(KEYS) == 0))
FILTER = ScoreFilter(draw(HEADS, 2, seed=5), draw(2, 3, 3, seed=6))
# Values come from 10 tokens for 19 keys, and outputs are averaged over pairs of queries.
MERGED = {"spread": lambda value: jnp.repeat(value, 2, axis=1)[:, :KEYS],
          "gather": lambda out: (out[:, :-1:2] + out[:, 1::2]) / 2}
# name: (fields of the call, queries, heads of values, filter)
CASES = {
    "plain": ({}, QUERIES, HEADS, False),
    "size": ({"size": SIZE}, QUERIES, HEADS, False),
    "keep mask": ({"keep_mask": KEEP, "size": SIZE}, KEYS, HEADS, False),
    "keep mask, filter": ({"keep_mask": KEEP}, KEYS, HEADS + 2, True),
    "mask": ({"mask": MASK}, QUERIES, HEADS, False),
    "filter": ({"size": SIZE}, QUERIES, HEADS + 2, True),
    "masked filter": ({"mask": MASK}, QUERIES, HEADS + 2, True),
    "merged": ({"size": SIZE, **MERGED}, QUERIES, HEADS, False),
    "merged, masked": ({"mask": MASK, **MERGED}, QUERIES, HEADS, False),
}


@pytest.fixture
def small_tiles(monkeypatch):
  """Tiles of a few queries, the last one partly filled."""
  for name, value in {"STEP_QUERIES": 4, "STEP_KEYS": 5, "MIN_TILE_QUERIES": 4,
                      "TILE_ENTRIES": 4 * KEYS, "ROW_ENTRIES": 8 * KEYS * HEADS,
                      "MIN_ROW_QUERIES": 4}.items():
    monkeypatch.setattr(tuning, name, value)


def run(name, attend, dtype="float32"):
  """Returns (gradients of all that has one, output) of a case, by `attend(core, ...)`."""
  fields, queries, heads, filtered = CASES[name]
  floats = {key: fields[key] for key in fields if key in ("size", "keep_mask")}
  rest = {key: fields[key] for key in fields if key not in floats}
  query, key, value = (x.astype(dtype) for x in arrays(queries, heads=heads))
  if "spread" in fields:
    value = value[:, :10]

  def loss(floats, query, key, value, taps):
    rescore = FILTER._replace(taps=taps) if filtered else None
    out = attend(Core(**floats, **rest), query, key, value, rescore)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

  return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(
      floats, query, key, value, FILTER.taps)


@functools.cache
def expected_of(name):
  return jax.device_get(run(name, reference.attend))


@pytest.mark.parametrize("name", CASES)
def test_every_form_and_its_gradients_match_the_reference(name, small_tiles):
  expected = expected_of(name)
  for form, device in (("einsum", CPU), ("plain", CPU), ("images", CPU), ("tiled", CPU),
                       ("images", GPU), ("tiled", GPU)):
    with attention.using(form), attention.on(device):
      got = run(name, Core.__call__)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6), got, expected)


@pytest.mark.parametrize("form", ["einsum", "plain", "images", "tiled"])
@pytest.mark.parametrize("name", ["size", "keep mask", "masked filter"])
def test_every_form_in_bfloat16_is_close_to_the_float32_reference(form, name, small_tiles):
  with attention.using(form):
    got = run(name, Core.__call__, "bfloat16")
  assert got[1].dtype == jnp.bfloat16
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected_of(name)), strict=True):
    np.testing.assert_allclose(np.float32(a), b, atol=0.03 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", ["size", "keep mask", "mask", "filter"])
def test_reference_matches_a_loop_over_queries(name):
  fields, queries, heads, filtered = CASES[name]
  query, key, value = (np.asarray(x, np.float64) for x in arrays(queries, heads=heads))
  scores = np.einsum("bnhd,bmhd->bhnm", query, key) / WIDTH ** 0.5
  if filtered:
    scores = np.asarray(jax.jit(FILTER.__call__)(scores.astype(np.float32)), np.float64)
  expected = np.zeros((BATCH, queries, heads, value.shape[-1]))
  for b, i, h in np.ndindex(expected.shape[:3]):
    exps = np.exp(scores[b, h, i]) * np.asarray(fields.get("size", np.ones((BATCH, KEYS))))[b]
    if name == "mask":
      exps = exps * np.asarray(MASK)[b, h, i]
    weights = exps / exps.sum()
    if name == "keep mask":
      top = (scores[b, h, i] + np.log(np.asarray(SIZE)[b])).max()
      seen = exps * np.exp(-top) * np.where(np.arange(KEYS) == i, 1, np.asarray(KEEP)[b])
      weights = (seen + 1e-6 / KEYS) / (seen.sum() + 1e-6)
    expected[b, i, h] = weights @ value[b, :, h]
  rescore = FILTER if filtered else None
  got = jax.jit(lambda *qkv: reference.attend(Core(**fields), *qkv, rescore))(
      *arrays(queries, heads=heads))
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_maps_of_selected_queries_are_rows_of_the_full_maps_given_own_n():
  query, key, _ = arrays(KEYS)
  core, rows = Core(SIZE, keep_mask=KEEP), np.asarray([3, 0, 11])
  some, all_ = jax.jit(lambda query, key: (
      core.maps(query[:, rows], key, own_n=rows), core.maps(query, key)))(query, key)
  np.testing.assert_allclose(some, np.asarray(all_)[:, :, rows], rtol=1e-5)


def test_tiled_softmax_handles_a_tile_whose_keys_all_have_size_zero(small_tiles):
  """Also when scores differ by more than the range of exp."""
  size = np.ones((BATCH, KEYS), np.float32)
  size[:, :9] = 0     # the first tile has 4 keys, the others 5
  query, key, value = arrays()
  for core in (Core(size=size), Core()):
    with attention.using("tiled"):
      out = jax.jit(lambda *args, core=core: core(*args))(100 * query, key, value)
    expected = jax.jit(lambda *args, core=core: reference.attend(core, *args))(
        100 * query, key, value)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_cpu_loops_over_images_or_heads_unless_the_batch_is_split_over_devices():
  """A loop cannot be split over devices, whichever form was requested."""
  def loops(form, devices):
    with attention.using(form), attention.split_over(devices):
      jaxpr = jax.make_jaxpr(lambda *args: Core(size=SIZE)(*args))(*arrays())
    inside = jaxpr.eqns[-1].params["call_jaxpr"].eqns
    return [eqn.params["length"] for eqn in inside if eqn.primitive.name == "scan"]

  assert (loops("images", 1), loops("tiled", 1)) == ([BATCH], [BATCH * HEADS])
  assert (loops("images", 8), loops("tiled", 8)) == ([], [])


@pytest.mark.parametrize("device,dtype,queries,keys,wide,expected", [
    (CPU, "float32", 50, 50, 64, "einsum"),
    (CPU, "float32", 197, 197, 64, "images"),
    (CPU, "float32", 257, 257, 64, "tiled"),
    (CPU, "bfloat16", 577, 577, 64, "tiled"),
    (CPU, "float32", 3136, 49, 64, "images"),
    (SPLIT, "float32", 197, 197, 64, "einsum"),
    (GPU, "bfloat16", 197, 197, 64, "cudnn"),
    (GPU, "float16", 197, 197, 192, "einsum"),
    (HOPPER, "float16", 197, 197, 192, "cudnn"),
    (Device("gpu", capability="10.0"), "float16", 197, 197, 192, "cudnn"),
    (Device("gpu", capability="gfx942"), "float16", 197, 197, 192, "einsum"),
    (GPU, "float32", 197, 197, 64, "einsum"),
    (TPU, "float32", 577, 577, 64, "splash"),
    (TPU._replace(count=8), "float32", 577, 577, 64, "einsum"),
    (TPU, "bfloat16", 197, 197, 64, "einsum")])
def test_form_chosen_by_device_length_and_dtype(device, dtype, queries, keys, wide, expected):
  assert choose(device, Core(), *shapes(queries, keys, dtype, wide)).form == expected


@pytest.mark.parametrize("device,requested,tokens,expected", [
    (CPU, None, 197, "images"), (GPU, None, 577, "einsum"), (GPU, None, 4097, "tiled"),
    (TPU, None, 4097, "tiled"), (GPU, "cudnn", 577, "tiled"), (TPU, "splash", 577, "tiled"),
    (GPU, "images", 577, "images")])
def test_calls_that_vendor_kernels_cannot_do_use_another_form(device, requested, tokens, expected):
  call, qkv = Core(keep_mask=np.ones((2, tokens), np.float32)), shapes(tokens, tokens, "bfloat16")
  assert choose(device, call, *qkv, requested=requested).form == expected
  assert choose(device, Core(), *qkv, rescore=FILTER, requested=requested).form == expected


def test_requesting_a_form_retraces_a_function_already_compiled():
  attend = jax.jit(lambda *qkv: Core()(*qkv))
  text = {}
  for name in ("einsum", "tiled", "einsum", None):
    with attention.using(name):
      text[name] = attend.trace(*arrays()).jaxpr.pretty_print()
  assert "custom_vjp" in text["tiled"] and "custom_vjp" not in text["einsum"]
  assert text[None] == text["einsum"]
  with pytest.raises(ValueError, match="'flash': must be one of einsum, images"):
    attention.using("flash")
  with attention.using("tokamax"), pytest.raises(ValueError, match="not installed"):
    Core()(*arrays())


def test_function_traced_for_one_device_is_retraced_for_another():
  attend = jax.jit(lambda *qkv: Core()(*qkv))
  x = jax.ShapeDtypeStruct((2, 197, 3, 8), jnp.float32)
  with attention.on(GPU):
    assert "custom_vjp" not in attend.trace(x, x, x).jaxpr.pretty_print()
  assert "custom_vjp" in attend.trace(x, x, x).jaxpr.pretty_print()   # the "images" form


@pytest.mark.parametrize("gradients,multiple", [(False, 3), (True, 6)])
def test_memory_is_a_small_multiple_of_inputs_and_outputs(gradients, multiple):
  """Temporary memory of the compiled core at 4097 tokens, where one head's map takes 67 MB."""
  x = jax.ShapeDtypeStruct((1, 4097, 6, 64), jnp.float32)

  def run(*qkv):
    return Core()(*qkv)

  fn = run if not gradients else jax.grad(lambda *qkv: jnp.sum(run(*qkv) ** 2), (0, 1, 2))
  memory = jax.jit(fn).lower(x, x, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes <= multiple * (
      memory.argument_size_in_bytes + memory.output_size_in_bytes)


def test_bias_as_two_key_channels_is_exact_in_float32_and_close_in_bfloat16():
  query, key, _ = arrays()
  bias = np.log(SIZE)

  @jax.jit
  def run(query, key, wide_query, wide_key):
    got, plain = (jnp.einsum("bnhd,bmhd->bhnm", *qk, preferred_element_type=jnp.float32)
                  * WIDTH ** -0.5 for qk in ((wide_query, wide_key), (query, key)))
    return got - plain

  with_bias, scores = jax.jit(vendor.with_bias_channels), jax.jit(attention.scores)(query, key)
  expected = np.asarray(scores) + bias[:, None, None]
  for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-4)):
    low = query.astype(dtype), key.astype(dtype)
    np.testing.assert_allclose(run(*low, *with_bias(*low, bias)), expected - scores, atol=tolerance)


@pytest.mark.parametrize("name,device,dtype,words", [
    ("cudnn", CPU, "bfloat16", "'cudnn' runs on NVIDIA GPUs, not on a cpu; request another"),
    ("cudnn", GPU, "float32", "'cudnn' takes 16 bits and up to 128 channels, not float32 and 8"),
    ("splash", CPU, "float32", "'splash' runs on TPUs, not on a cpu"),
    ("splash", GPU, "float32", "'splash' runs on TPUs, not on a gpu")])
def test_form_that_cannot_run_here_raises_a_one_line_error(name, device, dtype, words):
  with attention.using(name), attention.on(device), pytest.raises(ValueError, match=words) as error:
    Core()(*(x.astype(dtype) for x in arrays()))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("platform,device,name", [
    ("tpu", TPU, "splash"), ("cuda", GPU, "tiled"), ("tpu", TPU, "tiled")])
def test_layer_and_its_gradients_lower_for_an_absent_device(platform, device, name):
  def loss(size, *qkv):
    return jnp.sum(Core(size)(*qkv).astype(jnp.float32))

  shapes = [jax.ShapeDtypeStruct((2, 577, heads, width), jnp.bfloat16)
            for heads, width in ((2, 64), (2, 64), (2, 128))]
  with attention.using(name), attention.on(device):
    exported = jax.export.export(jax.jit(jax.grad(loss, (1, 2, 3))), platforms=[platform])(
        jax.ShapeDtypeStruct((2, 577), jnp.float32), *shapes)
  assert ("tpu_custom_call" in exported.mlir_module()) == (name == "splash")


def test_interpreted_splash_kernel_matches_the_reference():
  query, key, value = arrays()
  got, expected = jax.jit(lambda *qkv: (
      vendor.splash(*qkv, np.log(SIZE), interpret=True), reference.attend(Core(SIZE), *qkv)))(
          query, key, value)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["images", "tiled"])
def test_no_attention_map_is_saved_for_the_backward_pass(form):
  x = jax.ShapeDtypeStruct((2, 197, 3, 8), jnp.float32)

  def saved_residuals(*qkv):
    return jax.tree.leaves(jax.vjp(lambda *qkv: Core(size=jnp.ones((2, 197)))(*qkv), *qkv)[1])

  with attention.using(form):
    assert max(array.size for array in jax.eval_shape(saved_residuals, x, x, x)) == x.size
  with attention.using("einsum"):
    assert max(array.size for array in jax.eval_shape(saved_residuals, x, x, x)) == 2 * 3 * 197 ** 2
