"""measure, its reports, and the plans that they propose."""
import collections
import dataclasses
import importlib
import itertools
import json

import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import batches
from vitcompact.curvature import kl_per_error
from vitcompact.measure import block_attention_table, described_fields, divergence
from vitcompact.methods import protocol
from vitcompact.methods.ffn import cffn
from vitcompact.methods.protocol import Site
from vitcompact.plan import BlockMethods
from vitcompact.planner import Choice, Knapsack
from vitcompact.report import Option


@pytest.fixture(scope="module")
def measured():
  """(model, variables, images, full report) of a tiny DeiT."""
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), np.asarray(tiny.images(model, batch=48))
  with pytest.MonkeyPatch.context() as patch:   # each rank is a program to compile
    patch.setattr(cffn, "RATIOS", (0.25, 0.5))
    return model, variables, x, vc.measure(model, variables, x, sensitivity="full")


def test_a_report_lists_options_of_every_axis_with_their_costs(measured):
  report = measured[3]
  assert [row["name"] for row in report.blocks] == ["blocks_0", "blocks_1"]
  for row in report.blocks:
    assert {option.axis for option in row["options"]} == {"heads", "ffn"}   # 17 tokens: no blocks
    assert all(option.measured and option.kl >= 0 for option in row["options"])
    mass = row["tables"]["attention_mass"]
    assert mass == sorted(mass) and mass[-1] == pytest.approx(1, abs=1e-3)
    assert np.diag(row["tables"]["head_cost"]).tolist() == [0] * 4
    assert np.allclose(np.diag(row["tables"]["map_likeness"]), 1, atol=1e-3)
  assert {type(option.method).__name__ for option in report.tokens} == {"ToMe", "EViT", "MCTF"}


def test_the_kl_of_an_option_is_that_of_a_model_with_only_that_option(measured):
  """Against compact itself: one block is changed, and the held-out images are evaluated."""
  model, variables, x, report = measured
  option = next(option for option in report.blocks[1]["options"] if option.axis == "ffn")
  small, got = vc.compact(model, variables, vc.Plan(blocks={1: {"ffn": option.method}}), images=x)
  held_out = x[3::4]
  expected = divergence(tiny.apply(model, variables, held_out), tiny.apply(small, got, held_out))
  assert option.kl == pytest.approx(expected, rel=1e-3)


def test_more_heads_and_higher_ranks_have_lower_estimated_errors(measured):
  for row in measured[3].blocks:
    for kind in (vc.HMHSA, vc.HeadPruning):
      errors = [option.error for option in row["options"] if isinstance(option.method, kind)]
      assert len(errors) > 1 and errors == sorted(errors, reverse=True)
    for factor in ("output", "both"):
      errors = [option.error for option in row["options"]
                if option.axis == "ffn" and option.method.factor == factor]
      assert errors == sorted(errors, reverse=True)


def test_a_quick_report_infers_untried_options(measured, monkeypatch):
  model, variables, x, full = measured
  monkeypatch.setattr(cffn, "RATIOS", (0.25, 0.5))
  quick = vc.measure(model, variables, x, sensitivity="quick")
  scales = kl_per_error(model, variables, np.concatenate([x[3::4]]), 17 * 16)
  for kind in (vc.HMHSA, vc.HeadPruning, vc.CFFN):
    options = {row["name"]: [option for option in row["options"] if isinstance(option.method, kind)]
               for row in quick.blocks}
    (tried,) = (option for few in options.values() for option in few if option.measured)
    assert tried in options["blocks_1"]   # the middle one of two blocks, rounded up
    same = next(o for o in full.blocks[1]["options"] if o.method == tried.method)
    assert tried.kl == pytest.approx(same.kl, rel=1e-3)
    for name, few in options.items():
      scale = scales[name][tried.axis] / scales["blocks_1"][tried.axis]
      for option in few:
        assert option.kl == pytest.approx(tried.kl * option.error / tried.error * scale, rel=1e-4)


def test_a_quick_report_infers_the_blocks_it_skipped(monkeypatch):
  """Besides the effect of a block's curvature, KL here grows e-fold per block between the two tried
  blocks, and not outside them; pruned heads have no estimate."""
  looking = importlib.import_module("vitcompact.measure")
  model = tiny.deit(depth=6, drop_path_rate=0.0)
  depths = dict(zip((f"blocks_{i}" for i in range(6)), (1, 1, 2, 3, 4, 4), strict=True))
  scales = {f"blocks_{i}": {"heads": 1.0 + i, "ffn": 0.5 ** i} for i in range(6)}
  tried, estimate = [], protocol.estimate

  def units(method, error):
    return 0.01 / method.kept_heads if isinstance(method, vc.HeadPruning) else error

  def known(self, name, block, method, x):
    tried.append((name, type(method)))
    sums = self._sums(name, block, x, [type(method)])[1]
    (error,), _ = estimate(type(method), [method], self.modules[name].site, sums[type(method)])
    return units(method, error) * scales[name][method.axis] * np.exp(depths[name])

  def estimated(kind, *rest):
    return (None, {}) if kind is vc.HeadPruning else estimate(kind, *rest)

  monkeypatch.setattr(looking, "BLOCKS_PER_TRIAL", 3)
  # Only ratios count: the first gradients of a deep network may be tiny.
  monkeypatch.setattr(looking, "kl_per_error",
                      lambda *_: jax.tree.map(lambda scale: 1e-15 * scale, scales))
  monkeypatch.setattr(looking._Measurement, "_kl_of_option", known)
  monkeypatch.setattr(protocol, "estimate", estimated)
  monkeypatch.setattr(cffn, "RATIOS", (0.25, 0.5))
  report = vc.measure(model, tiny.init(model, spread=0.5), np.asarray(tiny.images(model, batch=8)))
  pruned = len(protocol.options(vc.HeadPruning, model.submodules()["blocks_0"].site))
  times = {(name, kind): 1 for name in ("blocks_1", "blocks_4")
           for kind in (vc.HMHSA, vc.HeadPruning, vc.CFFN)}
  assert pruned > 1 and collections.Counter(tried) == {
      **times, ("blocks_1", vc.HeadPruning): pruned}
  for row in report.blocks:
    for option in row["options"]:
      expected = units(option.method, option.error) * np.exp(depths[row["name"]])
      assert option.kl == pytest.approx(expected * scales[row["name"]][option.axis], rel=1e-4)


def test_a_quick_report_tries_one_reducer_of_each_class(measured, monkeypatch):
  looking = importlib.import_module("vitcompact.measure")
  model, variables, x, _ = measured
  monkeypatch.setattr(looking._Measurement, "_kl_of_option", lambda *_: 1.0)
  monkeypatch.setattr(looking._Measurement, "_kl_of_reducer", lambda *_: 1.0)
  found = vc.measure(model, variables, x).tokens
  for kind in (vc.ToMe, vc.EViT, vc.MCTF):
    options = [option for option in found if isinstance(option.method, kind)]
    assert [option.kl for option in options if option.measured] == [1.0]
    assert len({option.kl for option in options}) == len(options)
  evit = {option.method.keep: option.kl for option in found if isinstance(option.method, vc.EViT)}
  # Of 16 patches, 0.7 leaves 13 and then 11, and 0.5 leaves 9 and then 6, the fused one included.
  assert evit[0.5] / evit[0.7] == pytest.approx((17 / 8) ** looking.KL_EXPONENT)


def test_images_are_split_among_devices_with_the_result_of_one_device(measured, monkeypatch):
  model, variables, x, report = measured
  assert len(batches.shard_images(x[:16]).sharding.device_set) == 8 == jax.local_device_count()
  even, odd = (batches.shard_images(x[:count]) for count in (16, 15))
  assert {shard.data.shape[0] for shard in even.addressable_shards} == {2}
  assert {shard.data.shape[0] for shard in odd.addressable_shards} == {15}
  monkeypatch.setattr(cffn, "RATIOS", (0.25, 0.5))
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)
  assert batches.shard_images(x) is x
  unmeasured = vc.measure(model, variables, x, sensitivity="none")
  for row, expected in zip(unmeasured.blocks, report.blocks, strict=True):
    for option, other in zip(row["options"], expected["options"], strict=True):
      assert option.error == pytest.approx(other.error, rel=1e-4), option


@pytest.mark.parametrize("share", [0.85, 0.7, 0.55])
def test_the_counted_cost_of_a_plan_meets_its_budget(measured, share):
  model, _, _, report = measured
  plan = report.plan(macs=share)
  explained, dense = report.explain(plan), vc.count(model)
  small = vc.count(model.clone(plan=plan, deploy=True))
  assert small.macs <= share * dense.macs
  assert explained.macs == pytest.approx(small.macs / dense.macs, abs=2e-3)
  assert explained.params == pytest.approx(small.params / dense.params, abs=2e-3)
  assert report.plan(macs=share) == plan and str(report.explain(plan)) == str(explained)
  assert vc.Plan.from_json(plan.to_json()) == plan


def test_a_smaller_budget_has_no_smaller_predicted_loss(measured):
  report = measured[3]
  costs = [report.explain(report.plan(params=share)).kl for share in (0.95, 0.8, 0.7)]
  assert costs == sorted(costs)


@pytest.mark.parametrize("goal", [{"macs": 0.7}, {"params": 0.8}], ids=["macs", "params"])
def test_runners_up_reach_the_same_goal_and_are_no_better(measured, goal):
  report = measured[3]
  found = report.explain(report.plan(**goal), **goal)
  assert not found.missed and found.steps
  assert all(step.more > -1e-6 for step in found.steps), found


def test_a_plan_that_misses_a_goal_is_explained_as_such(measured):
  report = measured[3]
  found = report.explain(report.plan(macs=0.85), macs=0.55)
  assert found.missed == "macs=0.55" and "does not reach macs=0.55" in str(found)
  assert not report.explain(report.plan(macs=0.85), macs=0.85).missed


def test_the_kl_of_a_reducer_is_called_inferred_if_it_was_not_measured(measured):
  report, known = measured[3], measured[3].tokens[0]
  for is_measured in (True, False):
    other = dataclasses.replace(report, tokens=(known._replace(measured=is_measured),))
    step = other.explain(vc.Plan(tokens=known.method)).steps[0]
    assert step.block == "all" and step.measured == is_measured


def test_a_plan_can_be_limited_to_some_axes(measured):
  plan = measured[3].plan(macs=0.8, axes=("ffn",))
  assert {method.axis for method in plan.methods()} == {"ffn"}


def test_an_unreachable_budget_names_the_nearest(measured):
  with pytest.raises(ValueError, match=r"macs=0\.01: no plan of ffn goes below macs=0\.\d+"):
    measured[3].plan(macs=0.01, axes=("ffn",))
  with pytest.raises(ValueError) as error:
    measured[3].plan(macs=0.01)
  measured[3].plan(macs=float(str(error.value).rpartition("=")[2]))


def test_the_knapsack_finds_the_best_of_all_choices():
  rng = np.random.default_rng(0)
  choices = {name: [Choice({}, 0.0, 0.0, 0), *(Choice({}, kl, saved, 0) for kl, saved in
                                               zip(rng.random(3), rng.integers(1, 9, 3) * 10.0,
                                                   strict=True))] for name in "abcd"}
  search = Knapsack(choices, 2000.0)
  for need in (10.0, 60.0, 150.0):
    picks, kl = search.best(need)
    ways = [(sum(choices[n][i].kl for n, i in zip("abcd", way, strict=True)), way)
            for way in itertools.product(range(4), repeat=4)
            if sum(choices[n][i].saved for n, i in zip("abcd", way, strict=True)) >= need]
    assert kl == pytest.approx(min(ways)[0])
    assert sum(choices[n][i].saved for n, i in picks.items()) >= need
  assert search.best(search.most_saved() + 1) is None
  forbidden = search.best(60.0, forbidden=("a", search.best(60.0)[0]["a"]))
  assert forbidden[1] >= search.best(60.0)[1]


def test_the_costs_of_blocks_add_up_to_the_models_cost(measured):
  model, _, _, report = measured
  plan = vc.Plan(blocks={0: {"heads": vc.HMHSA(real_heads=2), "ffn": vc.CFFN(rank_ratio=0.25)}})
  saved = sum(report.costs.saved("blocks_0", {axis: method})[0]
              for axis, method in plan.blocks[0].items())
  small = vc.count(model.clone(plan=plan, deploy=True)).macs
  assert vc.count(model).macs - small == saved
  assert report.costs.at("blocks_0", BlockMethods(**plan.blocks[0]))[0] == (
      report.costs.at("blocks_0", BlockMethods())[0] - saved)


def options_of(model, kl=1e-3, reducers=(vc.ToMe,)):
  """Returns a report on a model with every possible option, all with the same KL."""
  rows = []
  for name, module in model.submodules().items():
    options = [Option(axis, method, None, kl, True) for axis in ("heads", "attention", "ffn")
               for kind in vc.METHODS[axis].values()
               for method in protocol.options(kind, module.site)]
    rows.append({"name": name, "tokens": module.site.tokens, "options": tuple(options),
                 "tables": {}})
  site = next(iter(model.submodules().values())).site
  reducers = tuple(Option("tokens", method, None, kl, True)
                   for kind in reducers for method in protocol.options(kind, site))
  count = vc.count(model)
  return vc.Report("0", model.variant, described_fields(model), "0" * 64, 8, "", "full",
                   count.params, count.macs, tuple(rows), reducers)


def test_skipped_reducers_could_not_have_won(monkeypatch):
  """The search skips reducers that alone lose as much as the best plan found so far."""
  monkeypatch.setattr(cffn, "RATIOS", (0.25, 0.5))
  rng, searched, searches = np.random.default_rng(0), [], 0
  bare = options_of(tiny.deit(), reducers=(vc.ToMe, vc.EViT, vc.MCTF))

  def drawn(options, scale):
    return tuple(option._replace(kl=float(scale * rng.random())) for option in options)

  search = vc.Report._search
  monkeypatch.setattr(vc.Report, "_search", lambda self, *key: (
      searched.append(key[1]), search(self, *key))[1])
  for share in (0.9, 0.7, 0.5):
    report = dataclasses.replace(bare, tokens=drawn(bare.tokens, 0.5), blocks=tuple(
        {**row, "options": drawn(row["options"], 0.5)} for row in bare.blocks))
    best = np.inf
    for reducer, kl in ((None, 0.0), *((option.method, option.kl) for option in report.tokens)):
      one = search(report, "macs", reducer, ("heads", "attention", "ffn", "tokens"))
      found = one.knapsack.best((1 - share - one.saved) * one.total)
      best = min(best, np.inf if found is None else found[1] + kl)
    searched.clear()
    plan = report.plan(macs=share)
    searches += len(searched)
    assert report.explain(plan).kl == pytest.approx(best, rel=1e-6)
  assert 3 <= searches < 3 * (1 + len(bare.tokens))


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_at_197_tokens_the_search_includes_block_attention_and_reducers(share, monkeypatch):
  monkeypatch.setattr(cffn, "RATIOS", (0.25, 0.5))
  model = vc.create_model("deit_tiny_patch16_224", depth=2, width=24, heads=4, num_classes=5)
  report = options_of(model)
  for axes in (("heads", "attention"), ("heads", "attention", "ffn", "tokens")):
    try:
      plan = report.plan(macs=share, axes=axes)
    except ValueError as error:
      assert "goes below macs=" in str(error)
      continue
    small = vc.count(model.clone(plan=plan, deploy=True)).macs / vc.count(model).macs
    assert small <= share
    assert report.explain(plan).macs == pytest.approx(small, abs=2e-3)


def test_an_option_that_is_inactive_after_a_reducer_saves_nothing():
  model = vc.create_model("deit_tiny_patch16_224", depth=2, width=24, heads=4, num_classes=5)
  report = options_of(model)
  for reducer, first in ((None, True), (report.tokens[0].method, True)):
    choices = report._search("macs", reducer, ("attention",)).choices
    assert (len(choices["blocks_0"]) > 1) == first
    assert (len(choices["blocks_1"]) > 1) == (reducer is None)
  fewer = BlockMethods(attention=vc.Sparsifiner(granularity="block", min_tokens=0))
  at = report.costs.at
  assert 0 < at("blocks_0", fewer, tokens=100)[0] < at("blocks_0", fewer)[0]


def test_incompatible_options_are_not_offered_together():
  """Regions need the whole grid, and give up the token order that head filters act along."""
  model = vc.create_model("deit_tiny_patch16_224", depth=1, width=24, heads=4, num_classes=5)
  report, pairs = options_of(model), {}
  for reducer in (None, report.tokens[0].method):
    choices = report._search("macs", reducer, ("heads", "attention")).choices["blocks_0"]
    pairs[reducer is None] = {tuple(type(option.method) for option in choice.options.values())
                              for choice in choices}
    for choice in choices:
      methods = {axis: option.method for axis, option in choice.options.items()}
      model.clone(plan=vc.Plan(tokens=reducer, blocks={0: methods})).check()
  pruned = (vc.HeadPruning,)
  assert pairs[True] == {(), (vc.HMHSA,), (vc.Sparsifiner,), (vc.BiFormer,), pruned,
                         (vc.HMHSA, vc.Sparsifiner), (*pruned, vc.Sparsifiner),
                         (*pruned, vc.BiFormer)}
  assert (vc.BiFormer,) not in pairs[False]


def test_heads_and_attention_are_counted_together():
  model = vc.create_model("deit_tiny_patch16_224", depth=1, width=24, heads=4, num_classes=5)
  methods = {"heads": vc.HMHSA(), "attention": vc.Sparsifiner(keep=0.25, granularity="block")}
  saved = options_of(model).costs.saved("blocks_0", methods)[0]
  small = model.clone(plan=vc.Plan(blocks={0: methods}), deploy=True)
  assert vc.count(model).macs - vc.count(small).macs == saved


def test_a_report_survives_json(measured):
  report = measured[3]
  assert vc.Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("spoil", [
    lambda tree: tree.pop("blocks"), lambda tree: tree.update(model="no_model"),
    lambda tree: tree["blocks"][0]["options"][0].update(method={"method": "hmhsa", "rank": -1}),
    lambda tree: tree["blocks"][0].pop("tables"), lambda tree: tree.update(fields=3),
    lambda tree: tree["tokens"].append(7), lambda tree: tree.update(params=0),
    lambda tree: tree["blocks"][0].update(name="blocks_7"), lambda tree: tree["blocks"].clear(),
    lambda tree: tree["blocks"][0]["options"][0].update(kl="abc"),
    lambda tree: tree["blocks"][0]["options"][0].update(kl=-5),
    lambda tree: tree["blocks"][0]["options"][0].update(kl=float("nan")),
    lambda tree: tree.update(sensitivity="banana")])
def test_a_damaged_report_gives_one_clear_error(measured, spoil):
  tree = json.loads(measured[3].to_json())
  spoil(tree)
  with pytest.raises(ValueError, match="not a report of vitcompact") as error:
    vc.Report.from_json(json.dumps(tree))
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="not a report"):
    vc.Report.from_json("[" * 100_000)


def test_a_report_with_a_row_that_lacks_a_key_names_it(measured):
  tree = json.loads(measured[3].to_json())
  del tree["blocks"][0]["options"]
  with pytest.raises(ValueError, match="a block or an option lacks key 'options'; measure again"):
    vc.Report.from_json(json.dumps(tree))


def test_requests_beyond_a_report_are_refused_by_name(measured):
  report = measured[3]
  with pytest.raises(ValueError, match="has not tried ToMe"):
    report.explain(vc.Plan(tokens=vc.ToMe(r=11)))
  with pytest.raises(ValueError, match="blocks_0: this report has not tried CFFN"):
    report.explain(vc.Plan(ffn=vc.CFFN(rank_ratio=0.11)))
  with pytest.raises(ValueError, match="the plan names block 7"):
    report.explain(vc.Plan(blocks={7: {"ffn": vc.CFFN()}}))
  with pytest.raises(ValueError, match="give one of macs, params, speedup, latency_ms"):
    report.plan()
  with pytest.raises(ValueError, match="must be a share"):
    report.plan(macs=70)
  for axes in ("heads", (), ("head",)):
    with pytest.raises(ValueError, match="must be a tuple of one or more of heads"):
      report.plan(macs=0.8, axes=axes)
  with pytest.raises(ValueError, match="sensitivity='none'"):
    dataclasses.replace(report, sensitivity="none").plan(macs=0.5)
  with pytest.raises(ValueError, match="measure again"):
    report.check_model(measured[0], "another")


def test_a_share_of_heads_is_explained_like_the_number(measured):
  report = measured[3]
  for half, number in ((vc.HMHSA(), vc.HMHSA(real_heads=2)),
                       (vc.HeadPruning(), vc.HeadPruning(kept_heads=2))):
    explained = [report.explain(vc.Plan(heads=method)).steps for method in (half, number)]
    assert explained[0] == explained[1] != ()


def test_attention_to_blocks_of_tokens_is_the_sum_over_their_tokens():
  """On a grid of 16 x 16 patches, which is four blocks, after a class token."""
  site = Site(0, 1, 8, 8, 8, query_grid=(16, 16), key_grid=(16, 16), prefix=1, tokens=257)
  maps = np.random.default_rng(0).dirichlet(np.full(257, 0.01), size=(1, 1, 257))
  grid = maps[0, 0, 1:, 1:].reshape(2, 8, 2, 8, 2, 8, 2, 8)
  mass = np.sort(grid.sum(axis=(1, 3, 5, 7)).reshape(4, 4), axis=1)[:, ::-1]
  expected = np.cumsum((mass / mass.sum(axis=1, keepdims=True)).mean(axis=0))
  (got,) = block_attention_table(maps, site).values()
  assert np.allclose(got, expected[[0, 0, 0, 1, 2, 3]], atol=1e-4) and 1 / 4 < got[0] < 0.3
  assert block_attention_table(maps[..., :50, :50], site._replace(
      query_grid=(7, 7), key_grid=(7, 7))) == {}


def test_a_long_data_loader_is_read_until_memory_is_full(monkeypatch):
  model, read = tiny.deit(), []
  monkeypatch.setattr(batches, "MOST_VALUES", 3 * 4 * 32 * 32 * 3 - 1)

  def loader():
    for _ in range(9):
      read.append(np.random.default_rng(len(read)).standard_normal((4, 32, 32, 3)))
      yield read[-1]

  with pytest.warns(UserWarning, match="only the first 12 images were read"):
    joined = batches.join_batches(model, loader())
  assert joined.dtype == np.float32 and len(read) == 3
  np.testing.assert_array_equal(joined, np.float32(np.concatenate(read)))


BATCH = np.zeros((2, 32, 32, 3), np.float32)


@pytest.mark.parametrize("images, words", [
    ((BATCH, np.arange(2)), r"a tuple was given; .* images=batch\[0\]"),
    ([(BATCH, np.arange(2))], r"a batch is a tuple; .* images=\(batch\[0\] for batch in loader\)"),
    ([{"image": BATCH}], r'a batch is a dict; .*\(batch\["image"\] for batch in loader\)'),
    (list(BATCH), r"an item of shape \(32, 32, 3\) is a single image, .* np.stack\(images\)"),
    ([], "there are no batches")])
@pytest.mark.parametrize("verb", [
    vc.measure, lambda *of: vc.compact(*of[:2], vc.Plan(ffn=vc.CFFN()), of[2])],
    ids=["measure", "compact"])
def test_iterables_of_other_things_than_batches_of_images_are_refused(verb, images, words):
  model = tiny.deit()
  with pytest.raises(ValueError, match=words) as error:
    verb(model, tiny.init(model), images)
  assert "\n" not in str(error.value)


def test_images_of_one_class_cause_a_warning():
  model = tiny.deit(drop_path_rate=0.0)
  variables = tiny.init(model, spread=0.5)
  one = np.repeat(np.asarray(tiny.images(model, batch=1)), 48, axis=0)
  with pytest.warns(UserWarning, match="sees only 1 of its 5 classes in the 48"):
    vc.measure(model, variables, one, sensitivity="none")


@pytest.mark.parametrize("verb", [
    lambda *of: vc.measure(*of, sensitivity="none"),
    lambda model, variables, images: vc.compact(model, variables, vc.Plan(ffn=vc.CFFN()), images)],
    ids=["measure", "compact"])
def test_unsuitable_images_and_weights_are_noticed(verb):
  """Pixels in 0..1, one image many times, and weights that are NaN."""
  model = tiny.deit(drop_path_rate=0.0, depth=1)
  variables, images = tiny.init(model, spread=0.5), np.asarray(tiny.images(model, batch=16))
  with pytest.warns(UserWarning, match="from 0 to 1, like pixels that were not normalised"):
    verb(model, variables, (images - images.min()) / np.ptp(images))
  with pytest.warns(UserWarning, match="the 16 images are all the same"):
    verb(model, variables, np.repeat(images[:1], 16, axis=0))
  broken = jax.tree.map(lambda leaf: leaf * np.nan, variables)
  with pytest.raises(ValueError, match="holds NaN or infinity: nothing can be fitted"):
    verb(model, broken, images)


@pytest.mark.parametrize("change,words", [
    (dict(sensitivity="most"), "must be one of none, quick, full"),
    (dict(images=np.zeros((2, 3))), "images of shape"), (dict(images=None), "None was given"),
    (dict(images=[]), "there are no batches"),
    (dict(images=[np.zeros((2, 32, 32, 3)), np.zeros((1, 16, 16, 3))]), "give images of one size"),
    (dict(images=[[1.0]]), "a batch is a list"),
    (dict(images=np.full((8, 32, 32, 3), 255, np.float32)), "values of the images reach 255"),
    (dict(images=np.full((8, 32, 32, 3), np.nan, np.float32)), "8 of 8 images hold NaN"),
    (dict(variables={"params": {}}), "do not fit")])
def test_impossible_measurements_are_refused(measured, change, words):
  model, variables, x, _ = measured
  with pytest.raises(ValueError, match=words):
    vc.measure(model, **{"variables": variables, "images": x, **change})
