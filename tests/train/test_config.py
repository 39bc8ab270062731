"""A contradictory config is rejected before anything is computed or written."""
import json
import os
import re

import hypothesis
import pytest
from hypothesis import strategies as st
from ml_collections import ConfigDict

import vitcompact as vc
from tests.tiny_run import tiny_config
from vitcompact.methods import protocol
from vitcompact.train import build
from vitcompact.train import config as configs


def changed_config(key, value, plan=None):
  """Returns the tiny config, with only its non-default values and one more value."""
  values = {**configs.flat(tiny_config()), key: value}
  return configs.nested(values if plan is None else {**values, "plan": plan})


@pytest.mark.parametrize("key, close", [
    ("optim.learning_rat", "optim.learning_rate"), ("totl_steps", "total_steps"),
    ("keep_warmup.stat", "keep_warmup.start"), ("data.mix_up", "data.mixup")])
def test_unknown_keys_list_similar_names(key, close):
  with pytest.raises(ValueError, match=rf"unknown key config.{key}; did you mean .*{close}"):
    configs.complete(changed_config(key, 1))


def test_a_renamed_key_may_have_its_old_name():
  """In a config, and in a workdir that was begun before."""
  old = changed_config("loss.companion_r", 3, plan={"tokens": {"method": "mctf"}})
  new = configs.complete(old)
  assert new.loss.second_pass_r == 3 and "companion_r" not in new.loss
  assert configs.from_text(json.dumps(old))["loss.second_pass_r"] == 3


def test_missing_keys_get_defaults_and_a_complete_config_is_unchanged():
  full = configs.complete(tiny_config())
  assert set(configs.KEYS) <= set(configs.flat(full))
  assert (full.optim.b2, full.data.workers, full.loss.labels) == (0.999, 0, 1.0)
  assert configs.complete(full) == full
  assert "reconstruct" not in full and "kept_ratio" not in full.loss


@pytest.mark.parametrize("missing", ["model.name", "model.image_size"])
def test_missing_keys_without_a_default_are_reported(missing):
  values = {key: value for key, value in configs.flat(tiny_config()).items() if key != missing}
  with pytest.raises(ValueError, match=f"missing config.{missing}"):
    configs.complete(configs.nested(values))


@pytest.mark.parametrize("plan", [
    {"ffn": {"method": "cffn"}}, ConfigDict({"ffn": {"method": "cffn"}}),
    '{"ffn": {"method": "cffn"}}'])
def test_plan_can_be_a_dict_or_json(plan):
  config = configs.complete({**configs.nested(configs.flat(tiny_config())), "plan": plan})
  assert vc.Plan.parse(config.plan) == vc.Plan(ffn=vc.CFFN())


NAN, INF = float("nan"), float("inf")
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
SPARSE = {"attention": {"method": "sparsifiner"}}
DYNAMICVIT = {"tokens": {"method": "dynamicvit"}}
MCTF = {"tokens": {"method": "mctf"}}
EVIT = {"tokens": {"method": "evit"}}
OUT_OF_RANGE = {
    "seed": (-1, 2 ** 63, 0.5, True), "total_steps": (0, -3, 1.5, "many", 2 ** 31),
    "batch_size": (0,),
    "eval_batch_size": (0, 10 ** 9), "checkpoint_every": (0, 9 * 10 ** 18), "keep_last": (0,),
    "log_every": (0,), "accumulate": (0,), "ema_half_life": (-1.0, NAN, INF),
    "eval_params": ("best",), "init_from": (3,), "optim.learning_rate": (-1e-3, NAN, INF),
    "optim.weight_decay": (-0.1, NAN), "optim.clip_norm": (-1.0, NAN, INF),
    "optim.adaptive_clip": (-0.02, NAN, INF),
    "optim.warmup_steps": (-1, 2.5), "optim.cooldown_steps": (-1,), "optim.b1": (2, 1, -0.1, NAN),
    "optim.b2": (1.0, NAN), "optim.eps": (0, -1e-8), "optim.epoch_steps": (0, -1),
    "compact.macs": (-0.1, 1.5, NAN), "compact.params": (-1, 2), "compact.images": (0, 7.5),
    "compact.sensitivity": ("none",), "compact.dense_steps": (-1,),
    "compact.dense_learning_rate": (-1e-3, INF), "compact.distil": (1,), "keep_start": ("yes",),
    "export": (("onnx",), "onnx,tflite"), "compact.speedup": (-1, NAN),
    "compact.latency_ms": (-1.0, INF), "compact.latency_batch": (0, 0.5),
    "optim.skip_nonfinite": (-1,), "optim.name": ("lamb",), "optim.schedule": ("cosine",),
    "optim.warmup_learning_rate": (-1.0,), "optim.final_learning_rate": (-1.0, NAN),
    "data.smoothing": (2, 1, -0.1, NAN), "data.erase": (5, -0.1, NAN, INF),
    "data.mixup": (-0.8, NAN), "data.cutmix": (-1.0, NAN, INF), "data.eval_crop": (2, -1, NAN),
    "data.eval_fit": ("squash",), "data.replicas": (0,), "data.repeats": (0,),
    "data.workers": (-1,), "data.on_bad": ("ignore",), "data.max_bad": (-1,),
    "loss.labels": (-1.0, NAN, INF), "loss.patch_labels": (NAN,), "loss.hard": (-0.5,),
    "loss.soft": (NAN,), "loss.logits": (INF,), "loss.patches": (-1,), "loss.attention": (-1.0,),
    "loss.temperature": (0, -1.0, NAN, INF), "loss.patch_error": ("cosine",),
    "mesh.data": (-2,), "mesh.fsdp": (-2,), "mesh.tensor": ("all",),
}


def of_methods():
  """Yields (key, a value out of range, a plan with the method) for every number that is a setting
  of a method."""
  for axis, kinds in vc.METHODS.items():
    for name, kind in kinds.items():
      for key, setting in protocol.settings(kind).items():
        if type(setting.default) in (int, float):
          assert setting.low is not None, f"{kind.__name__}.settings, {key}: needs a lower bound"
          for value in (setting.low - 1, 0.5 if type(setting.default) is int else NAN):
            yield key, value, {axis: {"method": name}}


CASES = [(key, value, None) for key, values in OUT_OF_RANGE.items() for value in values]
CASES += of_methods()


@pytest.mark.parametrize("key, value, plan", CASES)
def test_value_out_of_range_is_rejected_with_the_range(key, value, plan):
  with pytest.raises(ValueError, match=rf"^config.{key}=.*: must be ") as error:
    configs.complete(changed_config(key, value, plan))
  assert "\n" not in str(error.value)


def test_every_number_in_a_config_has_a_tested_range():
  numbers = {key for key, setting in {**configs.KEYS, **configs.all_settings()}.items()
             if isinstance(setting.default, (int, float)) and not isinstance(setting.default, bool)}
  assert numbers <= {key for key, *_ in CASES}


@pytest.mark.parametrize("changes, words", [
    ({"eval_params": "ema", "ema_half_life": 0.0}, "needs averages"),
    ({"accumulate": 3}, "batch_size=16 does not divide into config.accumulate=3"),
    ({"accumulate": 2}, "replicas=1 must be a multiple of config.accumulate=2"),
    ({"mesh.data": 0}, "mesh.data=0: must be a number of devices, or -1"),
    ({"optim.warmup_steps": 41}, r"warmup_steps=41 and .*cooldown_steps=0 are longer than config."),
    ({"optim.warmup_steps": 21, "optim.cooldown_steps": 20}, "longer than config.total_steps=40"),
    ({"optim.rates": (("(", 1.0, 0),)}, "with a regular expression: missing"),
    ({"optim.rates": ((".*", 1.0),)}, r"must be \(pattern, factor, first step\)"),
    ({"optim.rates": (".*",)}, r"must be \(pattern, factor, first step\)"),
    ({"optim.rates": ((".*", NAN, 0),)}, "with a factor of at least 0"),
    ({"optim.rates": ((".*", 1.0, -1),)}, "and a whole number of steps"),
    ({"init_from": "gs://bucket/x.safetensors"}, "config.init_from=gs://.*not the address of a"),
    ({"teacher.file": "s3://bucket/x.safetensors"}, "config.teacher.file=s3://"),
    ({"data.name": "folder:gs://bucket/images"}, "config.data.name=folder:gs://"),
    ({"data.name": "arrayrecord:gs://bucket/r"}, "config.data.name=arrayrecord:gs://"),
    ({"optim.b1": {"deep": 1}}, "unknown key config.optim.b1.deep"),
    ({"plan": {"tokens": {"method": "evit", "blocks": [[1], [2]]}}}, "EViT.blocks=.*: must be "),
    ({"plan": '{"tokens": {"method": "evit", "keep": [[0.5]]}}'}, "EViT.keep=.*: must be "),
    ({"plan": 3}, "plan=3: must be a dict"),
])
def test_contradictory_values_are_rejected(changes, words):
  with pytest.raises(ValueError, match=words):
    configs.complete(configs.nested({**configs.flat(tiny_config()), **changes}))


@pytest.mark.parametrize("changes, words", [
    ({"loss.labels": 0.0}, "every weight of config.loss that affects deit_tiny.* is 0"),
    ({"model.in_chans": 1}, "config.model.in_chans=1: must be 3, as .*--in-chans 1`"),
    ({"model.depth": 0}, "depth=0"), 
    ({"model.depth": -1}, "depth=-1"),
])
def test_model_that_is_impossible_or_cannot_learn_is_rejected(changes, words):
  """patch_labels has an effect only with patch logits."""
  with pytest.raises(ValueError, match=words):
    build.build(build.resolve(configs.nested({**configs.flat(tiny_config()), **changes})))


def old_config():
  """The config.json of an older run: every key of every method, and a plan in old vocabulary."""
  full = configs.flat(configs.complete(tiny_config()))
  full |= {key: setting.default for key, setting in configs.all_settings().items()}
  full["plan"] = json.dumps({
      "heads": {"method": "hmhsa", "layout": "map"}, "links": None, "tokens": None,
      "ffn": {"method": "cffn", "merged": ["fc2"]}, "blocks": {"1": {"links": None}},
      "backends": {"0": "blockwise"}, "at_a_time": 8})
  return json.loads(json.dumps(full))


def test_config_of_an_older_run_is_readable_and_equivalent():
  old, new = old_config(), configs.flat(tiny_config())
  plan = vc.Plan.parse(old["plan"])
  new["plan"] = plan.to_json()
  assert configs.differences(old, new) == []
  assert configs.differences(old, configs.flat(configs.complete(configs.nested(old)))) == []


def test_settings_of_unused_methods_are_ignored_and_those_of_used_ones_compared():
  old = old_config() | {"reconstruct.learning_rate": 5.0, "optim.rates": [["a", 1.0, 0]]}
  new = {**old, "optim.rates": (("a", 1.0, 0),), "reconstruct.learning_rate": 6.0}
  assert configs.differences(old, new) == []
  plan = json.dumps(SPARSE)
  assert configs.differences({**old, "plan": plan}, {**new, "plan": plan}) == [
      "reconstruct.learning_rate was 5.0 and is now 6.0"]
  [line] = configs.differences({**old, "plan": ""}, {**new, "plan": '{"ffn": {"method": "cffn"}}'})
  assert line.startswith("plan was '{}' and is now ")
  assert configs.differences(old, {**old, "log_every": 7, "checkpoint_every": 3}) == []


def candidate_values(setting):
  """Values for a key: of its own type, inside and outside its range, and other JSON values."""
  kind = type(setting.default)
  ends = [end for end in (setting.low, setting.high, setting.above, setting.below)
          if end is not None]
  values = [st.sampled_from([*ends, *setting.choices, setting.default, NAN, INF, -INF, None, True,
                             "", "x", (), ((1,),), {}, 10 ** 30])]
  values += [st.floats()] if kind is float else [st.integers()] if kind is int else [st.text()]
  return st.one_of(values)


ALL = {**configs.KEYS, **configs.all_settings()}
PLANS = st.sampled_from([None, SPARSE, DYNAMICVIT, MCTF, EVIT])


@st.composite
def settings_of_a_run(draw):
  keys = draw(st.lists(st.sampled_from(sorted(ALL)), min_size=1, max_size=4, unique=True))
  return {key: draw(candidate_values(ALL[key])) for key in keys}


@hypothesis.settings(deadline=None, derandomize=not LONG, max_examples=3000 if LONG else 60)
@hypothesis.given(settings_of_a_run(), PLANS)
@hypothesis.example({"accumulate": {}}, None)   # was once silently replaced by the default
@hypothesis.example({"optim.b1": {}}, None)
def test_any_settings_are_used_unchanged_or_rejected_in_one_line(given, plan):
  base = configs.flat(tiny_config()) | ({} if plan is None else {"plan": plan})
  try:
    completed = configs.flat(configs.complete(configs.nested({**base, **given})))
  except ValueError as error:
    assert str(error) and "\n" not in str(error), error
    return
  for key, value in given.items():
    if key not in completed:   # belongs to a method that is not in the plan, and has its default
      assert value == ALL[key].default
      continue
    assert completed[key] == value
    ALL[key].check(key, completed[key])


@pytest.mark.parametrize("key", sorted(ALL))
def test_range_of_each_key_includes_its_ends_and_nothing_beyond(key):
  setting = ALL[key]
  for end, inside in ((setting.low, True), (setting.high, True), (setting.above, False),
                      (setting.below, False)):
    if end is not None:
      assert setting._fits(type(setting.default)(end)) is inside
  setting.check(key, setting.default)
  for value in (None, object(), b"", {}):
    with pytest.raises(ValueError, match=rf"^config\.{re.escape(key)}="):
      setting.check(key, value)
