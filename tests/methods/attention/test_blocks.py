"""Sparsifiner at block granularity: gathered blocks equal masked dense attention, and cost less."""
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import vitcompact as vc
from tests import tiny
from vitcompact import attention, kernels, trees
from vitcompact.attention import Core
from vitcompact.attention.block_sparse.layout import BlockLinks, attend_gathered
from vitcompact.attention.block_sparse.windows import Windows, nearest, on_grid, on_line
from vitcompact.block import Attention
from vitcompact.methods.attention.block_predictor import BlockPredictor
from vitcompact.train import losses

SPEC = vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0)
BATCH, HEADS, WIDTH = 2, 3, 4


def draw(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def choice(queries, keys, count, seed=1):
  """So many different blocks of keys for each block of queries, at random."""
  order = jnp.argsort(draw(BATCH, HEADS, queries.blocks, keys.blocks, seed=seed), axis=-1)
  return order[..., :count].astype(jnp.int32)


@pytest.mark.parametrize("grid,sides", [
    ((14, 14), (7, 7)), ((24, 24), (8, 8)), ((32, 64), (8, 8)), ((12, 20), (6, 10)),
    ((9, 4), (9, 4)), ((13, 17), (7, 9)), ((23, 30), (8, 10))])
def test_windows_divide_the_grid_or_pad_it_little(grid, sides):
  windows = on_grid(grid, 8)
  assert windows.sides == sides
  assert windows.valid().sum() == grid[0] * grid[1]


def test_a_block_is_a_square_of_the_image():
  windows = Windows((3, 5), (2, 2))
  x = jnp.arange(15.0).reshape(1, 15, 1, 1)
  blocks = windows.cut(x)[0, 0, :, :, 0]
  np.testing.assert_array_equal(blocks[1], [2, 3, 7, 8])
  np.testing.assert_array_equal(blocks[2], [4, 0, 9, 0])
  np.testing.assert_array_equal(windows.valid()[2], [1, 0, 1, 0])
  np.testing.assert_array_equal(windows.join(windows.cut(x)), x)
  np.testing.assert_array_equal(windows.block_of(), [0, 0, 1, 1, 2, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5])
  np.testing.assert_array_equal(windows.slot_of()[[2, 3, 7, 8]], [4, 5, 6, 7])


def test_means_are_those_of_the_tokens_of_a_block():
  x, windows = draw(BATCH, 1 + 48 + 2, HEADS, WIDTH), Windows((6, 8), (3, 2))
  wanted = windows.cut(x[:, 1:49]).mean(axis=3)
  for means in (windows.means(x[:, 1:49]), windows.means_in_turn(x, 1)):
    np.testing.assert_allclose(means, wanted, atol=1e-6)


def test_the_block_of_keys_nearest_is_its_own_on_one_grid_and_above_it_on_a_coarser():
  fine = Windows((8, 8), (2, 2))
  np.testing.assert_array_equal(nearest(fine, fine), np.arange(16))
  np.testing.assert_array_equal(nearest(fine, Windows((4, 4), (2, 2))),
                                [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
  np.testing.assert_array_equal(nearest(Windows((2, 2), (1, 2)), on_line(6, 3)), [0, 1])


CASES = {
    "grid": BlockLinks(None, Windows((4, 4), (2, 2)), Windows((4, 4), (2, 2)), prefix=1),
    "padded": BlockLinks(None, Windows((3, 5), (2, 2)), Windows((3, 5), (2, 2))),
    "coarser keys": BlockLinks(None, Windows((4, 4), (2, 2)), Windows((2, 3), (1, 2)), prefix=2),
    "survivors": BlockLinks(None, on_line(11, 4), on_line(11, 4), prefix=1, fused=1,
                            order=jnp.argsort(draw(BATCH, 11, seed=5), axis=1)),
}


@pytest.mark.parametrize("name,sized", [("grid", False), ("padded", False), ("padded", True),
                                        ("coarser keys", False), ("survivors", True)])
def test_gathered_blocks_equal_masked_dense_attention_and_its_gradients(name, sized):
  links = CASES[name]
  links = links._replace(chosen=choice(links.queries, links.keys, 2))
  around = links.prefix + links.fused
  queries, keys = (np.prod(windows.grid) + around for windows in (links.queries, links.keys))
  args = (draw(BATCH, queries, HEADS, WIDTH), draw(BATCH, keys, HEADS, WIDTH, seed=2),
          draw(BATCH, keys, HEADS, 7, seed=3))
  size = jnp.exp(draw(BATCH, keys, seed=4)) if sized else None
  mask = links.mask()
  inner = mask[:, :, links.prefix:queries - links.fused, links.prefix:keys - links.fused]
  assert not inner.all(axis=-1).any() and inner.any(axis=-1).all()

  @jax.jit
  def run(*args):
    def loss(core, *args):
      out = core(*args)
      return jnp.sum(jnp.sin(out)), out
    return [jax.grad(lambda *args, core=core: loss(core, *args), (0, 1, 2), has_aux=True)(*args)
            for core in (Core(size, blocks=links), Core(size, mask=mask))]

  got, wanted = run(*args)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, wanted)


@pytest.mark.parametrize("name,sized", [("padded", True), ("survivors", True)])
def test_heads_in_turn_equal_heads_side_by_side(name, sized, monkeypatch):
  """What a CPU runs against what other devices run."""
  links = CASES[name]
  links = links._replace(chosen=choice(links.queries, links.keys, 2))
  around = links.prefix + links.fused
  tokens = np.prod(links.keys.grid) + around
  args = (draw(BATCH, tokens, HEADS, WIDTH), draw(BATCH, tokens, HEADS, WIDTH, seed=2),
          draw(BATCH, tokens, HEADS, 7, seed=3))
  bias = draw(BATCH, tokens, seed=4)

  def run(platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)

    def loss(*args):
      out = links.attend(*args, bias)
      return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), run("gpu"), run("cpu"))


@pytest.mark.parametrize("name", ["padded", "survivors"])
def test_images_on_several_devices_stay_where_they_are(name):
  """Attention and gradients of eight images on eight devices: nothing is sent between these."""
  links = CASES[name]
  tokens = np.prod(links.keys.grid) + links.prefix + links.fused
  order = None if links.order is None else jnp.tile(jnp.arange(11)[::-1], (8, 1))
  chosen = jnp.tile(choice(links.queries, links.keys, 2)[:1], (8, 1, 1, 1))
  images = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P("data"))

  def loss(qkv, chosen, order):
    return jnp.sum(links._replace(chosen=chosen, order=order).attend(*qkv) ** 2, axis=(1, 2, 3))

  def gradients(qkv, *args):
    out, pull = jax.vjp(lambda qkv: loss(qkv, *args), qkv)
    return pull(jnp.ones_like(out))

  with attention.split_over(8):
    program = jax.jit(gradients, in_shardings=images, out_shardings=images).lower(
        [draw(8, tokens, HEADS, WIDTH)] * 3, chosen, order).compile().as_text()
  assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program)


@pytest.mark.parametrize("keep,count", [(0.01, 1), (0.4, 2), (0.6, 2), (1.0, 4)])
def test_chosen_are_the_best_blocks_by_their_means_and_the_own(keep, count):
  spec = vc.Sparsifiner(keep=keep, granularity="block", window=2)
  module = BlockPredictor(spec, 17, 1, (4, 4), (4, 4))
  query, key = draw(BATCH, 17, HEADS, WIDTH), draw(BATCH, 17, HEADS, WIDTH, seed=2)
  weights = {"query": draw(WIDTH, WIDTH, seed=3), "key": draw(WIDTH, WIDTH, seed=4)}
  chosen = module.apply({"params": weights}, Core(), query, key).blocks.chosen
  means = []
  for x, name in ((query, "query"), (key, "key")):
    squares = np.asarray(x[:, 1:]).reshape(BATCH, 2, 2, 2, 2, HEADS, WIDTH).mean(axis=(2, 4))
    means.append(squares.reshape(BATCH, 4, HEADS, WIDTH) @ np.asarray(weights[name]))
  score = np.einsum("bqfd,bkfd->bfqk", *means)
  for b, h, q in itertools.product(range(BATCH), range(HEADS), range(4)):
    others = [k for k in np.argsort(-score[b, h, q]) if k != q]
    assert chosen[b, h, q].tolist() == [q, *others[:count - 1]]


def test_keeping_every_block_is_dense_attention():
  model = tiny.deit(vc.Plan(links=vc.Sparsifiner(keep=1.0, granularity="block", window=2,
                                                 min_tokens=0)))
  variables, x = tiny.init(model), tiny.images(model)
  assert variables["params"]["blocks_0"]["links"].keys() == {"query", "key"}
  dense = tiny.deit()
  params = {name: {k: v for k, v in part.items() if k != "links"} if name.startswith("blocks")
            else part for name, part in variables["params"].items()}
  np.testing.assert_allclose(jax.jit(model.apply)(variables, x),
                             jax.jit(dense.apply)({"params": params}, x), atol=1e-6)


def test_phase_2_gives_predictors_no_gradient_and_phase_1_reconstructs_the_mass_of_blocks():
  sparse = tiny.deit(vc.Plan(links=SPEC), depth=1)
  dense = sparse.clone(plan=sparse.plan.with_links(masked=False))
  variables, x = tiny.init(sparse), tiny.images(sparse)

  def phase_1(params):
    _, state = dense.apply({"params": params}, x, mutable=["links", "maps"])
    return losses.attention_reconstruction(state["links"]).sum(), state

  @jax.jit
  def gradients(params):
    return (jax.grad(phase_1, has_aux=True)(params),
            jax.grad(lambda p: jnp.sum(sparse.apply({"params": p}, x) ** 2))(params))

  (first, state), second = gradients(variables["params"])
  for name, leaf in trees.named_leaves(second).items():
    assert bool((leaf == 0).all()) == ("/links/" in name), name
  for name, leaf in trees.named_leaves(first).items():
    assert bool((leaf == 0).all()) == ("/links/" not in name), name
  maps = np.asarray(state["maps"]["blocks_0"]["attn"]["maps"][0])[:, :, 1:, 1:]
  block_of = np.array([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
  mass = np.zeros((3, 4, 4, 4))
  for i, j in itertools.product(range(16), repeat=2):
    mass[:, :, block_of[i], block_of[j]] += maps[:, :, i, j]
  links = state["links"]["blocks_0"]["links"]
  np.testing.assert_allclose(links["target"][0], mass / mass.sum(axis=-1, keepdims=True), atol=1e-5)
  np.testing.assert_allclose(links["score"][0].sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("plan", [
    vc.Plan(links=SPEC, heads=vc.HMHSA(layout="grid", rank=2), ffn=vc.CFFN()),
    vc.Plan(links=SPEC, heads=vc.HMHSA(real_heads=3), tokens=vc.EViT(keep=0.7, blocks=(0,))),
    vc.Plan(links=SPEC, tokens=vc.ToMe(r=3))])
def test_blocks_compose_and_equal_masked_dense_attention_in_the_whole_model(plan, monkeypatch):
  model = tiny.deit(plan, global_pool="avg")
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = vc.fold(model, variables)
  assert trees.differences(folded, jax.eval_shape(deploy.init, jax.random.key(0), x)) == []
  got = jax.jit(lambda v, x: model.apply(v, x))(variables, x)

  def masked(self, query, key, value, bias=None):
    size = None if bias is None else jnp.exp(bias)
    return Core(size, mask=self.mask())(query, key, value)

  monkeypatch.setattr(BlockLinks, "attend", masked)
  np.testing.assert_allclose(jax.jit(lambda v, x: model.apply(v, x))(variables, x), got, rtol=1e-4,
                             atol=1e-5)


def test_survivors_are_cut_into_blocks_in_the_order_of_the_first_windows():
  """Class token, then sources 0 .. 15 of a 4 x 4 grid; sources 2 and 5 are gone, 10 joined 0."""
  keep_mask = [i for i in range(16) if i not in (2, 5, 10)]
  source = np.full(17, -1)
  source[0] = 0
  for place, i in enumerate(keep_mask, start=1):
    source[1 + i] = place
  source[1 + 10] = source[1 + 0]
  module = BlockPredictor(SPEC, 17, 1, (4, 4), (4, 4))
  x = draw(1, 14, HEADS, WIDTH)
  weights = {"query": jnp.eye(WIDTH), "key": jnp.eye(WIDTH)}
  links = module.apply({"params": weights}, Core(), x, x, jnp.asarray(source)[None]).blocks
  windows = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
  assert [keep_mask[i] for i in links.order[0]] == [i for i in windows if i in keep_mask]
  assert links.queries == links.keys == on_line(13, 4) and links.chosen.shape[-1] == 2


def test_executed_products_are_those_of_the_linked_blocks():
  """16 patches in 4 blocks of 4 and a class token; 2 blocks a query block; 4 heads of 6."""
  plan = vc.Plan(links=SPEC)
  count, dense = vc.count(tiny.deit(plan, depth=1)), vc.count(tiny.deit(depth=1))
  heads, dh, patches = 4, 6, 16
  pairs = patches * 2 * 4 + patches * 1 + 1 * 17     # blocks, class key, class query
  predictor = 2 * 4 * dh * dh + 4 * 4 * dh
  assert count.attention_macs == heads * (2 * pairs * dh + predictor)
  assert count.ideal_attention_macs == count.attention_macs
  assert count.macs - count.attention_macs == dense.macs - dense.attention_macs


def test_memory_grows_linearly_with_tokens():
  """Temporary memory of a compiled layer, with gradients, at 32 x 32 and 64 x 64 patches."""
  def temporary(side):
    tokens = side * side + 1
    spec = vc.Sparsifiner(granularity="block")
    links = BlockPredictor(spec, tokens, 1, (side, side), (side, side))
    attn = Attention(32, 2, query_grid=(side, side), key_grid=(side, side), prefix=1)
    weights = {"query": jnp.eye(16), "key": jnp.eye(16)}

    def loss(params, x):
      layer = attn.bind({"params": params})
      query, key, value = layer.query(x), layer.key(x), layer.value(x)
      core = links.apply({"params": weights}, Core(), query, key)
      return layer.attend(query, key, value, core).sum()

    x = jax.ShapeDtypeStruct((1, tokens, 32), jnp.float32)
    params = jax.eval_shape(attn.init, jax.random.key(0), x)["params"]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(64) / temporary(32) <= 4.6


def test_bfloat16_stays_bfloat16():
  links = CASES["survivors"]._replace(chosen=choice(on_line(11, 4), on_line(11, 4), 2))
  x = draw(BATCH, 13, HEADS, WIDTH).astype(jnp.bfloat16)

  def run(x):
    out, pull = jax.vjp(Core(blocks=links), x, x, x)
    return out, *pull(out)

  assert {leaf.dtype for leaf in jax.eval_shape(run, x)} == {jnp.dtype(jnp.bfloat16)}


def test_short_sequences_have_no_block_links_and_a_filter_over_scores_is_refused():
  plan = vc.Plan(links=vc.Sparsifiner(granularity="block"))
  absent = tiny.deit(plan)
  assert all(part.links is None for part in absent.parts().values())
  long = vc.create_model("deit_small_patch16_224", plan=plan, image_size=384, depth=1)
  assert isinstance(long.parts()["blocks_0"].links, BlockPredictor)
  with pytest.raises(ValueError, match="a filter over scores needs them all; use site='probs'"):
    tiny.deit(vc.Plan(links=SPEC, heads=vc.HMHSA(site="logits")))


@pytest.mark.parametrize("asked", [None, "einsum"])
def test_off_a_cpu_a_kernel_attends_where_there_is_one_and_nothing_else_was_asked_for(
    asked, monkeypatch):
  """Given the reference in a kernel's place the result is the same; counting asks for no kernel."""
  windows, seen = Windows((4, 4), (2, 2)), []

  def kernel(devices, query, key, value, chosen):
    seen.append((query.shape, chosen.shape))
    return attend_gathered

  links = BlockLinks(choice(windows, windows, 2), windows, windows, prefix=1)
  query, key, value = (draw(BATCH, 17, HEADS, WIDTH, seed=i) for i in range(3))
  on_cpu = links.attend(query, key, value)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(kernels, "block_attention", kernel)
  with attention.using(asked):
    np.testing.assert_allclose(links.attend(query, key, value), on_cpu, rtol=1e-5, atol=1e-6)
  assert seen == ([] if asked else [((BATCH, HEADS, 4, 4, WIDTH), (BATCH, HEADS, 4, 2))])
