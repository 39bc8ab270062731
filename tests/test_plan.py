"""Plan: a value that is checked when created and survives JSON."""
import dataclasses
import json
import warnings

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

import vitcompact as vc
from tests import tiny
from vitcompact.methods import METHODS
from vitcompact.plan import upgraded

PLANS = [
    vc.Plan(), vc.Plan(heads=vc.HMHSA()), vc.Plan(ffn=vc.CFFN(rank_ratio=0.25, branches=1)),
    vc.Plan(heads=vc.HMHSA(layout="grid", rank=2, real_heads=3), ffn=vc.CFFN(factor="both"),
            blocks={11: {"heads": None}, 2: {"ffn": vc.CFFN(rep="scale"), "heads": vc.HMHSA()}}),
    vc.Plan(attention=vc.Sparsifiner(keep=0.5, coefficients=0.05),
            blocks={0: {"attention": vc.Sparsifiner(granularity="block")}, 1: {"attention": None}}),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_survives_json(plan):
  assert vc.Plan.from_json(plan.to_json()) == plan
  assert hash(vc.Plan.from_json(plan.to_json())) == hash(plan)


def test_block_overrides_replace_the_default_axis_by_axis():
  plan = PLANS[3]
  assert plan.planned(0) == (plan.heads, None, None, plan.ffn)
  assert plan.planned(11) == (None, None, None, plan.ffn)
  assert plan.planned(2) == (vc.HMHSA(), None, None, vc.CFFN(rep="scale"))


def test_the_json_of_a_plan_is_readable():
  plan = vc.Plan(heads=vc.HMHSA(), blocks={7: {"heads": None}})
  assert json.loads(plan.to_json()) == {
      "heads": {"method": "hmhsa", "site": "probs", "rank": 1, "kernel": 3, "layout": "map",
                "real_heads": "half"},
      "blocks": {"7": {"heads": None}}}
  assert vc.Plan().to_json() == "{}"


def test_parse_accepts_nothing_json_or_a_file(tmp_path):
  assert vc.Plan.parse("") == vc.Plan()
  assert vc.Plan.parse('{"heads": {"method": "hmhsa"}}') == vc.Plan(heads=vc.HMHSA())
  (tmp_path / "plan.json").write_text(PLANS[-1].to_json())
  assert vc.Plan.parse(str(tmp_path / "plan.json")) == PLANS[-1]


@pytest.mark.parametrize("make,words", [
    (lambda: vc.Plan(heads=vc.CFFN()), "use HMHSA"),
    (lambda: vc.Plan(blocks={"7": {}}), "numbered 0"),
    (lambda: vc.Plan(blocks={-1: {}}), "numbered 0"),
    (lambda: vc.Plan(blocks={7: None}), "dict of axes"),
    (lambda: vc.Plan(blocks=[7]), "must be a dict"),
    (lambda: vc.Plan(blocks={7: {"head": None}}), "did you mean 'heads'"),
    (lambda: vc.Plan.from_json('{"hedas": null}'), "did you mean 'heads'"),
    (lambda: vc.Plan.from_json('{"heads": {"method": "hmsa"}}'), "did you mean 'hmhsa'"),
    (lambda: vc.Plan.from_json('{"heads": {"method": "hmhsa", "rnk": 2}}'), "did you mean 'rank'"),
    (lambda: vc.Plan.from_json('{"heads": "hmhsa"}'), '"method"'),
    (lambda: vc.Plan.from_json('{"blocks": {"x": {}}}'), "not a block number"),
    (lambda: vc.Plan.from_json('{"blocks": {"1": 3}}'), "must be an object"),
    (lambda: vc.Plan.from_json("[]"), "must be a JSON object"),
    (lambda: vc.Plan.from_dict([1]), "must be a dict of axes"),
    (lambda: vc.Plan.parse("a/nowhere.json"), "no such file"),
    (lambda: vc.Plan.parse("a" * 5000 + ".json"), "give a path to a JSON plan"),
    (lambda: vc.Plan.from_json('{"tokens": {"method": "evit", "blocks": [[1], {"a": 2}]}}'),
     "different block numbers"),
    (lambda: vc.Plan.from_json('{"tokens": {"method": "mctf", "pooling": [{}]}}'), "pooling"),
    (lambda: vc.Plan.from_json('{"ffn": {"method": "cffn", "rank_ratio": "x"}}'), "rank_ratio"),
    (lambda: vc.Plan.from_json('{"ffn": {"method": "cffn", "rank_ratio": true}}'), "rank_ratio"),
    (lambda: vc.Plan.from_json("[" * 100_000), "must be JSON"),
    (lambda: vc.Plan.from_json('{"heads": {"method": ["hmhsa"]}}'), '"method"'),
    (lambda: vc.Plan.from_json('{"tokens": {"method": "evit", "keep": "x"}}'), "keep='x'"),
    (lambda: vc.Plan.from_json('{"tokens": {"method": "evit", "blocks": 3}}'), "blocks=3"),
    (lambda: vc.Plan.from_json('{"attention": {"method": "sparsifiner", "keep": "x"}}'),
     "keep='x'"),
    (lambda: vc.Plan.from_json('{"blocks": {"1": {"tokens": null}}}'), "unknown name 'tokens'"),
    (lambda: vc.Plan.from_json("heads"), "must be JSON"),
    (lambda: vc.Plan.parse("nowhere/plan.json"), "nowhere/plan.json"),
    (lambda: vc.create_model("deit_tiny_patch16_224", plan=vc.Plan(blocks={12: {"heads": None}})),
     "blocks 0 to 11"),
    (lambda: vc.create_model("deit_tiny_patch16_224", plan=vc.Plan(heads=vc.HMHSA(real_heads=4))),
     "has only 3 heads"),
    (lambda: vc.create_model("deit_tiny_patch16_224", plan=vc.Plan(
        attention=vc.Sparsifiner(), tokens=vc.MCTF(blocks=(3,)))),
     "use blocks={3: {'attention': None}}"),
    (lambda: vc.create_model("deit_tiny_patch16_224", plan=vc.Plan(
        heads=vc.HMHSA(layout="grid"), tokens=vc.EViT(blocks=(2, 5)))),
     "in block 2 needs the whole grid of tokens, which EViT("),
    (lambda: vc.create_model("deit_tiny_patch16_224", plan=vc.Plan(
        heads=vc.HMHSA(site="logits"),
        attention=vc.Sparsifiner(granularity="block", min_tokens=0))),
     "removes; use site='probs', or granularity='token'"),
    (lambda: vc.create_model("pvt_tiny", plan=vc.Plan(tokens=vc.ToMe())),
     "needs tokens that may be dropped or merged, which pvt_tiny does not have"),
])
def test_a_wrong_plan_is_refused_in_one_line(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


def test_incompatible_methods_may_share_a_plan_in_different_blocks():
  blocks = {block: {"attention": None} for block in range(3, 12)}
  plan = vc.Plan(attention=vc.Sparsifiner(), tokens=vc.MCTF(blocks=(3,)), blocks=blocks)
  model = vc.create_model("deit_tiny_patch16_224", plan=plan)
  masked = [site.block for site in model.sites() if plan.at(site).attention is not None]
  assert masked == [0, 1, 2]
  grid = vc.Plan(heads=vc.HMHSA(layout="grid"), tokens=vc.EViT(blocks=(3,)),
                 blocks={block: {"heads": vc.HMHSA()} for block in range(3, 12)})
  vc.create_model("deit_tiny_patch16_224", plan=grid)


def test_inactive_methods_are_absent_in_a_block_and_so_written_out():
  plan = vc.Plan(attention=vc.Sparsifiner(min_tokens=150), tokens=vc.EViT(keep=0.5, blocks=(4,)),
                 ffn=vc.CFFN(apply_to="attention_blocks"))
  sites = vc.create_model("deit_tiny_patch16_224", plan=plan).sites()
  assert [plan.at(site).attention is not None for site in sites] == [True] * 5 + [False] * 7
  written = plan.written_out(sites)
  assert written.blocks == {block: {"attention": None} for block in range(5, 12)}
  assert [written.at(site) for site in sites] == [plan.at(site) for site in sites]
  hybrid = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN(apply_to="attention_blocks"))
  sites = vc.create_model("nextvit_small", plan=hybrid).sites()
  acting = [site.block for site in sites if hybrid.at(site).present()]
  assert acting == [site.block for site in sites if "attention" in site.provides] != []


def test_sizes_that_depend_on_the_image_can_be_written_out():
  plan = vc.Plan(attention=vc.Sparsifiner(reduce_n=6), blocks={2: {"attention": None}})
  sites = vc.create_model("deit_tiny_patch16_224", plan=plan).sites()
  assert plan.at_size(sites).at(sites[0]).attention.rank == 197 // 6
  assert plan.at_size(sites).at(sites[2]).attention is None
  plan = vc.Plan(attention=vc.Sparsifiner())
  assert plan.at_size(sites) == vc.Plan(attention=vc.Sparsifiner(rank=197 // 6))
  stages = vc.create_model("pvt_tiny", plan=plan).sites()     # 49 keys, and 50 in the last stage
  assert plan.at_size(stages).at(stages[0]).attention.rank == 8


def test_map_applies_to_every_method_and_leaves_none_alone():
  plan = PLANS[-1].map(vc.Sparsifiner.first_phase.method)
  assert plan.attention == vc.Sparsifiner(keep=0.5, coefficients=0.05, masked=False)
  assert plan.planned(0).attention == vc.Sparsifiner(granularity="block", masked=False)
  assert plan.planned(1).attention is None and vc.Plan().map(lambda method: 1 / 0) == vc.Plan()


def test_older_plans_still_parse():
  old = {"links": {"method": "sparsifiner", "keep": 0.5}, "backends": {"1": "tiled"},
         "at_a_time": 4, "ffn": {"method": "cffn", "merged": []},
         "blocks": {"0": {"links": None}, "1": {"ffn": {"method": "cffn", "merged": ["fc2"]}}}}
  expected = vc.Plan(attention=vc.Sparsifiner(keep=0.5), ffn=vc.CFFN(),
                     blocks={0: {"attention": None}, 1: {"ffn": vc.CFFN()}})
  assert vc.Plan.from_json(json.dumps(old)) == expected
  assert upgraded(old)[1] == {"attention": {"1": "tiled"}, "chunk": 4,
                            "merged": {None: [], "1": ["fc2"]}}
  today = json.loads(expected.to_json())
  assert upgraded(today) == (today, {})


# What a plan's file may contain: existing and unknown names, values of every type.
SCALARS = (st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.text(max_size=3) |
           st.sampled_from(["grid", "map", "block", "code", "both", "mean", "bn", "none", "max"]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=2), inner, max_size=2), max_leaves=4)


@st.composite
def specs(draw, axis, values=VALUES):
  """Draws a method of an axis as in a plan's JSON, with a few fields, valid or not."""
  name, kind = draw(st.sampled_from(sorted(METHODS[axis].items(), key=lambda item: item[0])))
  fields = [field.name for field in dataclasses.fields(kind)]
  # One in nine draws is not a method at all.
  if draw(st.integers(0, 8)) == 8:
    return draw(VALUES)
  chosen = draw(st.dictionaries(st.sampled_from(fields), values, max_size=3)) if fields else {}
  return {"method": name, **chosen}


def sensible(field):
  """Draws values of a field's own type, small enough to trace."""
  default = field.default
  if isinstance(default, bool):
    return st.booleans()
  if isinstance(default, int):
    return st.integers(0, 9)
  if isinstance(default, float):
    return st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0])
  if isinstance(default, tuple) or field.name == "blocks":
    return st.lists(st.integers(0, 2), min_size=1, max_size=2)
  return st.just(default) | st.sampled_from(["grid", "block", "code", "both", "mean", "max"])


@st.composite
def plausible(draw, axis):
  name, kind = draw(st.sampled_from(sorted(METHODS[axis].items(), key=lambda item: item[0])))
  fields = draw(st.lists(st.sampled_from(dataclasses.fields(kind)), max_size=2,
                         unique_by=lambda field: field.name)) if dataclasses.fields(kind) else []
  return {"method": name, **{field.name: draw(sensible(field)) for field in fields}}


def trees_of(make):
  """Draws a plan's dict with methods drawn by `make(axis)`."""
  axes = {axis: make(axis) for axis in METHODS}
  blocks = st.dictionaries(st.sampled_from(["0", "1"]), st.fixed_dictionaries(
      {}, optional={axis: st.none() | axes[axis] for axis in ("heads", "attention", "ffn")}),
                           max_size=2)
  return st.fixed_dictionaries({}, optional={**axes, "blocks": blocks})


def value_or_refusal(call):
  """Returns a call's value, or None if it refuses in one line; other exceptions propagate."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return call()
  except ValueError as error:
    assert str(error) and "\n" not in str(error), error
    return None


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(trees_of(specs) | VALUES | st.dictionaries(st.text(max_size=5), VALUES))
def test_any_json_is_a_plan_or_is_refused_in_one_line(tree):
  text = json.dumps(tree)
  value_or_refusal(lambda: vc.Plan.from_dict(tree))
  value_or_refusal(lambda: vc.Plan.parse(tree))
  value_or_refusal(lambda: vc.Plan.parse(text[:-1]))
  plan = value_or_refusal(lambda: vc.Plan.parse(text))
  if plan is not None and text == text.replace("NaN", "").replace("Infinity", ""):
    assert vc.Plan.from_json(plan.to_json()) == plan


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(trees_of(plausible), st.booleans())
def test_any_plan_gives_a_model_or_is_refused_in_one_line(tree, deploy):
  def make():
    return tiny.deit(vc.Plan.from_dict(tree), depth=3, deploy=deploy)

  if (model := value_or_refusal(make)) is not None:
    x = tiny.images(model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.eval_shape(model.apply, shapes, x).shape == (3, 5)
