"""KeyMerging: which keys merge, attention over them, and what it composes with."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.models.pyramids import SHORT, pvt
from vitcompact import attention, trees
from vitcompact.attention import Core, vendor
from vitcompact.methods import protocol
from vitcompact.methods.attention.key_merging import MergeKeys
from vitcompact.methods.heads.hmhsa import HMHSA, Hallucinate
from vitcompact.plan import BlockMethods

HALF = vc.KeyMerging(keep=0.5, min_tokens=0)


def arrays(queries=11, keys=14, heads=2, width=4):
  return (tiny.normal(2, queries, heads, width), tiny.normal(2, keys, heads, width, seed=1),
          tiny.normal(2, keys, heads, width + 1, seed=2))


def merge(spec, core, query, key, prefix=0, fused=False):
  return MergeKeys(spec, prefix).apply({}, core, query, key, None, fused)


@functools.partial(jax.jit, static_argnames=("spec", "prefix", "fused", "form"))
def attend(query, key, value, spec=HALF, size=None, prefix=0, fused=False, form=None):
  """Returns the output of attention over merged keys, its maps and the sizes of the keys."""
  core = merge(spec, Core(size=size), query, key, prefix, fused)
  with attention.using(form):
    return core(query, key, value), core.maps(query, key), core.size


def groups_of(spec, key, prefix, fused=0):
  """The definition for one image: lists of keys, each of which merges into one."""
  metric = np.asarray(key, float).mean(axis=1)
  metric = metric / np.linalg.norm(metric, axis=1, keepdims=True)
  free = range(prefix, len(key) - fused)
  even, odd = [i for i in free if i % 2 == 0], [i for i in free if i % 2]
  best = {i: max(odd, key=lambda j: metric[i] @ metric[j]) for i in even}
  r = int(round((1 - spec.keep) * len(free), 6))
  groups = {i: [i] for i in range(len(key))}
  for i in sorted(even, key=lambda i: -(metric[i] @ metric[best[i]]))[:r]:
    groups[best[i]] += groups.pop(i)
  return list(groups.values())


def by_loops(groups, size, query, key, value):
  """Attention of one image over averaged keys and values, in float64."""
  query, key, value = (np.asarray(x, float) for x in (query, key, value))
  means = [[np.average(x[group], axis=0, weights=size[group]) for group in groups]
           for x in (key, value)]
  key, value = (np.stack(rows) for rows in means)
  scores = np.einsum("nhd,mhd->hnm", query, key) / query.shape[-1] ** 0.5
  weights = np.exp(scores) * np.array([size[group].sum() for group in groups])
  return np.einsum("hnm,mhe->nhe", weights / weights.sum(axis=-1, keepdims=True), value)


@pytest.mark.parametrize("keep,prefix,fused,sized", [
    (0.5, 0, False, False), (0.5, 1, False, True), (0.7, 2, True, True), (0.75, 0, True, False)])
def test_similar_keys_merge_into_one_weighted_by_its_size(keep, prefix, fused, sized):
  spec, (query, key, value) = vc.KeyMerging(keep=keep), arrays()
  size = 1 + np.arange(28, dtype=np.float32).reshape(2, 14) % 3 if sized else None
  got, _, sizes = map(np.asarray, attend(query, key, value, spec, size, prefix, fused))
  for image in range(2):
    groups = groups_of(spec, key[image], prefix, int(fused))
    assert len(groups) == sizes.shape[1] == 14 - spec.merged_count(14 - prefix - fused)
    assert all([i] in groups for i in [*range(prefix), *[13] * fused])
    weights = np.ones(14) if size is None else size[image]
    expected = by_loops(groups, weights, query[image], key[image], value[image])
    np.testing.assert_allclose(got[image], expected, atol=2e-6)
    np.testing.assert_allclose(sizes[image].sum(), weights.sum())


def test_merging_duplicate_keys_and_values_does_not_change_the_output():
  query, key, value = arrays(keys=7)
  key, value = np.repeat(key, 2, axis=1), np.repeat(value, 2, axis=1)
  got, _, sizes = attend(query, key, value)
  expected = jax.jit(attention.DENSE.__call__)(query, key, value)
  assert sizes.shape == (2, 7) and (np.asarray(sizes) == 2).all()
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_maps_cover_all_keys_and_give_the_output():
  query, key, value = arrays()
  out, maps, _ = map(np.asarray, attend(query, key, value, prefix=1))
  assert maps.shape == (2, 2, 11, 14)
  np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)
  np.testing.assert_allclose(np.einsum("bhnm,bmhe->bnhe", maps, value), out, atol=2e-6)
  for image in range(2):
    for group in groups_of(HALF, key[image], 1):
      columns = maps[image][..., np.array(group)]
      np.testing.assert_allclose(columns, columns[..., :1].repeat(len(group), -1), atol=1e-7)


@pytest.mark.parametrize("layout", ["map", "grid"])
def test_hallucinated_maps_are_filtered_maps_over_all_keys(layout):
  """U A W written out for the real heads' maps, with W in the order of the keys before merging."""
  heads = Hallucinate(HMHSA(layout=layout, rank=2), (3, 3), (3, 4), 2)
  query, key, _ = arrays()
  value = tiny.normal(2, 14, 4, 5, seed=2)
  variables = tiny.randomised(jax.eval_shape(lambda: heads.init(
      jax.random.key(0), query, key, value, merge(HALF, Core(), query, key, 2))))

  @jax.jit
  def run(variables, query, key, value):
    return heads.apply({"params": variables["params"]}, query, key, value,
                       merge(HALF, Core(), query, key, 2), mutable=["maps"])

  got, state = run(variables, query, key, value)
  maps, = state["maps"]["maps"]
  assert maps.shape == (2, 4, 11, 14)
  np.testing.assert_allclose(got, np.einsum("bhnm,bmhe->bnhe", maps, value), atol=1e-5)


def test_matching_has_no_gradient_but_the_means_do():
  @jax.jit
  def gradients(query, key, value):
    fixed = merge(HALF, Core(), query, key)

    def loss(core_of):
      return lambda key, value: jnp.sum(jnp.sin(core_of(key)(query, key, value)))

    return [jax.grad(loss(core_of), (0, 1))(key, value)
            for core_of in (lambda key: merge(HALF, Core(), query, key), lambda key: fixed)]

  for a, b in zip(*gradients(*arrays()), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert (np.abs(a).max(axis=(2, 3)) > 0).all()


def test_no_keys_are_merged_while_tokens_are_hidden():
  query, key, _ = arrays()
  core = Core(keep_mask=np.ones((2, 14), np.float32))
  assert merge(HALF, core, query, key) is core


@pytest.mark.parametrize("form", [form for form in attention.FORMS if form not in vendor.FORMS])
def test_every_attention_form_supports_merged_keys(form):
  query, key, value = arrays()
  expected, _, _ = attend(query, key, value)
  np.testing.assert_allclose(attend(query, key, value, form=form)[0], expected, atol=2e-6)


# In models.


def test_keeping_all_keys_or_having_few_is_the_dense_program():
  for plan in (vc.KeyMerging(keep=1, min_tokens=0), vc.KeyMerging(min_tokens=18), vc.KeyMerging()):
    model, dense = tiny.deit(vc.Plan(attention=plan)), tiny.deit()
    variables, x = tiny.init(dense), tiny.images(dense)
    assert model.plan.at(model.sites()[0]).attention is None
    assert str(jax.make_jaxpr(model.apply)(variables, x)) == str(
        jax.make_jaxpr(dense.apply)(variables, x))


def test_it_is_active_depending_on_the_number_of_keys():
  model = pvt("pvt_small", vc.Plan(attention=vc.KeyMerging(min_tokens=5)))
  assert [site.tokens for site in model.sites()] == [4, 4, 4, 4, 5]
  assert [model.plan.at(site).attention is not None for site in model.sites()] == [False] * 4 + [
      True]
  assert vc.KeyMerging().token_threshold == attention.tuning.MERGE_MIN_TOKENS
  assert vc.KeyMerging.options(tiny.site()) == []
  assert [method.keep for method in vc.KeyMerging.options(
      tiny.site(tokens=577, tokens_left=577))] == [0.5, 0.75]


# Next-ViT's blocks take their keys from a smaller grid, as PVT's do.
@pytest.mark.parametrize("name", ["pvt_small",
                                  pytest.param("nextvit_small", marks=pytest.mark.slow)])
def test_reduced_keys_are_merged_and_queries_stay(name):
  plan = vc.Plan(attention=HALF, heads=vc.HMHSA(), ffn=vc.CFFN())
  if name == "pvt_small":
    model = pvt(name, plan, **{**SHORT, "drop_path_rate": 0.0})
  else:
    model = vc.create_model(name, plan=plan, image_size=48, num_classes=5, head_dim=8,
                            stem_widths=(8, 4, 8, 8), widths=(8, 24, 24, 24), depths=(1, 1, 1, 0),
                            periods=(0, 1, 1, 0), drop_path_rate=0.0)
  variables, x = tiny.init(model), tiny.images(model)
  deploy, folded = tiny.fold(model, variables)
  proof = vc.verify(model, variables, deploy, folded, x)
  assert proof.max_rel <= 2e-5 and proof.first_difference is None
  dense = model.clone(plan=vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()))
  assert trees.differences(tiny.init(dense), variables) == []      # no parameters
  few, all_ = vc.count(model), vc.count(dense)
  assert few.attention_macs < all_.attention_macs and few.params == all_.params


def test_token_reducer_uses_all_keys_and_passes_its_sizes_on():
  tokens = vc.ToMe(r=3)
  model = tiny.deit(vc.Plan(attention=HALF, tokens=tokens), depth=1)
  plain = tiny.deit(vc.Plan(tokens=tokens), depth=1)
  variables, x = tiny.init(model), tiny.images(model)
  sources = [tiny.apply(m, variables, x, mutable=["tokens"])[1]["tokens"]["source_0"][0]
             for m in (model, plain)]
  np.testing.assert_array_equal(*sources)


def test_keeping_half_of_the_keys_halves_the_products():
  dense, model = tiny.deit(depth=1), tiny.deit(vc.Plan(attention=HALF), depth=1)
  expected, got = vc.count(dense), vc.count(model)
  # 8 of 16 patches and the class token for 17 queries, plus cosines of 9 and 8 keys of width 6.
  assert expected.attention_macs == 2 * 17 * 17 * 24 and got.attention_macs == 2 * 17 * 9 * 24
  assert got.macs - expected.macs == got.attention_macs - expected.attention_macs + 9 * 8 * 6
  assert got.ideal_macs == got.macs


def test_compact_adds_no_parameters_and_measure_can_propose_it():
  dense = tiny.deit()
  variables = tiny.init(dense)
  _, got = vc.compact(dense, variables, vc.Plan(attention=HALF), images=tiny.images(dense, 8))
  assert trees.digest(got) == trees.digest(variables)
  state = vc.to_torch(tiny.deit(vc.Plan(attention=HALF)), got)
  assert state.keys() == vc.to_torch(dense, variables).keys()
  assert BlockMethods(attention=HALF).present() == [HALF]
  plan = vc.Plan(attention=HALF)
  assert vc.Plan.from_json(plan.to_json()) == plan
  assert protocol.scope_of(HALF) == "keymerging"


@pytest.mark.parametrize("make,words", [
    (lambda: vc.KeyMerging(keep=0.4), "[0.5, 1]; a matching merges at most half"),
    (lambda: vc.KeyMerging(keep=True), "[0.5, 1]"),
    (lambda: vc.KeyMerging(min_tokens=-1), "0 or more, or None"),
    (lambda: tiny.deit(vc.Plan(attention=HALF, tokens=vc.MCTF(r=3))),
     "needs every token to attend to all, which KeyMerging(min_tokens=0) removes"),
    (lambda: tiny.deit(vc.Plan(attention=HALF, heads=vc.HMHSA(site="logits"))),
     "needs the scores of all pairs of tokens, which KeyMerging(min_tokens=0) removes")])
def test_invalid_settings_raise_one_line_errors(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)
