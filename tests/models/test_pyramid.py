"""What PVT v1 and v2 have in common: plans over reduced keys, folding, features, training.

Two of the three kinds are tested where compiling the third would show nothing new.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models.pyramids import COMPACT, SHORT, pvt
from vitcompact import trees

NAMES = ["pvt_small", "pvt_v2_b2", "pvt_v2_b2_li"]
FAR = vc.Plan(heads=vc.HMHSA(layout="grid", rank=2), ffn=vc.CFFN(factor="both", rep="scale"))


@pytest.mark.parametrize("name,plan", [(NAMES[0], COMPACT), (NAMES[1], FAR), (NAMES[2], COMPACT)])
def test_fold_keeps_the_function_with_every_leaf_and_statistic_random(name, plan):
  model = pvt(name, plan, **SHORT)
  variables, x = tiny.init(model), tiny.images(model)
  deploy = model.clone(deploy=True)
  folded = jax.jit(lambda variables: vc.fold(model, variables)[1])(variables)
  proof = vc.verify(model, variables, deploy, folded, x)
  assert proof.max_rel <= 1e-5 and proof.first_difference is None
  shapes = jax.eval_shape(deploy.init, jax.random.key(0), x)
  assert trees.differences(folded, shapes) == []
  again, twice = vc.fold(deploy, folded)
  assert again == deploy and trees.digest(twice) == trees.digest(folded)


@pytest.mark.filterwarnings("ignore:blocks_:UserWarning")    # full rank saves nothing
def test_compacting_at_full_rank_is_the_dense_model():
  model = pvt("pvt_v2_b2", **SHORT)
  variables, x = tiny.init(model), tiny.images(model)
  plan = vc.Plan(ffn=vc.CFFN(rank_ratio=1))
  small, small_variables = vc.compact(model, variables, plan, images=x)
  shapes = jax.eval_shape(small.init, jax.random.key(0), x)
  assert trees.differences(small_variables, shapes) == []
  proof = vc.verify(model, variables, small, small_variables, x, tolerance=1e-4)
  assert proof.ok and proof.first_difference is None


@pytest.mark.parametrize("name,key_grid", [*[(name, (2, 2)) for name in NAMES[:2]],
                                           (NAMES[2], (7, 7))])
def test_heads_are_hallucinated_over_reduced_keys_in_blocks_with_several_heads(name, key_grid):
  model = pvt(name, COMPACT)
  sites = model.sites()
  assert [COMPACT.heads.scored_heads(site) for site in sites] == [1, 1, 3, 3, 2]
  assert [site.query_grid for site in sites] == [(16, 16), (8, 8), (4, 4), (4, 4), (2, 2)]
  assert all(site.key_grid == key_grid for site in sites)
  assert [site.prefix for site in sites] == [0, 0, 0, 0, int(name == "pvt_small")]
  params = tiny.init(model)["params"]
  assert "hallucinate" not in params["blocks_0"]["attn"]     # one head: nothing to copy
  assert all("hallucinate" in params[f"blocks_{i}"]["attn"] for i in range(1, 5))
  assert all("a0" in params[f"blocks_{i}"]["mlp"]["fc2"] for i in range(5))


def test_plan_blocks_are_numbered_over_all_stages():
  model = pvt("pvt_v2_b2", vc.Plan(blocks={3: {"ffn": vc.CFFN()}}))
  params = tiny.init(model)["params"]
  assert [i for i in range(5) if "a0" in params[f"blocks_{i}"]["mlp"]["fc2"]] == [3]
  assert params["blocks_3"]["attn"]["query"]["kernel"].shape == (20, 5, 4)
  with pytest.raises(ValueError, match="block 5, but the model has blocks 0 to 4"):
    pvt("pvt_v2_b2", vc.Plan(blocks={5: {"ffn": vc.CFFN()}}))


@pytest.mark.parametrize("name", NAMES[::2])
def test_stage_maps_are_returned_on_request_and_cost_nothing_otherwise(name):
  model = pvt(name, image_size=(64, 96))
  variables, x = tiny.init(model), tiny.images(model)
  assert "features" not in variables

  def record(module, _):
    return module.name in ("blocks_1", "norm_4")

  @jax.jit
  def run(variables, x):
    return tiny.apply(model, variables, x, mutable=["features", "intermediates"],
                      capture_intermediates=record)

  logits, state = run(variables, x)
  maps = {stage: found[0] for stage, found in state["features"].items()}
  assert {stage: found.shape for stage, found in maps.items()} == {
      "stage_1": (3, 16, 24, 8), "stage_2": (3, 8, 12, 16), "stage_3": (3, 4, 6, 20),
      "stage_4": (3, 2, 3, 16)}
  if name == "pvt_small":
    last = state["intermediates"]["blocks_1"]["__call__"][0].x
    np.testing.assert_array_equal(maps["stage_2"].reshape(last.shape), last)
  else:
    head = variables["params"]["head"]
    pooled = maps["stage_4"].mean(axis=(1, 2))
    np.testing.assert_allclose(pooled @ head["kernel"] + head["bias"][None], logits, atol=1e-5)
  plain = jax.make_jaxpr(model.apply)(variables, x)
  assert len(plain.out_avals) == 1


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, variables, x):
  """Returns gradients of a training loss, and the batch statistics after the step."""
  def loss(params):
    logits, new = tiny.apply(model, {**variables, "params": params}, x, train=True,
                             rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    return jnp.sum(logits ** 2), new.get("batch_stats", {})
  return jax.grad(loss, has_aux=True)(variables["params"])


@pytest.mark.parametrize("name", NAMES[::2])
def test_training_updates_every_statistic_and_gives_every_leaf_a_gradient(name):
  model = pvt(name, COMPACT, **SHORT)
  variables, x = tiny.init(model), tiny.images(model)
  grads, stats = gradient(model, variables, x)
  moved = jax.tree.map(lambda new, old: (new != old).any(), stats, variables["batch_stats"])
  assert all(jax.tree.leaves(moved))
  for leaf, grad in trees.named_leaves(grads).items():
    # A key's bias adds the same to every score of a row, which changes no attention map.
    assert np.isfinite(grad).all() and (np.any(grad != 0) or "key/bias" in leaf), leaf


def test_remat_changes_memory_not_results():
  model = pvt("pvt_v2_b2", **SHORT, drop_path_rate=0.5)
  remat = model.clone(remat=True)
  variables, x = tiny.init(model), tiny.images(model)
  assert trees.differences(tiny.init(remat), variables) == []
  grads, again = (gradient(m, variables, x)[0] for m in (model, remat))
  for got, expected in zip(jax.tree.leaves(again), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max() + 1e-4)


@pytest.mark.parametrize("name", NAMES[::2])
def test_bfloat16_is_close_to_float32_with_float32_outputs(name):
  model, low = (pvt(name, COMPACT, **SHORT, dtype=dtype) for dtype in ("float32", "bfloat16"))
  variables, x = tiny.init(model), tiny.images(model)
  expected, got = (tiny.apply(m, variables, x) for m in (model, low))
  assert got.dtype == jnp.float32
  got, expected = np.asarray(got), np.asarray(expected)
  assert 0 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05
  assert trees.differences(tiny.init(low), variables) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_has_one_rule_and_only_matrices_and_positions_decay(name):
  for plan in (vc.Plan(), FAR, vc.Plan(heads=vc.HMHSA(site="logits"), ffn=vc.CFFN())):
    model = pvt(name, plan)
    params = tiny.init(model)["params"]
    rules = trees.first_match(model.parameter_rules(), params, may_be_idle=True)
    decay = jax.tree.map(lambda rule: rule.decay, rules, is_leaf=lambda x: type(x) is trees.Leaf)
    decayed = {leaf for leaf, yes in trees.named_leaves(decay).items() if yes}
    # Unlike DeiT's, positions decay in the authors' training; the class token does not.
    assert decayed == {leaf for leaf in trees.named_leaves(params)
                       if leaf.endswith("/kernel") or leaf.startswith("pos_embed_")}


@pytest.mark.parametrize("name", NAMES)
def test_drop_path_grows_linearly_over_all_stages(name):
  blocks = pvt(name, drop_path_rate=0.4).submodules().values()
  np.testing.assert_allclose([block.drop_path for block in blocks], [0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("fields,words", [
    ({"heads": (1, 3, 5, 4)}, "3 does not divide 16"),
    ({"depths": (1, 1, 1)}, "each needs one entry for each stage"),
])
def test_incompatible_fields_raise_one_line_errors(fields, words):
  for name in NAMES[:2]:
    with pytest.raises(ValueError) as error:
      pvt(name, **fields)
    assert words in str(error.value) and "\n" not in str(error.value)
