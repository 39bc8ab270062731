"""A run trains with its plan, after the phases that the plan requires first."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vitcompact as vc
from tests import tiny
from vitcompact import trees
from vitcompact.run import loop
from vitcompact.train import build, optim, phases
from vitcompact.train import config as configs
from vitcompact.train.phases import Phase, phase_at

SPARSE = vc.Sparsifiner(granularity="block", keep=0.5, window=2, min_tokens=10)


def with_plan(config, plan, changes):
  """Returns the complete config with another plan and further settings."""
  settings = {**configs.flat(config), "plan": plan.to_json(), **changes}
  return configs.complete(configs.nested(settings))


def phases_of(config, plan, steps):
  model = tiny.deit(plan)
  phases.check(config, model)
  return [phase_at(config, model, step) for step in steps]


def test_predictors_train_first_with_dense_attention_and_all_tokens(config):
  plan = vc.Plan(attention=SPARSE, tokens=vc.EViT(keep=0.25, blocks=(0,)))
  config = with_plan(config, plan, {"reconstruct.steps": 5})
  first, last = phases_of(config, plan, (4, 5))
  assert first.first is vc.Sparsifiner.first_phase
  assert not first.plan.attention.masked and first.plan.tokens is None
  assert last == Phase(plan)
  # 17 tokens, then 6: block 1 has no predictor, not even in the predictors' phase.
  model = tiny.deit(plan)
  student = model.clone(plan=first.plan)
  for i in (0, 1):
    assert (student.submodules()[f"blocks_{i}"].methods.attention is None) == (i == 1)
  shapes = [jax.eval_shape(m.init, jax.random.key(0), tiny.images(m)) for m in (model, student)]
  assert not trees.differences(*shapes)


def test_keep_rate_falls_in_at_most_eight_phases(config):
  plan = vc.Plan(tokens=vc.EViT(keep=0.5, blocks=(0,)))
  config = with_plan(config, plan, {"keep_warmup.start": 4, "keep_warmup.steps": 20})
  found = phases_of(config, plan, range(40))
  rates = [phase.plan.tokens.keep for phase in found]
  assert rates[:5] == [1.0] * 5 and rates[23:] == [0.5] * 17
  assert rates == sorted(rates, reverse=True) and len(set(rates)) <= 8


def test_mctf_has_a_second_pass_that_merges_less_unchanged_by_a_restart(config):
  plan = vc.Plan(tokens=vc.MCTF(r=4))
  config = with_plan(config, plan, {"loss.consistency": 3.0, "loss.second_pass_r": 3})
  found = phases_of(config, plan, range(50))
  assert {phase.second.tokens.r for phase in found} == {0, 1, 2, 3}
  assert {phase.plan for phase in found} == {plan}
  assert found[30:] == phases_of(config, plan, range(30, 50))


SMALL_BLOCKS = vc.Sparsifiner(granularity="block", min_tokens=100)


@pytest.mark.parametrize("changes, plan, words", [
    ({"reconstruct.steps": 5}, vc.Plan(), "setting of Sparsifiner, which the plan does not have"),
    ({"reconstruct.steps": 40}, vc.Plan(attention=SPARSE), "must be less than"),
    ({"reconstruct.steps": 5, "reconstruct.warmup_steps": 6}, vc.Plan(attention=SPARSE),
     r"reconstruct.warmup_steps=6 is longer than config.reconstruct.steps=5"),
    ({"reconstruct.steps": 36}, vc.Plan(attention=SPARSE),
     r"optim.warmup_steps=5 and .* longer than the main phase \(config.total_steps=40 less"),
    ({"reconstruct.steps": 5}, vc.Plan(attention=SMALL_BLOCKS), "no block of this model has"),
    ({"keep_warmup.steps": 5}, vc.Plan(tokens=vc.ToMe(r=2)), "is a setting of EViT"),
    ({"loss.consistency": 3.0}, vc.Plan(), "is a setting of MCTF"),
    ({"loss.consistency": 3.0}, vc.Plan(tokens=vc.MCTF(r=0.5, blocks=(0,))),
     "give r as a whole number"),
    ({"loss.kept_ratio": 2.0}, vc.Plan(), "is a setting of DynamicViT"),
    ({"loss.kept_ratio": 2.0}, vc.Plan(tokens=vc.DynamicViT(keep=1.0, blocks=(0,))),
     "with keep < 1"),
])
def test_settings_for_training_absent_from_the_plan_are_rejected(config, changes, plan, words):
  with pytest.raises(ValueError, match=words):
    phases.check(with_plan(config, plan, changes), tiny.deit(plan))


@pytest.mark.parametrize("loss, teacher, fields, words", [
    ("logits", "", {}, "learns from a teacher; give config.teacher.file"),
    (None, "x.safetensors", {}, "is not used by any loss"),
    ("logits", "x.safetensors", {"name": "lvvit_t"}, "MixToken"),
])
def test_teacher_loss_and_teacher_weights_require_each_other(config, loss, teacher, fields, words):
  if loss:
    config.loss[loss] = 0.5
  config.teacher.file = teacher
  with pytest.raises(ValueError, match=words):
    build.make_teacher(config, tiny.deit(**fields))


PARAMS = {"cls_token": jnp.ones(2), "blocks_0": {
    "links": {"up": jnp.ones(2)}, "predict_tokens": {"out3": jnp.ones(2)}, "attn": jnp.ones(2)}}


def update_once(optimizer, params, state, grads):
  updates, state = optimizer.update(grads, state, params)
  new = optax.apply_updates(params, updates)
  return {name: bool(np.any(leaf != trees.named_leaves(params)[name]))
          for name, leaf in trees.named_leaves(new).items()}, new, state


def test_each_phase_trains_its_own_parameters_from_fresh_moments(config):
  config.optim.warmup_steps = 0
  section = with_plan(config, vc.Plan(attention=SPARSE), {"reconstruct.steps": 10}).reconstruct
  first = optim.FirstGroup("links", r"(.*/)?links/.*", section)
  mask = jax.tree.map(lambda _: True, PARAMS)
  both = optim.make_optimizers(config.optim, 40, PARAMS, mask, first)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  state = both.main.init(PARAMS)
  step, params, state = update_once(both.first, PARAMS, state, grads)
  assert {name for name, did in step.items() if did} == {"blocks_0/links/up"}
  mu = optax.tree_utils.tree_get_all_with_path(state, "mu")
  fresh = [leaf for _, tree in mu for name, leaf in trees.named_leaves(tree).items()
           if "links" not in name and hasattr(leaf, "shape")]
  assert fresh and not any(np.any(leaf) for leaf in fresh)
  step, _, _ = update_once(both.main, params, state, grads)
  assert {name for name, did in step.items() if not did} == {"blocks_0/links/up"}


def test_rates_follow_the_first_matching_pattern_and_are_zero_before_their_step(config):
  config.optim.rates = ((r".*/predict_tokens/.*", 1.0, 0), (r"cls_token", 0.0, 0), (r".*", 0.01, 1))
  config.optim.warmup_steps, config.optim.clip_norm, config.optim.weight_decay = 0, 0.0, 0.0
  params = {**PARAMS, "blocks_0": {name: leaf for name, leaf in PARAMS["blocks_0"].items()
                                    if name != "links"}}
  mask = jax.tree.map(lambda _: True, params)
  both = optim.make_optimizers(config.optim, 40, params, mask)
  state, grads = both.main.init(params), jax.tree.map(jnp.ones_like, params)
  first, params, state = update_once(both.main, params, state, grads)
  second, newer, _ = update_once(both.main, params, state, grads)
  assert {name for name, did in first.items() if did} == {"blocks_0/predict_tokens/out3"}
  assert {name for name, did in second.items() if did} == {"blocks_0/predict_tokens/out3",
                                                           "blocks_0/attn"}
  steps = {name: float(abs(leaf - trees.named_leaves(params)[name]).max())
           for name, leaf in trees.named_leaves(newer).items()}
  assert steps["blocks_0/attn"] == pytest.approx(
      0.01 * steps["blocks_0/predict_tokens/out3"], rel=0.02)


def test_each_phase_has_its_own_learning_rate(config):
  """10 steps of the first phase, 20 of the main phase, 4 of cool-down."""
  config.optim.update(learning_rate=4.0, final_learning_rate=0.0, warmup_steps=0, cooldown_steps=4)
  section = with_plan(config, vc.Plan(attention=SPARSE), {
      "reconstruct.steps": 10, "reconstruct.learning_rate": 2.0,
      "reconstruct.final_learning_rate": 1.0}).reconstruct
  rate = optim.make_optimizers(config.optim, 34, PARAMS, jax.tree.map(lambda _: True, PARAMS),
                               optim.FirstGroup("links", r"(.*/)?links/.*", section)).rate
  for step, expected in {0: 2, 5: 1.5, 10: 4, 20: 2, 30: 0, 33: 0}.items():
    assert rate(step) == pytest.approx(expected, abs=1e-6), step


def test_after_a_first_phase_steps_are_counted_from_zero_again(config):
  plan = vc.Plan(attention=SPARSE, tokens=vc.EViT(keep=0.5, blocks=(0,)))
  config = with_plan(config, plan, {"reconstruct.steps": 5, "keep_warmup.start": 4,
                                    "keep_warmup.steps": 20})
  found = phases_of(config, plan, (9, 28, 29))
  assert [phase.plan.tokens.keep for phase in found[::2]] == [1.0, 0.5]


def test_only_one_method_can_have_a_first_phase(monkeypatch):
  monkeypatch.setattr(phases.protocol, "first_phase", lambda method: "a phase")
  with pytest.raises(ValueError, match="has 2 methods with a first phase"):
    phases.first_phase(vc.Plan(attention=SPARSE, ffn=vc.CFFN()))


def test_rate_pattern_that_matches_nothing_is_rejected(config):
  config.optim.rates = (("blocks_7/.*", 0.0, 0),)
  with pytest.raises(ValueError, match=r"'blocks_7/\.\*' matches no parameter"):
    optim.make_optimizers(config.optim, 40, PARAMS, PARAMS)


def test_models_of_all_phases_have_the_same_weights(config):
  """A phase's plan changes what is computed, never what is stored."""
  plan = vc.Plan(heads=vc.HMHSA(), attention=vc.Sparsifiner(rank=4),
                 tokens=vc.MCTF(r=2, blocks=(1,)), blocks={1: {"attention": None}})
  config = with_plan(config, plan, {"reconstruct.steps": 1, "loss.consistency": 1.0})
  first, main = phases_of(config, plan, (0, 1))
  model = tiny.deit(plan)
  shapes = [jax.eval_shape(m.init, jax.random.key(0), tiny.images(m))["params"]
            for m in (model, *(model.clone(plan=p) for p in (first.plan, main.plan, main.second)))]
  assert all(not trees.differences(shapes[0], other) for other in shapes[1:])


def test_keeping_every_token_adds_no_predictor_to_a_block_without_one():
  """Also if the method already is in its first-phase form and only the tokens change."""
  method = dataclasses.replace(SPARSE, masked=False)
  model = tiny.deit(vc.Plan(attention=method, tokens=vc.EViT(0.3, blocks=(0,))))
  student = model.clone(plan=phases.plan_of_first_phase(model, vc.Sparsifiner.first_phase))
  for network in (model, student):
    attends = [network.plan.at(site).attention is not None for site in network.sites()]
    assert attends == [True, False]


@pytest.mark.parametrize("changes, plan", [
    ({"keep_warmup.start": 30, "keep_warmup.steps": 20}, vc.Plan(tokens=vc.EViT(blocks=(0,)))),
    ({"keep_warmup.start": 36, "reconstruct.steps": 5},
     vc.Plan(tokens=vc.EViT(blocks=(0,)), attention=SPARSE))])
def test_warm_up_that_outlasts_the_run_is_rejected_at_the_start(config, changes, plan, tmp_path):
  """Otherwise the deployed plan would never have been trained."""
  config, model = with_plan(config, plan, changes), tiny.deit(plan)
  phases.check(config, model)   # a run already begun this way may continue
  words = (r"^config.total_steps=40 ends while the plan's EViT\(blocks=\(0,\)\) still trains as "
           r"EViT\(keep=.*\(config.keep_warmup.start=3.*give the run more steps, or lower these$")
  with pytest.raises(ValueError, match=words):
    phases.check_end(config, model)
  if plan.attention is None:   # otherwise the config's own model would have no such block
    with pytest.raises(ValueError, match=words):
      loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
  phases.check_end(with_plan(config, plan, {key: 0 for key in changes}), model)
