"""Sparsifiner at block granularity: the choice of blocks, use in a network, and cost."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import trees
from vitcompact.attention import Core
from vitcompact.attention.block_sparse.layout import BlockLayout
from vitcompact.attention.block_sparse.windows import on_sequence
from vitcompact.block import Attention
from vitcompact.methods.attention.block_predictor import BlockMaskPredictor
from vitcompact.methods.attention.sparsifiner import attention_reconstruction

SPEC = vc.Sparsifiner(keep=0.5, granularity="block", window=2, min_tokens=0)
BATCH, HEADS, WIDTH = 2, 3, 4


def draw(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("keep,count", [(0.01, 1), (0.4, 2), (0.6, 2), (1.0, 4)])
def test_chosen_blocks_are_the_best_by_block_means_plus_the_query_block_itself(keep, count):
  spec = vc.Sparsifiner(keep=keep, granularity="block", window=2)
  module = BlockMaskPredictor(spec, 17, 1, (4, 4), (4, 4))
  query, key = draw(BATCH, 17, HEADS, WIDTH), draw(BATCH, 17, HEADS, WIDTH, seed=2)
  weights = {"query": draw(WIDTH, WIDTH, seed=3), "key": draw(WIDTH, WIDTH, seed=4)}
  chosen = module.apply({"params": weights}, Core(), query, key).layout.chosen
  means = []
  for x, name in ((query, "query"), (key, "key")):
    squares = np.asarray(x[:, 1:]).reshape(BATCH, 2, 2, 2, 2, HEADS, WIDTH).mean(axis=(2, 4))
    means.append(squares.reshape(BATCH, 4, HEADS, WIDTH) @ np.asarray(weights[name]))
  score = np.einsum("bqfd,bkfd->bfqk", *means)
  for b, h, q in itertools.product(range(BATCH), range(HEADS), range(4)):
    others = [k for k in np.argsort(-score[b, h, q]) if k != q]
    assert chosen[b, h, q].tolist() == [q, *others[:count - 1]]


def test_keeping_every_block_is_dense_attention():
  model = tiny.deit(vc.Plan(attention=vc.Sparsifiner(keep=1.0, granularity="block", window=2,
                                                     min_tokens=0)))
  variables, x = tiny.init(model), tiny.images(model)
  assert variables["params"]["blocks_0"]["links"].keys() == {"query", "key"}
  dense = tiny.deit()
  params = {name: {k: v for k, v in part.items() if k != "links"} if name.startswith("blocks")
            else part for name, part in variables["params"].items()}
  np.testing.assert_allclose(tiny.apply(model, variables, x),
                             tiny.apply(dense, {"params": params}, x), atol=1e-6)


def test_phase_2_has_no_predictor_gradient_and_phase_1_reconstructs_block_mass():
  sparse = tiny.deit(vc.Plan(attention=SPEC), depth=1)
  dense = sparse.clone(plan=sparse.plan.map(vc.Sparsifiner.first_phase.method))
  variables, x = tiny.init(sparse), tiny.images(sparse)

  def phase_1(params):
    _, state = tiny.apply(dense, {"params": params}, x, mutable=["attention", "maps"])
    return attention_reconstruction(state["attention"]).sum(), state

  @jax.jit
  def gradients(params):
    return (jax.grad(phase_1, has_aux=True)(params),
            jax.grad(lambda p: jnp.sum(tiny.apply(sparse, {"params": p}, x) ** 2))(params))

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
  seen = state["attention"]["blocks_0"]["links"]
  np.testing.assert_allclose(seen["target"][0], mass / mass.sum(axis=-1, keepdims=True), atol=1e-5)
  np.testing.assert_allclose(seen["score"][0].sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("plan", [
    vc.Plan(attention=SPEC, heads=vc.HMHSA(layout="grid", rank=2), ffn=vc.CFFN()),
    vc.Plan(attention=SPEC, heads=vc.HMHSA(real_heads=3), tokens=vc.EViT(keep=0.7, blocks=(0,))),
    vc.Plan(attention=SPEC, tokens=vc.ToMe(r=3))])
def test_block_masks_compose_and_equal_masked_dense_attention_in_a_model(plan, monkeypatch):
  model = tiny.deit(plan, global_pool="avg")
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = tiny.fold(model, variables)
  assert trees.differences(folded, jax.eval_shape(deploy.init, jax.random.key(0), x)) == []
  got = tiny.apply(model, variables, x)

  def masked(self, query, key, value, bias=None, form=None):
    size = None if bias is None else jnp.exp(bias)
    return Core(size, mask=self.mask())(query, key, value)

  monkeypatch.setattr(BlockLayout, "attend", masked)
  np.testing.assert_allclose(jax.jit(lambda v, x: model.apply(v, x))(variables, x), got, rtol=1e-4,
                             atol=1e-5)


def test_surviving_tokens_form_blocks_in_the_order_of_the_original_windows():
  """Class token, then sources 0 .. 15 of a 4 x 4 grid; 2 and 5 were dropped, 10 merged into 0."""
  keep_mask = [i for i in range(16) if i not in (2, 5, 10)]
  source = np.full(17, -1)
  source[0] = 0
  for place, i in enumerate(keep_mask, start=1):
    source[1 + i] = place
  source[1 + 10] = source[1 + 0]
  module = BlockMaskPredictor(SPEC, 17, 1, (4, 4), (4, 4))
  x = draw(1, 14, HEADS, WIDTH)
  weights = {"query": jnp.eye(WIDTH), "key": jnp.eye(WIDTH)}
  layout = module.apply({"params": weights}, Core(), x, x, jnp.asarray(source)[None]).layout
  windows = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
  assert [keep_mask[i] for i in layout.order[0]] == [i for i in windows if i in keep_mask]
  assert layout.queries == layout.keys == on_sequence(13, 4) and layout.chosen.shape[-1] == 2


def test_executed_products_are_those_of_the_chosen_blocks():
  """16 patches in 4 blocks of 4 plus a class token; 2 key blocks per query block; 4 heads of 6."""
  plan = vc.Plan(attention=SPEC)
  count, dense = vc.count(tiny.deit(plan, depth=1)), vc.count(tiny.deit(depth=1))
  heads, dh, patches = 4, 6, 16
  pairs = patches * 2 * 4 + patches * 1 + 1 * 17     # blocks, class key, class query
  predictor = 2 * 4 * dh * dh + 4 * 4 * dh
  assert count.attention_macs == heads * (2 * pairs * dh + predictor)
  assert count.ideal_attention_macs == count.attention_macs
  assert count.macs - count.attention_macs == dense.macs - dense.attention_macs


def test_memory_grows_linearly_with_tokens():
  """Temporary memory of a compiled layer with gradients, at 32 x 32 and 64 x 64 patches."""
  def temporary(side):
    tokens, grid = side * side + 1, (side, side)
    site = tiny.site(width=32, heads=2, tokens=tokens, query_grid=grid, key_grid=grid)
    predictor, attn = vc.Sparsifiner(granularity="block").make(site), Attention(site)
    weights = {"query": jnp.eye(16), "key": jnp.eye(16)}

    def loss(params, x):
      layer = attn.bind({"params": params})
      query, key, value = layer.query(x), layer.key(x), layer.value(x)
      core = predictor.apply({"params": weights}, Core(), query, key)
      return layer.attend(query, key, value, core).sum()

    x = jax.ShapeDtypeStruct((1, tokens, 32), jnp.float32)
    params = jax.eval_shape(attn.init, jax.random.key(0), x)["params"]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(64) / temporary(32) <= 4.6


def test_short_sequences_stay_dense_and_filtering_scores_is_rejected():
  plan = vc.Plan(attention=vc.Sparsifiner(granularity="block"))
  absent = tiny.deit(plan).submodules().values()
  assert all(block.methods.attention is None for block in absent)
  long = vc.create_model("deit_small_patch16_224", plan=plan, image_size=384, depth=1)
  assert long.submodules()["blocks_0"].methods.attention == plan.attention
  with pytest.raises(ValueError, match=r"needs the scores of all pairs of tokens.*site='probs'"):
    tiny.deit(vc.Plan(attention=SPEC, heads=vc.HMHSA(site="logits")))
