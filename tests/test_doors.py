"""A verb given a wrong argument says so in one line, before it computes anything."""
import functools

import jax
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny

PLAN = vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN())


@functools.cache
def three_forms():
  """(dense model, variables, training form, variables, deployed form, variables, images)."""
  dense, small = tiny.deit(), tiny.deit(PLAN)
  variables = tiny.init(small)
  deploy, folded = vc.fold(small, variables)
  return dense, tiny.init(dense), small, variables, deploy, folded, tiny.images(dense)


def verbs():
  """Returns {"the form it expects: name": function(model, variables, images)}."""
  return {
      "dense: compact": lambda m, v, x: vc.compact(m, v, PLAN, images=x),
      "trained: fold": lambda m, v, x: vc.fold(m, v),
      "trained: count": lambda m, v, x: vc.count(m, variables=v),
      "trained: features": lambda m, v, x: vc.features(m, v, x),
      "trained: save": lambda m, v, x: vc.save("/nowhere/x.safetensors", m, v),
      "trained: verify": lambda m, v, x: vc.verify(m, v, m, v, x),
      "deployed: tune": lambda m, v, x: vc.tune(m, v, x),
      "deployed: to_torch": lambda m, v, x: vc.to_torch(m, v),
  }


def refusal(call, *args) -> str:
  with pytest.raises(ValueError) as error:
    call(*args)
  text = str(error.value)
  assert "\n" not in text, text
  return text


@pytest.fixture(params=verbs())
def door(request):
  """(verb, model, variables, images) that fit each other."""
  dense, variables, small, trained, deploy, folded, images = three_forms()
  model, own = {"dense": (dense, variables), "trained": (small, trained),
                "deployed": (deploy, folded)}[request.param.split(":")[0]]
  return verbs()[request.param], model, own, images


def test_a_name_instead_of_a_model_is_refused(door):
  verb, model, variables, images = door
  assert "'deit' was given, expected a model" in refusal(verb, "deit", variables, images)
  assert "expected a model" in refusal(verb, type(model), variables, images)


def test_swapped_arguments_are_named(door):
  verb, model, variables, images = door
  assert "dict was given, expected a model" in refusal(verb, variables, model, images)
  message = refusal(verb, model, images, variables)
  assert "of shape (3, 32, 32, 3) was given, expected {'params': ...," in message
  assert "5 was given, expected {'params'" in refusal(verb, model, 5, images)


def test_bare_parameters_are_recognised_as_such(door):
  verb, model, variables, images = door
  assert "give {'params': ...}" in refusal(verb, model, variables["params"], images)
  assert "a dict of 'weights' was given" in refusal(verb, model, {"weights": 1}, images)


def test_variables_of_another_model_are_refused_with_the_differences(door):
  verb, model, variables, images = door
  wide = model.clone(width=48)
  message = refusal(verb, model, tiny.init(wide), images)
  assert "do not fit deit_tiny_patch16_224" in message and "not (" in message and " more" in message
  assert len(message) < 600
  assert ": no 'params'" in refusal(verb, model, {"params": {}}, images)
  broken = {**variables, "params": {**variables["params"], "cls_token": 1.0}}
  assert "cls_token is a float" in refusal(verb, model, broken, images)


def test_variables_of_the_other_form_are_recognised():
  _, _, small, trained, deploy, folded, images = three_forms()
  for call in (lambda m, v: vc.fold(m, v), lambda m, v: vc.features(m, v, images),
               lambda m, v: vc.verify(small, trained, m, v, images)):
    assert "the training form's: vc.fold(model, variables) gives" in refusal(call, deploy, trained)
    assert "the deployed form's: give the deployed model" in refusal(call, small, folded)


@pytest.mark.parametrize(("images", "said"), [
    (np.zeros((0, 32, 32, 3), np.float32), "no images were given"),
    (np.zeros((2, 32, 32, 3), np.uint8), "images of uint8"),
    (np.zeros((32, 32, 3), np.float32), "images of shape (32, 32, 3)"),
    (np.zeros((2, 32, 32, 1), np.float32), "images of shape (2, 32, 32, 1)"),
    (np.zeros((2, 16, 16, 3), np.float32), "images of shape (2, 16, 16, 3)"),
    ([[1.0]], "a list"), ("a.png", "images: 'a.png' was given")])
def test_images_must_be_a_batch_of_normalised_floats(images, said):
  dense, variables, _, _, deploy, folded, _ = three_forms()
  for call in (lambda x: vc.compact(dense, variables, PLAN, images=x),
               lambda x: vc.features(dense, variables, x), lambda x: vc.tune(deploy, folded, x),
               lambda x: vc.verify(dense, variables, dense, variables, x)):
    assert said in refusal(call, images)


@pytest.mark.parametrize("plan", [PLAN.to_json(), {"ffn": {"method": "cffn"}}, None, vc.CFFN()])
def test_compact_requires_a_plan(plan):
  dense, variables, *_ = three_forms()
  assert "expected a Plan; Plan.parse reads" in refusal(vc.compact, dense, variables, plan)


def test_wrong_sizes_rounds_and_pairs_of_models_are_refused():
  dense, variables, _, _, deploy, folded, images = three_forms()
  for size in ("224", 0, (32,), 2.5):
    assert "image_size=" in refusal(vc.count, dense, size)
  for rounds in (0, 2.5, "5"):
    assert "rounds=" in refusal(lambda rounds: vc.tune(deploy, folded, images, rounds=rounds),
                                rounds)
  other = tiny.deit(num_classes=7)
  assert "(3, 5) and (3, 7)" in refusal(vc.verify, dense, variables, other, tiny.init(other),
                                        images)
  assert "unknown model 'deit'" in refusal(vc.preprocess, "deit")
  assert "tolerance" in refusal(lambda: vc.verify(dense, variables, dense, variables, images,
                                                  tolerance="x"))


def test_fold_reads_only_shapes_and_accepts_extra_collections():
  _, _, small, trained, _, folded, _ = three_forms()
  got = jax.jit(lambda variables: vc.fold(small, variables)[1])({**trained, "maps": {}})
  assert jax.tree.structure(got) == jax.tree.structure(folded)
