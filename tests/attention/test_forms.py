"""The attention core: whichever backend computes it, the same function, and no map in memory."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact import attention
from vitcompact.attention import Core, backends
from vitcompact.methods.heads.hmhsa import ScoreFilter

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 21, 19, 3, 4


def draw(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def arrays(queries=QUERIES, keys=KEYS, wide=7, heads=HEADS):
  return (draw(BATCH, queries, HEADS, WIDTH), draw(BATCH, keys, HEADS, WIDTH, seed=1),
          draw(BATCH, keys, heads, wide, seed=2))


SIZE = np.exp(draw(BATCH, KEYS, seed=3))
MASK = (draw(BATCH, HEADS, QUERIES, KEYS, seed=4) > 0).at[..., 0].set(True)
FILTER = ScoreFilter(draw(HEADS, 2, seed=5), draw(2, 3, 3, seed=6))
# name: (core of the differentiable fields, queries, heads of values, filter)
CASES = {
    "plain": ({}, QUERIES, HEADS, False),
    "size": ({"size": SIZE}, QUERIES, HEADS, False),
    "keep_mask": ({"keep_mask": jnp.float32(draw(BATCH, KEYS, seed=7) > 0)}, KEYS, HEADS, False),
    "mask": ({"mask": MASK}, QUERIES, HEADS, False),
    "filter": ({"size": SIZE}, QUERIES, HEADS + 2, True),
    "masked filter": ({"mask": MASK}, QUERIES, HEADS + 2, True),
}


@pytest.fixture
def small_tiles(monkeypatch):
  """Tiles of a few queries, the last one not full."""
  monkeypatch.setattr(backends, "STEP_QUERIES", 4)
  monkeypatch.setattr(backends, "STEP_KEYS", 5)
  monkeypatch.setattr(backends, "_most_rows", lambda keys: 4)
  monkeypatch.setattr(attention, "ROW_ENTRIES", 8 * KEYS * HEADS)
  monkeypatch.setattr(attention, "LEAST_ROWS", 4)


@pytest.mark.parametrize("name", CASES)
def test_every_backend_computes_the_same_function_and_gradients(name, small_tiles):
  fields, queries, heads, filtered = CASES[name]
  mask = {key: fields[key] for key in fields if key == "mask"}
  floats = {key: fields[key] for key in fields if key != "mask"}

  def run(backend):
    def loss(floats, query, key, value, taps):
      rescore = FILTER._replace(taps=taps) if filtered else None
      out = Core(**floats, **mask)(query, key, value, rescore)
      return jnp.sum(jnp.sin(out)), out
    with attention.using(backend):
      return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(
          floats, *arrays(queries, heads=heads), FILTER.taps)

  wanted = run("einsum")
  for backend in ("images", "tiled"):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6),
                 run(backend), wanted)


def test_keys_in_steps_give_each_its_share_though_none_of_a_step_has_size(small_tiles):
  """Also where scores rise and fall by more than exponentials can hold."""
  size = jnp.ones((BATCH, KEYS)).at[:, :9].set(0)     # the first step has 4 keys, each other 5
  query, key, value = arrays()
  for core in (Core(size=size), Core()):
    outs = []
    for backend in ("einsum", "tiled"):
      with attention.using(backend):
        outs.append(jax.jit(lambda *args, core=core: core(*args))(100 * query, key, value))
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-5, atol=1e-6)


def test_a_cpu_takes_images_or_heads_in_turn_but_none_where_a_batch_is_split():
  """What is in turn cannot be split over devices, whoever asked for it."""
  def in_turn(backend, devices):
    with attention.using(backend), attention.split_over(devices):
      jaxpr = jax.make_jaxpr(lambda *args: Core(size=SIZE)(*args))(*arrays())
    inside = jaxpr.eqns[-1].params["call_jaxpr"].eqns
    return [eqn.params["length"] for eqn in inside if eqn.primitive.name == "scan"]

  assert (in_turn("images", 1), in_turn("tiled", 1)) == ([BATCH], [BATCH * HEADS])
  assert (in_turn("images", 8), in_turn("tiled", 8)) == ([], [])


@pytest.mark.parametrize("platform,dtype,fields,wanted", [
    ("cpu", "float32", {"queries": 50, "keys": 50}, "einsum"),
    ("cpu", "float32", {"queries": 197, "keys": 197}, "images"),
    ("cpu", "float32", {"queries": 257, "keys": 257}, "tiled"),
    ("cpu", "bfloat16", {"queries": 577, "keys": 577}, "tiled"),
    ("cpu", "float32", {"queries": 3136, "keys": 49}, "images"),
    ("cpu", "float32", {"queries": 197, "keys": 197, "turns": False}, "einsum"),
    ("gpu", "bfloat16", {"queries": 197, "keys": 197}, "cudnn"),
    ("gpu", "float16", {"queries": 197, "keys": 197, "width": 192}, "einsum"),
    ("gpu", "float16", {"queries": 197, "keys": 197, "width": 192, "hopper": True}, "cudnn"),
    ("gpu", "float32", {"queries": 197, "keys": 197}, "einsum"),
    ("gpu", "bfloat16", {"queries": 577, "keys": 577, "plain": False}, "einsum"),
    ("gpu", "bfloat16", {"queries": 4097, "keys": 4097, "plain": False}, "tiled"),
    ("tpu", "float32", {"queries": 577, "keys": 577}, "splash"),
    ("tpu", "float32", {"queries": 577, "keys": 577, "devices": 8}, "einsum"),
    ("tpu", "bfloat16", {"queries": 197, "keys": 197}, "einsum"),
    ("tpu", "bfloat16", {"queries": 4097, "keys": 4097, "plain": False}, "tiled")])
def test_the_backend_by_platform_length_and_dtype(platform, dtype, fields, wanted):
  assert attention.backend(platform, dtype, **{"width": 64, **fields}) == wanted


def test_who_asks_for_a_backend_gets_it_in_a_function_already_compiled():
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


@pytest.mark.parametrize("gradients,most", [(False, 3), (True, 6)])
def test_memory_is_a_few_times_what_goes_in_and_out(gradients, most):
  """Temporary memory of the compiled core at 4097 tokens, for which one head's map has 67 MB."""
  x = jax.ShapeDtypeStruct((1, 4097, 6, 64), jnp.float32)

  def run(*qkv):
    return Core()(*qkv)

  fn = run if not gradients else jax.grad(lambda *qkv: jnp.sum(run(*qkv) ** 2), (0, 1, 2))
  memory = jax.jit(fn).lower(x, x, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes <= most * (
      memory.argument_size_in_bytes + memory.output_size_in_bytes)


def test_a_bias_is_two_channels_of_the_keys_exact_in_float32_and_near_in_bfloat16():
  query, key, _ = arrays()
  bias = jnp.log(SIZE)
  wanted = attention.scores(query, key) + bias[:, None, None]
  scale = WIDTH ** -0.5
  for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-4)):
    wide = backends.with_bias_channels(query.astype(dtype), key.astype(dtype), bias)
    got = jnp.einsum("bnhd,bmhd->bhnm", *wide, preferred_element_type=jnp.float32) * scale
    plain = jnp.einsum("bnhd,bmhd->bhnm", query.astype(dtype), key.astype(dtype),
                       preferred_element_type=jnp.float32) * scale
    np.testing.assert_allclose(got - plain, wanted - attention.scores(query, key), atol=tolerance)


@pytest.mark.parametrize("name,platform,dtype,words", [
    ("cudnn", "cpu", "bfloat16", "'cudnn' runs on NVIDIA GPUs, not on a cpu; ask for another"),
    ("cudnn", "gpu", "float32", "'cudnn' takes 16 bits and up to 128 channels, not float32 and 8"),
    ("splash", "cpu", "float32", "'splash' runs on TPUs, not on a cpu"),
    ("splash", "gpu", "float32", "'splash' runs on TPUs, not on a gpu")])
def test_a_backend_that_cannot_run_here_is_refused_in_a_line(name, platform, dtype, words,
                                                            monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  with attention.using(name), pytest.raises(ValueError, match=words) as error:
    Core()(*(x.astype(dtype) for x in arrays()))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("platform,name", [("tpu", "splash"), ("cuda", "tiled"), ("tpu", "tiled")])
def test_a_layer_and_its_gradients_are_lowered_for_an_absent_device(platform, name, monkeypatch):
  # By which the core decides.
  monkeypatch.setattr(jax, "default_backend", lambda: {"cuda": "gpu"}.get(platform, platform))

  def loss(size, *qkv):
    return jnp.sum(Core(size)(*qkv).astype(jnp.float32))

  shapes = [jax.ShapeDtypeStruct((2, 577, heads, width), jnp.bfloat16)
            for heads, width in ((2, 64), (2, 64), (2, 128))]
  with attention.using(name):
    exported = jax.export.export(jax.jit(jax.grad(loss, (1, 2, 3))), platforms=[platform])(
        jax.ShapeDtypeStruct((2, 577), jnp.float32), *shapes)
  assert ("tpu_custom_call" in exported.mlir_module()) == (name == "splash")


def test_splash_equals_the_reference_where_it_is_interpreted():
  query, key, value = arrays()
  got = backends.splash(query, key, value, jnp.log(SIZE), interpret=True)
  with attention.using("einsum"):
    np.testing.assert_allclose(got, Core(SIZE)(query, key, value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["images", "tiled"])
def test_no_map_is_kept_for_the_backward_pass(backend):
  x = jax.ShapeDtypeStruct((2, 197, 3, 8), jnp.float32)

  def kept(*qkv):
    return jax.tree.leaves(jax.vjp(lambda *qkv: Core(size=jnp.ones((2, 197)))(*qkv), *qkv)[1])

  with attention.using(backend):
    assert max(array.size for array in jax.eval_shape(kept, x, x, x)) == x.size
  with attention.using("einsum"):
    assert max(array.size for array in jax.eval_shape(kept, x, x, x)) == 2 * 3 * 197 ** 2
