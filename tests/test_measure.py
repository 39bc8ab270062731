"""measure, reports and the plans that they propose."""
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
from vitcompact import calibration
from vitcompact.curvature import kl_per_error
from vitcompact.measure import described_fields, divergence
from vitcompact.methods import protocol
from vitcompact.methods.ffn import cffn
from vitcompact.plan import BlockMethods
from vitcompact.planner import Choice, Knapsack
from vitcompact.report import Option


@pytest.fixture(scope="module")
def measured():
  """(model, variables, images, a full report) of a tiny DeiT."""
  model = tiny.deit(drop_path_rate=0.0)
  variables, x = tiny.init(model, spread=0.5), np.asarray(tiny.images(model, batch=48))
  with pytest.MonkeyPatch.context() as patch:   # each rank is a program to compile
    patch.setattr(cffn, "RATIOS", (0.25, 0.5))
    return model, variables, x, vc.measure(model, variables, x, sensitivity="full")


def test_a_report_lists_options_of_every_axis_with_what_they_cost(measured):
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


def test_the_kl_of_an_option_is_that_of_the_model_with_it_alone(measured):
  """Against compact itself: the change in one block, on the images held out."""
  model, variables, x, report = measured
  option = next(option for option in report.blocks[1]["options"] if option.axis == "ffn")
  small, got = vc.compact(model, variables, vc.Plan(blocks={1: {"ffn": option.method}}), images=x)
  held = x[3::4]
  wanted = divergence(tiny.apply(model, variables, held), tiny.apply(small, got, held))
  assert option.kl == pytest.approx(wanted, rel=1e-3)


def test_more_heads_and_higher_ranks_are_estimated_to_lose_less(measured):
  for row in measured[3].blocks:
    for kind in (vc.HMHSA, vc.HeadPruning):
      errors = [option.error for option in row["options"] if isinstance(option.method, kind)]
      assert len(errors) > 1 and errors == sorted(errors, reverse=True)
    for factor in ("output", "both"):
      errors = [option.error for option in row["options"]
                if option.axis == "ffn" and option.method.factor == factor]
      assert errors == sorted(errors, reverse=True)


def test_a_quick_report_infers_what_it_did_not_try(measured, monkeypatch):
  model, variables, x, full = measured
  monkeypatch.setattr(cffn, "RATIOS", (0.25, 0.5))
  quick = vc.measure(model, variables, x, sensitivity="quick")
  scales = kl_per_error(model, variables, np.concatenate([x[3::4]]), 17 * 16)
  for kind in (vc.HMHSA, vc.HeadPruning, vc.CFFN):
    options = {row["name"]: [option for option in row["options"] if isinstance(option.method, kind)]
               for row in quick.blocks}
    (tried,) = (option for few in options.values() for option in few if option.measured)
    assert tried in options["blocks_1"]   # the middle one of two, rounded up
    same = next(o for o in full.blocks[1]["options"] if o.method == tried.method)
    assert tried.kl == pytest.approx(same.kl, rel=1e-3)
    for name, few in options.items():
      scale = scales[name][tried.axis] / scales["blocks_1"][tried.axis]
      for option in few:
        assert option.kl == pytest.approx(tried.kl * option.error / tried.error * scale, rel=1e-4)


def test_a_quick_report_infers_blocks_that_it_passed_over(monkeypatch):
  """Beyond what the curvature of its block says, KL grows e-fold a block between the two that are
  tried, and not outside; pruned heads are taken to have no estimate."""
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
  monkeypatch.setattr(looking, "kl_per_error", lambda *_: scales)
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
      wanted = units(option.method, option.error) * np.exp(depths[row["name"]])
      assert option.kl == pytest.approx(wanted * scales[row["name"]][option.axis], rel=1e-4)


def test_a_quick_report_tries_one_reducer_of_a_class(measured, monkeypatch):
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
  # 16 patches, in both blocks: 13 and 11 are left of 0.7, 9 and 6 of 0.5, the fused one with them.
  assert evit[0.5] / evit[0.7] == pytest.approx((17 / 8) ** looking.KL_EXPONENT)


def test_images_are_split_among_the_devices_and_give_the_same_as_on_one(measured, monkeypatch):
  model, variables, x, report = measured
  assert len(calibration.shard_images(x[:16]).sharding.device_set) == 8 == jax.local_device_count()
  even, odd = (calibration.shard_images(x[:count]) for count in (16, 15))
  assert {shard.data.shape[0] for shard in even.addressable_shards} == {2}
  assert {shard.data.shape[0] for shard in odd.addressable_shards} == {15}
  monkeypatch.setattr(cffn, "RATIOS", (0.25, 0.5))
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)
  assert calibration.shard_images(x) is x
  alone = vc.measure(model, variables, x, sensitivity="none")
  for row, wanted in zip(alone.blocks, report.blocks, strict=True):
    for option, other in zip(row["options"], wanted["options"], strict=True):
      assert option.error == pytest.approx(other.error, rel=1e-4), option


@pytest.mark.parametrize("share", [0.85, 0.7, 0.55])
def test_a_plan_meets_its_budget_as_it_was_counted(measured, share):
  model, _, _, report = measured
  plan = report.plan(macs=share)
  told, dense = report.explain(plan), vc.count(model)
  small = vc.count(model.clone(plan=plan, deploy=True))
  assert small.macs <= share * dense.macs
  assert told.macs == pytest.approx(small.macs / dense.macs, abs=2e-3)
  assert told.params == pytest.approx(small.params / dense.params, abs=2e-3)
  assert report.plan(macs=share) == plan and str(report.explain(plan)) == str(told)
  assert vc.Plan.from_json(plan.to_json()) == plan


def test_a_smaller_budget_is_predicted_to_lose_no_less(measured):
  report = measured[3]
  costs = [report.explain(report.plan(params=share)).kl for share in (0.95, 0.8, 0.7)]
  assert costs == sorted(costs)


def test_axes_may_be_left_out(measured):
  plan = measured[3].plan(macs=0.8, axes=("ffn",))
  assert {method.axis for method in plan.methods()} == {"ffn"}


def test_a_budget_beyond_reach_names_the_nearest(measured):
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


def test_costs_of_blocks_add_up_to_the_models(measured):
  model, _, _, report = measured
  plan = vc.Plan(blocks={0: {"heads": vc.HMHSA(real_heads=2), "ffn": vc.CFFN(rank_ratio=0.25)}})
  saved = sum(report.costs.saved("blocks_0", {axis: method})[0]
              for axis, method in plan.blocks[0].items())
  small = vc.count(model.clone(plan=plan, deploy=True)).macs
  assert vc.count(model).macs - small == saved
  assert report.costs.at("blocks_0", BlockMethods(**plan.blocks[0]))[0] == (
      report.costs.at("blocks_0", BlockMethods())[0] - saved)


def options_of(model, kl=1e-3, reducers=(vc.ToMe,)):
  """A report of a model with every option that it has, each of the same KL."""
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


def test_reducers_that_are_passed_over_could_not_have_won(monkeypatch):
  """Those that lose as much by themselves as the best plan so far are not searched."""
  monkeypatch.setattr(cffn, "RATIOS", (0.25, 0.5))
  rng, searched, asked = np.random.default_rng(0), [], 0
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
    asked += len(searched)
    assert report.explain(plan).kl == pytest.approx(best, rel=1e-6)
  assert 3 <= asked < 3 * (1 + len(bare.tokens))


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_at_197_tokens_blocks_of_attention_and_reducers_are_in_the_search(share, monkeypatch):
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


def test_under_a_reducer_an_option_that_no_longer_acts_saves_nothing():
  model = vc.create_model("deit_tiny_patch16_224", depth=2, width=24, heads=4, num_classes=5)
  report = options_of(model)
  for reducer, first in ((None, True), (report.tokens[0].method, True)):
    few = report._search("macs", reducer, ("attention",)).choices
    assert (len(few["blocks_0"]) > 1) == first
    assert (len(few["blocks_1"]) > 1) == (reducer is None)
  fewer = BlockMethods(attention=vc.Sparsifiner(granularity="block", min_tokens=0))
  at = report.costs.at
  assert 0 < at("blocks_0", fewer, tokens=100)[0] < at("blocks_0", fewer)[0]


def test_what_does_not_go_together_is_no_choice():
  """Regions need the whole grid, and take the line of tokens that filters of heads act along."""
  model = vc.create_model("deit_tiny_patch16_224", depth=1, width=24, heads=4, num_classes=5)
  report, pairs = options_of(model), {}
  for reducer in (None, report.tokens[0].method):
    few = report._search("macs", reducer, ("heads", "attention")).choices["blocks_0"]
    pairs[reducer is None] = {tuple(type(option.method) for option in choice.options.values())
                              for choice in few}
    for choice in few:
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


def test_a_report_goes_to_json_and_back(measured):
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
def test_a_spoilt_report_is_one_clear_error(measured, spoil):
  tree = json.loads(measured[3].to_json())
  spoil(tree)
  with pytest.raises(ValueError, match="not a report of vitcompact") as error:
    vc.Report.from_json(json.dumps(tree))
  assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="not a report"):
    vc.Report.from_json("[" * 100_000)


def test_what_a_report_does_not_know_is_named(measured):
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
  with pytest.raises(ValueError, match="sensitivity='none'"):
    dataclasses.replace(report, sensitivity="none").plan(macs=0.5)
  with pytest.raises(ValueError, match="measure again"):
    report.check_of(measured[0], "another")


def test_images_of_one_class_are_noticed():
  model = tiny.deit(drop_path_rate=0.0)
  variables = tiny.init(model, spread=0.5)
  one = np.repeat(np.asarray(tiny.images(model, batch=1)), 48, axis=0)
  with pytest.warns(UserWarning, match="of few classes: the model sees 1 of 5"):
    vc.measure(model, variables, one, sensitivity="none")


@pytest.mark.parametrize("change,words", [
    (dict(sensitivity="most"), "must be one of none, quick, full"),
    (dict(images=np.zeros((2, 3))), "images of shape"), (dict(images=None), "None was given"),
    (dict(images=[]), "None was given"), (dict(images=[[1.0]]), "a batch of images: a list"),
    (dict(images=np.full((8, 32, 32, 3), 255, np.float32)), "values of the images reach 255"),
    (dict(images=np.full((8, 32, 32, 3), np.nan, np.float32)), "8 of 8 images hold NaN"),
    (dict(variables={"params": {}}), "do not fit")])
def test_what_cannot_be_measured_is_refused(measured, change, words):
  model, variables, x, _ = measured
  with pytest.raises(ValueError, match=words):
    vc.measure(model, **{"variables": variables, "images": x, **change})
