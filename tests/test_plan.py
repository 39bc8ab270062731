"""Plan: a value that is checked when made and goes to JSON and back."""
import json

import pytest

import vitcompact as vc

PLANS = [
    vc.Plan(), vc.Plan(heads=vc.HMHSA()), vc.Plan(ffn=vc.CFFN(rank_ratio=0.25, branches=1)),
    vc.Plan(heads=vc.HMHSA(layout="grid", rank=2, real_heads=3), ffn=vc.CFFN(factor="both"),
            blocks={11: {"heads": None}, 2: {"ffn": vc.CFFN(rep="scale"), "heads": vc.HMHSA()}}),
    vc.Plan(links=vc.Sparsifiner(keep=0.5, coefficients=0.05),
            blocks={0: {"links": vc.Sparsifiner(granularity="block")}, 1: {"links": None}}),
]


@pytest.mark.parametrize("plan", PLANS)
def test_json_both_ways(plan):
  assert vc.Plan.from_json(plan.to_json()) == plan
  assert hash(vc.Plan.from_json(plan.to_json())) == hash(plan)


def test_overrides_replace_the_default_axis_by_axis():
  plan = PLANS[3]
  assert plan.at(0)[:3] == (plan.heads, None, plan.ffn)
  assert plan.at(11)[:3] == (None, None, plan.ffn)
  assert plan.at(2)[:3] == (vc.HMHSA(), None, vc.CFFN(rep="scale"))


def test_json_is_the_readable_form():
  plan = vc.Plan(heads=vc.HMHSA(), blocks={7: {"heads": None}})
  assert json.loads(plan.to_json()) == {
      "heads": {"method": "hmhsa", "site": "probs", "rank": 1, "kernel": 3, "layout": "map",
                "real_heads": "half"},
      "blocks": {"7": {"heads": None}}}
  assert vc.Plan().to_json() == "{}"


def test_parse_takes_nothing_json_or_a_file(tmp_path):
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
    (lambda: vc.Plan.from_json("[" * 100_000), "must be JSON"),
    (lambda: vc.Plan.from_json('{"heads": {"method": ["hmhsa"]}}'), '"method"'),
    (lambda: vc.Plan.from_json('{"tokens": {"method": "evit", "keep": "x"}}'), "keep='x'"),
    (lambda: vc.Plan.from_json('{"tokens": {"method": "evit", "blocks": 3}}'), "blocks=3"),
    (lambda: vc.Plan.from_json('{"links": {"method": "sparsifiner", "keep": "x"}}'), "keep='x'"),
    (lambda: vc.Plan.from_json('{"blocks": {"1": {"tokens": null}}}'), "unknown name 'tokens'"),
    (lambda: vc.Plan.from_json("heads"), "must be JSON"),
    (lambda: vc.Plan.parse("nowhere/plan.json"), "nowhere/plan.json"),
    (lambda: vc.create_model("deit_tiny_patch16_224", plan=vc.Plan(blocks={12: {"heads": None}})),
     "blocks 0 to 11"),
    (lambda: vc.create_model("deit_tiny_patch16_224", plan=vc.Plan(heads=vc.HMHSA(real_heads=4))),
     "has only 3 heads"),
    (lambda: vc.create_model("deit_tiny_patch16_224", plan=vc.Plan(
        links=vc.Sparsifiner(), tokens=vc.MCTF(blocks=(3,)))), "use blocks={3: {'links': None}}"),
])
def test_a_wrong_plan_is_refused_in_one_line(make, words):
  with pytest.raises(ValueError) as error:
    make()
  assert words in str(error.value) and "\n" not in str(error.value)


def test_links_go_with_mctf_in_the_blocks_before_it():
  blocks = {block: {"links": None} for block in range(3, 12)}
  plan = vc.Plan(links=vc.Sparsifiner(), tokens=vc.MCTF(blocks=(3,)), blocks=blocks)
  parts = vc.create_model("deit_tiny_patch16_224", plan=plan).parts()
  linked = [block for block in range(12) if parts[f"blocks_{block}"].links is not None]
  assert linked == [0, 1, 2]


def test_with_links_changes_every_sparsifiner_and_nothing_else():
  plan = PLANS[-1].with_links(masked=False)
  assert plan.links == vc.Sparsifiner(keep=0.5, coefficients=0.05, masked=False)
  assert plan.at(0).links == vc.Sparsifiner(granularity="block", masked=False)
  assert plan.at(1).links is None and vc.Plan().with_links(masked=False) == vc.Plan()
