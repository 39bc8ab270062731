"""Block-sparse attention: every form equals the reference with the layout's mask."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import tiny
from tests.kernels import cases
from vitcompact import attention, kernels
from vitcompact.attention import Core, Device, choose, reference, tuning
from vitcompact.attention.block_sparse.layout import BlockLayout
from vitcompact.attention.block_sparse.windows import Windows, nearest_blocks, on_grid, on_sequence

BATCH, HEADS, WIDTH = 2, 3, 4
HOPPER = Device("gpu", capability="9.0")


draw = tiny.normal


def random_choice(queries, keys, count, seed=1):
  """Draws `count` different key blocks for each query block."""
  order = np.argsort(draw(BATCH, HEADS, queries.blocks, keys.blocks, seed=seed), axis=-1)
  return jax.device_put(order[..., :count].astype(np.int32))


@pytest.mark.parametrize("grid,sides", [
    ((14, 14), (7, 7)), ((24, 24), (8, 8)), ((32, 64), (8, 8)), ((12, 20), (6, 10)),
    ((9, 4), (9, 4)), ((13, 17), (7, 9)), ((23, 30), (8, 10))])
def test_windows_divide_the_grid_or_pad_it_slightly(grid, sides):
  windows = on_grid(grid, 8)
  assert windows.sides == sides
  assert windows.valid().sum() == grid[0] * grid[1]


def test_each_block_is_a_square_of_the_image():
  windows = Windows((3, 5), (2, 2))
  x = np.arange(15, dtype=np.float32).reshape(1, 15, 1, 1)
  cut, joined = map(np.asarray, jax.jit(lambda x: (
      windows.cut(x), windows.join(windows.cut(x))))(x))
  blocks = cut[0, 0, :, :, 0]
  np.testing.assert_array_equal(blocks[1], [2, 3, 7, 8])
  np.testing.assert_array_equal(blocks[2], [4, 0, 9, 0])
  np.testing.assert_array_equal(windows.valid()[2], [1, 0, 1, 0])
  np.testing.assert_array_equal(joined, x)
  np.testing.assert_array_equal(windows.block_of(), [0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5])
  np.testing.assert_array_equal(windows.slot_of()[[2, 3, 7, 8]], [4, 5, 6, 7])


def test_block_means_average_the_tokens_of_a_block():
  x, windows = draw(BATCH, 1 + 48 + 2, HEADS, WIDTH), Windows((6, 8), (3, 2))
  blocks, *both = jax.jit(lambda x: (
      windows.cut(x[:, 1:49]), windows.means(x[:, 1:49]), windows.means_by_rows(x, 1)))(x)
  for means in both:
    np.testing.assert_allclose(means, np.mean(np.asarray(blocks), axis=3), atol=1e-6)


def test_nearest_key_block_is_itself_or_the_one_covering_it_on_a_coarser_grid():
  fine = Windows((8, 8), (2, 2))
  np.testing.assert_array_equal(nearest_blocks(fine, fine), np.arange(16))
  np.testing.assert_array_equal(nearest_blocks(fine, Windows((4, 4), (2, 2))),
                                [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
  np.testing.assert_array_equal(nearest_blocks(Windows((2, 2), (1, 2)), on_sequence(6, 3)), [0, 1])


CASES = {
    "grid": BlockLayout(None, Windows((4, 4), (2, 2)), Windows((4, 4), (2, 2)), prefix=1),
    "padded": BlockLayout(None, Windows((3, 5), (2, 2)), Windows((3, 5), (2, 2))),
    "coarser keys": BlockLayout(None, Windows((4, 4), (2, 2)), Windows((2, 3), (1, 2)), prefix=2),
    "survivors": BlockLayout(None, on_sequence(11, 4), on_sequence(11, 4), prefix=1, fused=1,
                             order=jax.device_put(np.argsort(draw(BATCH, 11, seed=5), axis=1))),
}


def case(name, dtype="float32"):
  """Returns (the layout with blocks chosen, query, key, value)."""
  layout = CASES[name]
  layout = layout._replace(chosen=random_choice(layout.queries, layout.keys, 2))
  around = layout.prefix + layout.fused
  queries, keys = (np.prod(windows.grid) + around for windows in (layout.queries, layout.keys))
  arrays = (draw(BATCH, queries, HEADS, WIDTH), draw(BATCH, keys, HEADS, WIDTH, seed=2),
            draw(BATCH, keys, HEADS, 7, seed=3))
  return layout, *(x.astype(dtype) for x in arrays)


def run(attend, *arrays):
  """Returns (gradients, output)."""
  def loss(*arrays):
    out = attend(*arrays)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out
  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)


@functools.cache
def expected_of(name, sized):
  """Returns (size, mask, what the reference computes with the mask, and without)."""
  layout, *arrays = case(name)
  size = np.exp(draw(BATCH, arrays[1].shape[1], seed=4)) if sized else None
  mask = np.asarray(jax.jit(lambda chosen: layout._replace(chosen=chosen).mask())(layout.chosen))
  return size, mask, *jax.device_get([
      run(lambda *qkv, core=core: reference.attend(core, *qkv), *arrays)
      for core in (Core(size, mask=mask), Core(size))])


@pytest.mark.parametrize("form", ["block_sparse_cpu", "block_sparse_gather", "block_sparse_kernel",
                                  "block_sparse_plain"])
@pytest.mark.parametrize("name,sized", [("grid", False), ("padded", False), ("padded", True),
                                        ("coarser keys", True), ("survivors", True)])
def test_every_form_and_its_gradients_match_the_reference(name, sized, form, monkeypatch):
  monkeypatch.setattr(kernels, "block_attention", lambda platform: cases.reference)
  layout, *arrays = case(name)
  size, mask, expected, dense = expected_of(name, sized)
  inner = mask[:, :, layout.prefix:, layout.prefix:]
  assert not inner.all(axis=-1).all() and mask.any(axis=-1).all()
  got = run(lambda *qkv: layout.attend(*qkv, Core(size).bias(), form), *arrays)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, expected)
  assert np.abs(np.asarray(got[1]) - dense[1]).max() > 0.1


@pytest.mark.parametrize("entries", [1, 64])
def test_processing_query_blocks_together_gives_the_same_output(entries, monkeypatch):
  layout, *arrays = case("grid")
  separate = run(lambda *qkv: layout.attend(*qkv, form="block_sparse_cpu"), *arrays)
  monkeypatch.setattr(tuning, "BLOCK_ENTRIES", entries)
  joint = run(lambda *qkv: layout.attend(*qkv, form="block_sparse_cpu"), *arrays)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), joint, separate)


@pytest.mark.parametrize("name", ["padded", "survivors"])
def test_batch_split_over_devices_needs_no_communication(name):
  """Attention and gradients of eight images on eight devices: no collectives between them."""
  layout = CASES[name]
  tokens = np.prod(layout.keys.grid) + layout.prefix + layout.fused
  order = None if layout.order is None else np.tile(np.arange(11)[::-1], (8, 1))
  chosen = np.tile(random_choice(layout.queries, layout.keys, 2)[:1], (8, 1, 1, 1))
  images = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P("data"))

  def loss(qkv, chosen, order):
    return jnp.sum(layout._replace(chosen=chosen, order=order).attend(*qkv) ** 2, axis=(1, 2, 3))

  def gradients(qkv, *args):
    out, pull = jax.vjp(lambda qkv: loss(qkv, *args), qkv)
    return pull(jnp.ones_like(out))

  with attention.split_over(8):
    program = jax.jit(gradients, in_shardings=images, out_shardings=images).lower(
        [draw(8, tokens, HEADS, WIDTH)] * 3, chosen, order).compile().as_text()
  assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program)


@pytest.mark.parametrize("device", [Device("cpu"), Device("gpu")])
def test_bfloat16_output_stays_bfloat16_and_close_to_the_reference(device):
  layout, *arrays = case("survivors", "bfloat16")
  with attention.on(device):
    got = run(Core(layout=layout), *arrays)
  assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
  expected = run(lambda *qkv: reference.attend(Core(layout=layout), *qkv),
                 *(x.astype(np.float32) for x in arrays))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      np.float32(a), b, atol=0.03 * max(1, np.abs(b).max())), got, expected)


def test_form_chosen_per_device_and_the_reason_for_using_no_kernel():
  windows = on_grid((32, 32), 8)
  layout = BlockLayout(jax.ShapeDtypeStruct((2, 6, 16, 4), jnp.int32), windows, windows, prefix=1)
  call, qkv = Core(layout=layout), [jax.ShapeDtypeStruct((2, 1025, 6, 64), jnp.bfloat16)] * 3
  assert choose(Device("cpu"), call, *qkv) == ("block_sparse_cpu", "")
  assert choose(HOPPER, call, *qkv) == ("block_sparse_kernel", "")
  assert choose(Device("tpu"), call, *qkv) == ("block_sparse_kernel", "")
  for device, requested, words in ((HOPPER, "einsum", "'einsum' was requested"),
                               (Device("tpu", count=4), None, "over 4 devices"),
                               (Device("gpu", capability="8.0"), None, "not for gpu 8.0"),
                               (Device("cpu", split=True), None, "not for cpu")):
    form, note = choose(device, call, *qkv, requested=requested)
    assert form == "block_sparse_gather" and words in note


@pytest.mark.parametrize("what,words", [("rescore", "a filter over scores needs all of them"),
                                        ("keep_mask", "a keep mask adds its epsilon")])
def test_unsupported_calls_fall_back_to_masked_dense_attention_with_a_warning(what, words):
  layout, *arrays = case("grid")
  core, rescore = Core(layout=layout), None
  if what == "keep_mask":
    keep_mask = np.tile((np.arange(17) != 3).astype(np.float32), (BATCH, 1))
    core = core._replace(keep_mask=keep_mask)
  else:
    def rescore(scores, edges):
      return 2 * scores
  assert choose(Device("cpu"), core, *arrays, rescore).form == "einsum"
  with pytest.warns(UserWarning, match=f"masked dense attention: {words}"):
    got = jax.jit(lambda *qkv: core(*qkv, rescore))(*arrays)
  expected = jax.jit(lambda *qkv: reference.attend(
      Core(keep_mask=core.keep_mask, mask=layout.mask()), *qkv, rescore))(*arrays)
  np.testing.assert_allclose(got, expected, atol=1e-6)
