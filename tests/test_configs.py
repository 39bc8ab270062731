"""Every config in configs/ is complete and builds; the compact ones differ only in their plan."""
import functools
import importlib
import pathlib
import re

import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.cli import command
from vitcompact import convert, trees
from vitcompact.run import loop, path
from vitcompact.train import config as configs
from vitcompact.train import optim, phases, sharding

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def load(name):
  return importlib.import_module(f"configs.{name}")


def plan_of(config):
  return vc.Plan.parse(config.plan.to_dict())


def first_steps(config):
  """Returns the number of steps of a method's first phase."""
  return config.get("reconstruct", {}).get("steps", 0)


def test_the_base_has_all_keys_but_those_of_methods_at_their_defaults():
  values = configs.flat(load("base").get_config())
  assert values.pop("plan").to_dict() == {}
  assert {key: value for key, value in values.items() if not key.startswith("model.")} == {
      key: setting.default for key, setting in configs.KEYS.items()}


def test_argument_words_are_switches_or_the_one_text_and_typos_fail():
  parse = load("base").parse
  chosen = parse("b,large,runlocal", model="a", large=False, deep=False)
  assert chosen.to_dict() == {"model": "b", "large": True, "deep": False, "runlocal": True}
  with pytest.raises(ValueError, match=r"'lrage' is not an argument .* takes large, runlocal"):
    parse("lrage", large=False)


def has_teacher_loss(config):
  return any(config.loss[key] for key in ("hard", "soft", "logits", "patches"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
  """The folders of ImageNet's 1000 classes, without an image."""
  root = tmp_path_factory.mktemp("imagenet")
  for label in range(1000):
    (root / "train" / f"n{label:08d}").mkdir(parents=True)
  return root


@pytest.mark.parametrize("name", NAMES)
def test_a_config_builds_and_its_rules_match_every_parameter(name, imagenet):
  """Shapes only: nothing is allocated or compiled."""
  config = load(name).get_config()
  if config.data.name.startswith(("folder:", "tfds:")):
    config.data.name = f"folder:{imagenet}"
  if has_teacher_loss(config):
    config.teacher.file = "named on the command line.safetensors"
  run = loop.build(loop.resolve(config))
  params = trees.named_leaves(run.shapes.params)
  assert trees.named_leaves(run.shardings.params).keys() == params.keys()
  assert bool(run.shapes.ema_params) == bool(config.ema_half_life)
  assert all(leaf.dtype == np.float32 for leaf in params.values())


def toy(name, argument=""):
  """Returns a config with `runlocal` and what that leaves out: a teacher and token labels."""
  words = ",".join(filter(None, (argument, "runlocal")))
  config, shipped = load(name).get_config(words), load(name).get_config(argument)
  config.update(batch_size=16, ema_half_life=0.0, seed=0, eval_params="raw")
  config.model.drop_path_rate = 0.1
  if shipped.data.augment == "token_labels":
    config.data.augment = "token_labels"
  if has_teacher_loss(shipped):
    config.loss.update({key: shipped.loss[key] for key in ("hard", "soft", "logits", "patches")})
    config.teacher.file = "named on the command line.safetensors"
  same = {"learning_rate": 1e-2, "final_learning_rate": 1e-2, "warmup_learning_rate": 1e-2}
  config.optim.update(weight_decay=0.05, **same)
  config.optim.rates = tuple((*rate[:2], 0) for rate in config.optim.rates)
  if "reconstruct" in config:
    config.reconstruct.update(**same)
  return loop.resolve(config)


@functools.cache
def take_steps(config):
  """Takes a step with each program of a run.

  Returns ([metrics of each step], names of the parameters that moved, names of all parameters).
  """
  run, rng = loop.build(config), np.random.default_rng(0)
  state = jax.tree.map(
      lambda leaf, where: jax.device_put(_drawn(rng, leaf), where), run.shapes, run.shardings)
  size, seen, first = config.model.image_size, [], phases.first_steps(config, run.model.plan)
  batch = {"image": rng.integers(0, 256, (16, size, size, 3), np.uint8),
           "label": rng.integers(0, 10, 16).astype(np.int32)}
  if config.data.augment == "token_labels":
    batch["label_map"] = np.ones((16, 2, 5, 18, 18), np.float16)
    batch["label_box"] = np.tile(np.float32([0.1, 0.2, 0.7, 0.9]), (16, 1))
  before = jax.device_get(state.params)
  for step in sorted({0, first}):
    state, metrics = run.step_at(step)(state, sharding.put_batch(batch, run.mesh))
    seen.append(jax.device_get(metrics))
  moved = {name for name, leaf in trees.named_leaves(jax.device_get(state.params)).items()
           if np.any(leaf != trees.named_leaves(before)[name])}
  return seen, moved, set(trees.named_leaves(before))


def _drawn(rng, leaf):
  """Returns a leaf of a state: zeros for integers, else random and positive."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key(0)
  if not np.issubdtype(leaf.dtype, np.floating):
    return np.zeros(leaf.shape, leaf.dtype)
  return np.abs(0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)


DISTILLED = "deit_tiny_distilled_patch16_224"
# Their steps are covered by tests/models, or differ from those of others only in numbers.
ALIKE = ("base", "biformer", "cifar10", "compact_deit_s", "compact_digits", "compact_fashion_mnist",
         "davit", "deit_b_384", "deit_s", "dynamicvit_deit_s", "evit_deit_s", "fashion_mnist",
         "inline", "lvvit_s_384", "nextvit_384", "shapes", "shvit", "sparse_digits",
         "sparse_shapes", "sparsifiner_deit_s", "sparsifiner_lvvit_s", "tome_deit_s", "transnext")


@pytest.mark.parametrize("name, argument", [
    *(pytest.param(name, "", marks=[pytest.mark.slow] * (name in ALIKE)) for name in NAMES),
    ("deit_s", DISTILLED), ("sparsifiner_deit_s", "evit"), ("digits", "dense"),
    # The step of sparsifiner_deit_s:evit covers EViT, and those of all others cover AdamW.
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (("evit_deit_s", "scratch"), ("cifar10", "adamw")))])
def test_a_config_takes_a_step_of_each_phase_on_eight_devices(name, argument):
  """Configs that are equal at this size are compiled only once."""
  config = toy(name, argument)
  metrics, moved, leaves = take_steps(config)
  for values in metrics:
    assert all(np.isfinite(value) for value in values.values())
  assert {leaf for leaf in leaves if leaf.endswith("mlp/fc1/kernel")} <= moved
  assert bool(first_steps(config)) == any("/links/" in leaf for leaf in moved)


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_names_the_command_that_runs_its_config(name):
  words = " ".join(load(name).__doc__.replace("\\", "").split())
  assert re.search(rf"python main.py --config=configs/{name}.py(:\w+)? --workdir=", words)


CONVERTED = [name for name in NAMES
             if "Command:  vitcompact convert" in load(name).__doc__]


@pytest.mark.parametrize("name", CONVERTED)
def test_the_command_in_a_docstring_makes_the_initial_weights(name, tmp_path, monkeypatch):
  """It converts a narrow model of 224 pixels and ImageNet's classes."""
  config, words = load(name).get_config(), load(name).__doc__.replace("\\\n", "").split()
  given, *options = words[words.index("vitcompact") + 2:words.index("main.py") - 1]
  source = vc.create_model(config.model.name, image_size=224, width=8, depth=1, heads=1)
  monkeypatch.chdir(tmp_path)
  (tmp_path / given).parent.mkdir(parents=True, exist_ok=True)
  convert.save(given, source, jax.tree.map(np.asarray, tiny.init(source)))
  command.succeeds("convert", given, *options)
  out = options[options.index("--out") + 1]
  converted, _ = convert.load(out)
  assert converted.image_size == config.model.image_size
  assert converted.num_classes == {"tfds:cifar10": 10}.get(config.data.name, 1000)
  assert f"--config.init_from={out}" in words


@functools.cache
def dense_macs(name, sizes):
  return vc.count(vc.create_model(name, **dict(sizes))).macs


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_states_result_and_cost_and_its_flop_are_counted(name):
  """Six FLOP per multiply-accumulate: two in the forward pass, four in the backward pass."""
  text, config = load(name).__doc__, load(name).get_config()
  assert all(word in text for word in ("\nCommand:  ", "\nCost:     ", "\nResult:   "))
  assert ("\nHardware: " in text) or name == "compact_digits" or name.startswith(
      ("base", "digits", "shapes", "sparse"))
  if told := re.search(r"Cost:     ([\d.]+) ([ET])FLOP", text):
    sizes = {key: value for key, value in config.model.items() if key not in (
        "name", "drop_path_rate", "dtype", "remat", "mix_token", "position_std")}
    flop = 6 * config.batch_size * config.total_steps * dense_macs(
        config.model.name, tuple(sorted(sizes.items())))
    assert f"{flop / {'E': 1e18, 'T': 1e12}[told[2]]:.3g}" == told[1]
  else:
    assert name in ("digits", "sparse_digits", "compact_digits")   # measured


ARGUMENTS = sorted({(name, argument) for name in NAMES for argument in re.findall(
    rf"(?:configs/{name}\.py| or|,) ?:([\w.@]+\w)", load(name).__doc__)})


def test_every_config_with_an_argument_is_listed():
  """Otherwise an unlisted variant would go untested."""
  takes = {name for name in NAMES
           if "base.parse(argument, " in (ROOT / "configs" / f"{name}.py").read_text()}
  assert takes == {name for name, _ in ARGUMENTS}


@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_each_argument_in_a_docstring_gives_a_different_config(name, argument):
  config = load(name).get_config(argument)
  full = configs.complete(config)
  vc.create_model(**{**full.model.to_dict(), "plan": vc.Plan.parse(full.plan)})
  default = {"sparse_digits": "token", "sparse_shapes": "block"}.get(name)
  assert (configs.flat(config) == configs.flat(load(name).get_config())) == (argument == default)


@pytest.mark.parametrize("name, argument", [*((name, "") for name in NAMES), *ARGUMENTS])
def test_runlocal_needs_no_file_and_few_resources(name, argument):
  config = load(name).get_config(",".join(filter(None, (argument, "runlocal"))))
  full = configs.complete(config)
  assert full.total_steps == 20 and full.batch_size == 32 and full.data.workers == 0
  assert full.data.name in ("digits", "shapes", "directions")
  # A path provides its own teacher.
  assert bool(path.budget_of(full)) == has_teacher_loss(full) and not full.teacher.file
  sizes = full.model.to_dict()
  model = vc.create_model(**{**sizes, "plan": vc.Plan.parse(full.plan), "num_classes": 10})
  assert vc.count(model.clone(plan=vc.Plan())).params < 200_000
  before = plan_of(load(name).get_config(*[argument] * bool(argument)))
  assert [type(method) for method in model.plan.methods()] == [
      type(method) for method in before.methods()]
  phases.check(full, model)


WARPED = [name for name in NAMES if "eval_fit" in load(name).__doc__]


@pytest.mark.parametrize("name", WARPED)
def test_a_config_builds_at_the_warped_size_in_its_docstring(name, imagenet):
  config = load(name).get_config()
  for key, value in re.findall(r"--config\.(model\.image_size|data\.eval_fit)=(\w+)",
                               load(name).__doc__):
    config.update_from_flattened_dict({key: int(value) if value.isdigit() else value})
  config.data.name = f"folder:{imagenet}"
  config.teacher.file = "named on the command line.safetensors" if has_teacher_loss(config) else ""
  pre = loop.build(loop.resolve(config)).preprocess
  assert (pre.image_size, pre.crop) == ((384, 384), None)


def test_methods_published_at_384_pixels_say_how_they_were_evaluated():
  assert WARPED == ["dynamicvit_deit_s", "mctf_deit_s", "sparsifiner_deit_s"]


@pytest.mark.parametrize("name, weight, blocks", [
    ("dynamicvit_deit_s", 2, (3, 6, 9)),
    ("dynamicvit_deit_s:deit_base_patch16_224", 5, (3, 6, 9)),
    ("dynamicvit_lvvit_s", 2, (4, 8, 12)), ("dynamicvit_lvvit_s:lvvit_m", 2, (5, 10, 15))])
def test_dynamicvit_has_the_ratio_weight_and_stages_of_its_recipe(name, weight, blocks):
  config, _ = config_and_epoch_steps(name)
  tokens = plan_of(config).tokens
  assert (config.loss.kept_ratio, tokens.keep, tokens.blocks) == (weight, 0.7, blocks)


@pytest.mark.parametrize("compact, dense", [
    ("digits", "digits:dense"), ("compact_deit_s:scratch", "deit_s"),
    *((f"compact_deit_s:scratch,{name}", f"deit_s:{name}")
      for name in ("deit_tiny_patch16_224", "deit_base_patch16_224"))])
def test_compact_and_dense_differ_only_in_the_plan(compact, dense):
  (one, _), (other, _) = config_and_epoch_steps(compact), config_and_epoch_steps(dense)
  assert plan_of(one) == vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())
  assert plan_of(other) == vc.Plan()
  values = [{key: value for key, value in configs.flat(config).items() if key != "plan"}
            for config in (one, other)]
  assert values[0] == values[1]


# The published recipes: images per step and per replica, repeats of an image, epochs; peak and
# final learning rate, weight decay, clipping; drop path, EMA decay per step; the sizes to which
# evaluation resizes and crops.
DEIT = (1024, 256, 3, 300, 1e-3, 1e-5, 0.05, 0, 0.1, 0.99996, 256, 224)
DEIT_B = (1024, 64, *DEIT[2:])
PVT = (1024, 128, 3, 300, 1e-3, 1e-5, 0.05, 0, 0.1, 0, 256, 224)
PVT_DEEP = (*PVT[:7], 1, 0.3, 0, 256, 224)
TRANSNEXT = {size: (*PVT[:7], 1, rate, 0, 256, 224) for size, rate in (
    ("micro", 0.15), ("tiny", 0.25), ("small", 0.45), ("base", 0.6))}
NEXTVIT = (2048, 256, 1, 300, 2e-3, 1e-5, 0.1, 5, 0.1, 0, 256, 224)
NEXTVIT_384 = (1024, 128, 1, 30, 1e-5, 1e-5, 1e-8, 5, 0.1, 0, 438, 384)
DAVIT = (1024, 128, 1, 310, 1e-3, 1e-5, 0.05, 1, 0.1, 0, 248, 224)
SHVIT = (2048, 256, 3, 300, 4e-3, 1e-5, 0.025, 0, 0, 0.99996, 256, 224)
INLINE = (4096, 512, 1, 300, 4e-3, 4e-5, 0.05, 5, 0.1, 0, 256, 224)
INLINE_PVT = (1024, 128, 1, 300, 1e-3, 2e-5, 0.05, 0, 0.1, 0, 256, 224)
SPARSIFINER = (1344, 168, 1, 50, 8e-5, 2e-6, 0.05, 0, 0, 0.9999, 256, 224)
DYNAMICVIT = (1024, 128, 1, 30, 1e-3, 1e-6, 0.05, 0, 0, 0.9999, 256, 224)
MCTF = (1024, 128, 3, 40, 3e-5, 1e-6, 0.05, 0, 0.1, 0.99996, 256, 224)
RECIPES = {
    "deit_s:deit_tiny_patch16_224": DEIT, "deit_s": DEIT, "tome_deit_s": DEIT,
    "deit_s:deit_base_patch16_224": DEIT_B, "deit_s:deit_small_distilled_patch16_224": DEIT,
    "deit_s:deit_tiny_distilled_patch16_224": DEIT,
    "deit_s:deit_base_distilled_patch16_224": DEIT_B,
    "deit_b_384": (512, 32, 3, 30, 5e-6, 5e-6, 1e-8, 0, 0, 0.99996, 438, 384),
    "lvvit_s": (1024, 128, 1, 310, 1.6e-3, 1e-5, 0.05, 0, 0.1, 0.99992, 248, 224),
    "lvvit_s:lvvit_m": (1024, 128, 1, 310, 1.6e-3, 1e-5, 0.05, 0, 0.2, 0.99992, 224, 224),
    "lvvit_s_384": (512, 64, 1, 30, 5e-6, 5e-6, 1e-8, 0, 0.1, 0, 426, 384),
    "lvvit_s_384:lvvit_m": (512, 64, 1, 30, 5e-6, 5e-6, 1e-8, 0, 0.2, 0, 384, 384),
    "pvt": PVT, "pvt:pvt_tiny": PVT, "pvt:pvt_medium": PVT_DEEP, "pvt:pvt_large": PVT_DEEP,
    **{f"pvt:pvt_v2_b{i}": PVT if i < 3 else PVT_DEEP for i in range(6)},
    "transnext": TRANSNEXT["tiny"],
    **{f"transnext:transnext_{size}": row for size, row in TRANSNEXT.items()},
    "nextvit": NEXTVIT, "nextvit:nextvit_base": (*NEXTVIT[:8], 0.2, *NEXTVIT[9:]),
    "nextvit:nextvit_large": (*NEXTVIT[:8], 0.2, *NEXTVIT[9:]), "nextvit_384": NEXTVIT_384,
    "nextvit_384:nextvit_large": (*NEXTVIT_384[:8], 0.2, *NEXTVIT_384[9:]),
    "davit": DAVIT, "davit:davit_small": (*DAVIT[:8], 0.2, *DAVIT[9:]),
    "davit:davit_base": (*DAVIT[:8], 0.4, *DAVIT[9:]),
    "shvit": SHVIT, "shvit:shvit_s2": (*SHVIT[:6], 0.032, *SHVIT[7:]),
    "shvit:shvit_s3": (*SHVIT[:6], 0.035, *SHVIT[7:]),
    "shvit:shvit_s4": (*SHVIT[:6], 0.03, *SHVIT[7:-2], 292, 256),
    **{f"biformer:biformer_{size}": (*PVT[:8], rate, *DEIT[9:])
       for size, rate in (("tiny", 0.1), ("small", 0.15), ("base", 0.4), ("stl", 0.1))},
    "inline": INLINE,
    "inline:inline_deit_small": (1024, 128, 1, 300, 1e-3, 1e-5, *INLINE[6:-2], 329, 288),
    "inline:inline_deit_base": (512, 64, 1, 300, 5e-4, 5e-6, *INLINE[6:-2], 512, 448),
    "inline:inline_pvt_tiny": INLINE_PVT, "inline:inline_pvt_small": INLINE_PVT,
    "inline:inline_pvt_medium": (*INLINE_PVT[:8], 0.3, *INLINE_PVT[9:]),
    "inline:inline_pvt_large": (*INLINE_PVT[:8], 0.3, *INLINE_PVT[9:]),
    "cifar10:cifar10@all": (768, 256, 3, 1000, 0.01, 1e-5, 1e-4, 0, 0, 0, 256, 224),
    "cifar10:cifar10@all,adamw": (768, 256, 3, 1000, 7.5e-6, 7.5e-6, 0.05, 0, 0.1, 0, 256, 224),
    "sparsifiner_deit_s": SPARSIFINER, "sparsifiner_lvvit_s": SPARSIFINER,
    "sparsifiner_deit_s:evit": SPARSIFINER,
    "dynamicvit_deit_s": DYNAMICVIT, "dynamicvit_lvvit_s": DYNAMICVIT,
    "dynamicvit_deit_s:deit_base_patch16_224": (*DYNAMICVIT[:8], 0.2, *DYNAMICVIT[9:]),
    "dynamicvit_lvvit_s:lvvit_m": DYNAMICVIT,
    "evit_deit_s": (2048, 256, 3, 30, 8e-5, 2e-6, 1e-6, 0, 0, 0.99996, 256, 224),
    "evit_deit_s:scratch": (2048, 256, 3, 300, 2e-3, 1e-5, 0.05, 0, 0.1, 0.99996, 256, 224),
    "mctf_deit_s": MCTF, "mctf_deit_s:deit_tiny_patch16_224": MCTF,
}


def config_and_epoch_steps(name):
  """Returns (the config of "name" or "name:argument", its steps per epoch)."""
  name, *argument = name.split(":")
  config = load(name).get_config(*argument)
  images = 49_920 if config.data.name == "tfds:cifar10@all" else 1_281_024
  return config, images // config.batch_size


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_has_the_numbers_of_its_recipe(name):
  config, steps = config_and_epoch_steps(name)
  ema = config.ema_half_life and optim.ema_decay(config.ema_half_life, config.total_steps)
  pre = vc.preprocess(vc.create_model(config.model.name, image_size=config.model.image_size))
  resized = int(config.model.image_size / (config.data.eval_crop or pre.crop))
  assert (config.batch_size, config.batch_size / config.data.replicas, config.data.repeats,
          config.total_steps / steps, config.optim.learning_rate, config.optim.final_learning_rate,
          config.optim.weight_decay, config.optim.clip_norm, config.model.drop_path_rate,
          pytest.approx(ema, abs=1e-7), resized, config.model.image_size) == RECIPES[name]


def test_only_shvit_clips_gradients_adaptively():
  assert {name: clip for name in NAMES if (clip := load(name).get_config().optim.adaptive_clip)
          } == {"shvit": 0.02}


# {epoch: learning rate of its first step}. DeiT, PVT, Next-ViT, SHViT, EViT and MCTF delay it.
RATES = {
    "deit_s": {0: 1e-6, 1: 1e-6, 2: 2.008e-4, 5: 8.002e-4, 6: 9.99322e-4, 151: 5.05e-4,
               299: 1.010854e-5},
    "deit_b_384": {0: 1e-6, 1: 1e-6, 2: 1.8e-6, 6: 5e-6, 29: 5e-6},
    "nextvit": {0: 1e-6, 1: 1e-6, 2: 1.0095e-4, 3: 2.009e-4, 20: 1.90005e-3, 21: 1.97826e-3},
    "shvit": {0: 1e-6, 1: 1e-6, 2: 8.008e-4, 5: 3.2002e-3, 6: 3.99727e-3, 151: 2.005e-3},
    "nextvit_384": {0: 1e-5, 1: 1e-5, 29: 1e-5},
    "davit": {0: 1e-6, 1: 2.008e-4, 5: 9.99322e-4, 150: 5.05e-4, 300: 1e-5, 309: 1e-5},
    "lvvit_s": {0: 1e-6, 1: 3.208e-4, 5: 1.598911e-3, 150: 8.05e-4, 300: 1e-5, 309: 1e-5},
    "lvvit_s_384": {0: 1e-6, 1: 1.8e-6, 4: 4.2e-6, 5: 5e-6, 29: 5e-6},
    "evit_deit_s": {0: 8e-5, 1: 8e-5, 16: 4.1e-5},
    "mctf_deit_s": {0: 3e-5, 1: 3e-5, 16: 1.55e-5, 30: 1.07943e-6, 31: 1e-6, 39: 1e-6},
    "cifar10:cifar10@all": {0: 1e-6, 1: 1e-6, 2: 2.0008e-3, 501: 5.005e-3},
    "cifar10:cifar10@all,adamw": {0: 1e-6, 1: 1e-6, 2: 2.3e-6, 6: 7.5e-6, 999: 7.5e-6},
    "sparsifiner_deit_s": {0: 0, 3: 8e-5, 24: 4.1e-5},
    "dynamicvit_deit_s": {0: 0, 5: 1e-3, 17.5: 5.005e-4},
}


@pytest.mark.parametrize("name", RATES)
def test_a_config_has_the_published_learning_rates(name):
  config, steps = config_and_epoch_steps(name)
  rate = optim.schedule(config.optim, config.total_steps - first_steps(config))
  for epoch, expected in RATES[name].items():
    assert rate(round(epoch * steps)) == pytest.approx(expected, rel=1e-4), epoch


@pytest.mark.parametrize("name", ["sparsifiner_deit_s", "sparsifiner_lvvit_s",
                                  "sparsifiner_deit_s:evit"])
def test_sparsifiner_has_the_two_phases_of_its_recipe(name):
  """First only the predictors for 5 epochs, at their own learning rate; then all of the model with
  CE + 0.5 KL + 0.5 MSE of patches. The MSE is that of LV-ViT's patch logits, which have no labels.
  """
  config, epoch = config_and_epoch_steps(name)
  weights = {key: weight for key, weight in config.loss.items()
             if key in ("labels", "hard", "soft", "logits", "patches", "patch_labels") and weight}
  if name != "sparsifiner_lvvit_s":
    del weights["patch_labels"]   # LV-ViT only
  assert weights == {"labels": 1, "logits": 0.5, "patches": 0.5}
  assert (config.reconstruct.weight, config.loss.patch_error) == (0.01, "square")
  params = {"blocks_0": {"links": {"up": np.ones(2)}, "attn": np.ones(2)}}
  rate = optim.make_optimizers(
      config.optim, config.total_steps, params, jax.tree.map(lambda _: True, params),
      optim.FirstGroup("links", "(.*/)?links/.*", config.reconstruct)).rate
  rates = {0: 0, 3: 3e-4, 4: 2.5e-4, 4.999: 2e-4, 5: 0, 8: 8e-5, 49.999: 2e-6}
  for at, expected in rates.items():
    assert rate(int(at * epoch)) == pytest.approx(expected, rel=1e-3), at
