"""A run trains with its plan, after what has to come before."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vitcompact.train.programs import Program, program_at

import vitcompact as vc
from tests import tiny
from vitcompact import trees
from vitcompact.train import build, optim, programs

LINKS = vc.Sparsifiner(granularity="block", keep=0.5, window=2, min_tokens=10)


def programs_of(config, plan, steps):
  model = tiny.deit(plan)
  programs.check(config, model)
  return [program_at(config, model, step) for step in steps]


def test_predictors_learn_first_with_attention_dense_and_every_token(config):
  plan = vc.Plan(links=LINKS, tokens=vc.EViT(keep=0.25, blocks=(0,)))
  config.reconstruct.steps = 5
  first, last = programs_of(config, plan, (4, 5))
  assert first.links and not first.plan.links.masked and first.plan.tokens is None
  assert last == Program(plan)
  # 17 tokens, then 6: block 1 has no predictor, and so none while predictors learn.
  model = tiny.deit(plan)
  student = model.clone(plan=first.plan)
  for i in (0, 1):
    assert (student.parts()[f"blocks_{i}"].links is None) == (i == 1)
  shapes = [jax.eval_shape(m.init, jax.random.key(0), tiny.images(m)) for m in (model, student)]
  assert not trees.differences(*shapes)


def test_the_keep_rate_falls_in_at_most_eight_programs(config):
  plan = vc.Plan(tokens=vc.EViT(keep=0.5, blocks=(0,)))
  config.keep_warmup.start, config.keep_warmup.steps = 4, 20
  found = programs_of(config, plan, range(40))
  rates = [program.plan.tokens.keep for program in found]
  assert rates[:5] == [1.0] * 5 and rates[23:] == [0.5] * 17
  assert rates == sorted(rates, reverse=True) and len(set(rates)) <= 8


def test_mctf_has_a_companion_that_merges_less_the_same_one_after_a_restart(config):
  plan = vc.Plan(tokens=vc.MCTF(r=4))
  config.loss.consistency, config.loss.companion_r = 3.0, 3
  found = programs_of(config, plan, range(50))
  assert {program.companion.tokens.r for program in found} == {0, 1, 2, 3}
  assert {program.plan for program in found} == {plan}
  assert found[30:] == programs_of(config, plan, range(30, 50))


@pytest.mark.parametrize("change, plan, words", [
    (("reconstruct", "steps", 5), vc.Plan(), "the plan has none"),
    (("reconstruct", "steps", 40), vc.Plan(links=LINKS), "must leave some"),
    (("keep_warmup", "steps", 5), vc.Plan(tokens=vc.ToMe(r=2)), "config.keep_warmup is for EViT"),
    (("loss", "consistency", 3.0), vc.Plan(), "the plan has tokens=None"),
    (("loss", "kept_ratio", 2.0), vc.Plan(), "config.loss.kept_ratio is for DynamicViT"),
])
def test_training_that_a_plan_does_not_have_is_refused(config, change, plan, words):
  section, key, value = change
  config[section][key] = value
  with pytest.raises(ValueError, match=words):
    programs.check(config, tiny.deit(plan))


@pytest.mark.parametrize("loss, teacher, fields, words", [
    ("logits", "", {}, "learns from a teacher; give config.teacher.file"),
    (None, "x.safetensors", {}, "has nothing to teach"),
    ("logits", "x.safetensors", {"name": "lvvit_t"}, "MixToken"),
])
def test_a_teacher_and_its_weights_go_together(config, loss, teacher, fields, words):
  if loss:
    config.loss[loss] = 0.5
  config.teacher.file = teacher
  with pytest.raises(ValueError, match=words):
    build.make_teacher(config, tiny.deit(**fields))


PARAMS = {"cls_token": jnp.ones(2), "blocks_0": {
    "links": {"up": jnp.ones(2)}, "predict_tokens": {"out3": jnp.ones(2)}, "attn": jnp.ones(2)}}


def moved(optimizer, params, state, grads):
  updates, state = optimizer.update(grads, state, params)
  new = optax.apply_updates(params, updates)
  return {name: bool(np.any(leaf != trees.named_leaves(params)[name]))
          for name, leaf in trees.named_leaves(new).items()}, new, state


def test_each_phase_moves_its_own_parameters_from_fresh_moments(config):
  config.reconstruct.steps = 10
  mask = jax.tree.map(lambda _: True, PARAMS)
  both = optim.make_optimizers(config.optim, config.reconstruct, 40, PARAMS, mask)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  state = both.main.init(PARAMS)
  config.reconstruct.warmup_steps = 0
  step, params, state = moved(both.links, PARAMS, state, grads)
  assert {name for name, did in step.items() if did} == {"blocks_0/links/up"}
  mu = optax.tree_utils.tree_get_all_with_path(state, "mu")
  fresh = [leaf for _, tree in mu for name, leaf in trees.named_leaves(tree).items()
           if "links" not in name and hasattr(leaf, "shape")]
  assert fresh and not any(np.any(leaf) for leaf in fresh)
  step, _, _ = moved(both.main, params, state, grads)
  assert {name for name, did in step.items() if not did} == {"blocks_0/links/up"}


def test_rates_are_by_the_first_pattern_and_hold_still_before_their_step(config):
  config.optim.rates = ((r".*/predict_tokens/.*", 1.0, 0), (r"cls_token", 0.0, 0), (r".*", 0.01, 1))
  config.optim.warmup_steps, config.optim.clip_norm, config.optim.weight_decay = 0, 0.0, 0.0
  params = {name: leaf for name, leaf in PARAMS.items()}
  mask = jax.tree.map(lambda _: True, params)
  both = optim.make_optimizers(config.optim, config.reconstruct, 40, params, mask)
  state, grads = both.main.init(params), jax.tree.map(jnp.ones_like, params)
  first, params, state = moved(both.main, params, state, grads)
  second, newer, _ = moved(both.main, params, state, grads)
  assert {name for name, did in first.items() if did} == {"blocks_0/predict_tokens/out3"}
  assert {name for name, did in second.items() if did} == {"blocks_0/predict_tokens/out3",
                                                           "blocks_0/attn"}
  steps = {name: float(abs(leaf - trees.named_leaves(params)[name]).max())
           for name, leaf in trees.named_leaves(newer).items()}
  assert steps["blocks_0/attn"] == pytest.approx(
      0.01 * steps["blocks_0/predict_tokens/out3"], rel=0.02)


def test_a_rate_that_matches_nothing_is_refused(config):
  config.optim.rates = (("blocks_7/.*", 0.0, 0),)
  with pytest.raises(ValueError, match=r"'blocks_7/\.\*' matches no parameter"):
    optim.make_optimizers(config.optim, config.reconstruct, 40, PARAMS, PARAMS)


def test_the_models_of_programs_are_the_same_weights():
  """A program's plan changes what is computed, never what is stored."""
  plan = vc.Plan(heads=vc.HMHSA(), links=vc.Sparsifiner(rank=4), tokens=vc.MCTF(r=2, blocks=(1,)),
                 blocks={1: {"links": None}})
  other = dataclasses.replace(plan.with_links(masked=False), tokens=vc.MCTF(r=0, blocks=(1,)))
  shapes = [jax.eval_shape(m.init, jax.random.key(0), tiny.images(m))["params"]
            for m in (tiny.deit(plan), tiny.deit(other))]
  assert not trees.differences(*shapes)
