"""A config is what its file says, with the changes of the command line."""
import json

import pytest
from ml_collections import ConfigDict

import vitcompact as vc
from vitcompact.run import config_file
from vitcompact.train import config as configs

FILE = """
from ml_collections import ConfigDict
def get_config(argument="none"):
  config = ConfigDict({"seed": 1, "total_steps": 100, "model": {"name": "a", "remat": False},
                       "optim": {"b1": 0.9, "rates": ()}, "argument": argument})
  config.checkpoint_every = config.get_ref("total_steps") // 4
  config.plan = {"tokens": {"method": "evit", "keep": 0.7, "blocks": (3, 6)}}
  return config
"""


@pytest.fixture
def load(tmp_path):
  def loaded(*overrides, argument=""):
    (tmp_path / "file.py").write_text(FILE)
    rest, changes = config_file.split(["main.py", *overrides])
    assert rest == ["main.py"]
    return config_file.load(f"{tmp_path / 'file.py'}{argument}", changes)
  return loaded


@pytest.mark.parametrize("argument, key, value", [
    ("--config.seed=3", "seed", 3), ("--config.optim.b1=1e-3", "optim.b1", 1e-3),
    ("--config.optim.b1=1", "optim.b1", 1.0), ("--config.c=many", "c", "many"),
    ("--config.model.name=7", "model.name", "7"),
    ("--config.model.remat", "model.remat", True), ("--noconfig.model.remat", "model.remat", False),
    ("--config.model.remat=True", "model.remat", True),
    ("--config.model.remat=true", "model.remat", True),
    ("--config.model.image_size=(8, 16)", "model.image_size", (8, 16)),
    ("--config.model.widths=8,16", "model.widths", (8, 16)),
    ("--config.reconstruct.steps=5", "reconstruct.steps", 5),
    ("--config.optim.rates=[['.*', 1.0, 0]]", "optim.rates", [[".*", 1.0, 0]]),
    ("--config.data.name=folder:/a=b", "data.name", "folder:/a=b"),
])
def test_a_value_is_parsed_by_the_type_of_its_key(load, argument, key, value):
  found = configs.flat(load(argument))[key]
  assert (list(found) if isinstance(found, tuple) else found) == (
      list(value) if isinstance(value, tuple) else value)
  assert type(found) is type(value) or isinstance(value, (list, tuple))


def test_values_may_be_separate_words_and_the_last_one_counts(load):
  config = load("--config.seed", "3", "--config.seed", "4", "--config.model.remat", "--config.b",
                "x")
  assert (config.seed, config.model.remat, config.b) == (4, True, "x")


def test_values_derived_from_total_steps_follow_it_unless_given(load):
  assert load().checkpoint_every == 25
  assert load("--config.total_steps=40").checkpoint_every == 10
  assert load("--config.total_steps=40", "--config.checkpoint_every=7").checkpoint_every == 7


def test_the_argument_reaches_get_config(load):
  assert load().argument == "none"
  assert load(argument=":a:b,c").argument == "a:b,c"


def plan_of(config):
  return vc.Plan.parse(configs.plain(config.plan))


def test_a_plan_is_changed_key_by_key_or_replaced(load, tmp_path):
  path = tmp_path / "plan.json"
  path.write_text(json.dumps({"tokens": {"method": "tome", "r": 4}, "ffn": {"method": "cffn"}}))
  other = vc.Plan(tokens=vc.ToMe(r=4), ffn=vc.CFFN())
  evit = vc.EViT(keep=0.7, blocks=(3, 6))
  for overrides, plan in {
      (): vc.Plan(tokens=evit),
      ("plan.tokens.keep=0.5",): vc.Plan(tokens=evit.at_keep(0.5)),
      ("plan.tokens.blocks=3,9",): vc.Plan(tokens=vc.EViT(keep=0.7, blocks=(3, 9))),
      ("plan.tokens.fuse=false",): vc.Plan(tokens=vc.EViT(keep=0.7, blocks=(3, 6), fuse=False)),
      ("plan.tokens=null",): vc.Plan(),
      ("plan.tokens=null", "plan.tokens.method=tome"): vc.Plan(tokens=vc.ToMe()),
      ("plan.ffn.method=cffn",): vc.Plan(tokens=evit, ffn=vc.CFFN()),
      ("plan.blocks.7.heads.method=hmhsa",): vc.Plan(
          tokens=evit, blocks={7: {"heads": vc.HMHSA()}}),
      ("plan=",): vc.Plan(),
      ("plan=", "plan.ffn.method=cffn"): vc.Plan(ffn=vc.CFFN()),
      (f"plan={path}",): other,
      (f"plan={path}", "plan.tokens.r=2"): vc.Plan(tokens=vc.ToMe(r=2), ffn=vc.CFFN()),
      (f"plan={path.read_text()}", "plan.tokens.r=2"): vc.Plan(tokens=vc.ToMe(r=2), ffn=vc.CFFN()),
  }.items():
    assert plan_of(load(*(f"--config.{override}" for override in overrides))) == plan, overrides


def test_a_missing_plan_file_is_named(load):
  with pytest.raises(ValueError, match=r"plan='nowhere.json' cannot be read"):
    load("--config.plan=nowhere.json", "--config.plan.tokens.r=2")


def test_a_config_may_be_a_dict_and_is_unlocked(tmp_path):
  (tmp_path / "file.py").write_text("def get_config():\n  return {'model': {'name': 'a'}}")
  config = config_file.load(str(tmp_path / "file.py"), [("plan.ffn.method", "cffn")])
  assert isinstance(config, ConfigDict) and plan_of(config) == vc.Plan(ffn=vc.CFFN())
