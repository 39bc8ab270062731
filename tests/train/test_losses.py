"""The losses have the values of hand-made examples."""
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact.models.lvvit import TokenLogits
from vitcompact.train import losses

STUDENT = jnp.array([[1.0, 0, -1], [0.5, 2, 0]])
TEACHER = jnp.array([[2.0, 0, 0], [0, 1, 1]])
TARGETS = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])


def test_cross_entropy_takes_soft_targets():
  assert losses.cross_entropy(STUDENT, TARGETS).mean() == pytest.approx(1.43198085, rel=1e-6)


def test_hard_distillation_takes_the_first_of_equal_choices():
  assert losses.hard_distillation(STUDENT, TEACHER).mean() == pytest.approx(0.35698086, rel=1e-6)


@pytest.mark.parametrize("temperature, expected", [(1.0, 0.07137231), (3.0, 0.07871204)])
def test_soft_distillation_is_divided_by_images_and_classes(temperature, expected):
  loss = losses.soft_distillation(STUDENT, TEACHER, temperature).mean()
  assert loss == pytest.approx(expected, rel=2e-6)


def test_losses_are_computed_in_float32_from_bfloat16_logits():
  logits = jnp.array([[10.0, 10.0625, 3]], jnp.bfloat16)
  loss = losses.cross_entropy(logits, jnp.array([[1.0, 0, 0]]))
  assert loss.dtype == jnp.float32
  z = np.array(logits, np.float64)[0]
  assert loss[0] == pytest.approx(np.log(np.exp(z - z[0]).sum()), rel=1e-6)


def test_two_heads_learn_alike_and_guess_together():
  loss, logits = losses.classification((STUDENT, TEACHER), TARGETS)
  each = [losses.cross_entropy(head, TARGETS).mean() for head in (STUDENT, TEACHER)]
  assert loss == pytest.approx(float(sum(each)) / 2)
  np.testing.assert_allclose(logits, STUDENT + TEACHER)
  assert losses.classification(STUDENT, TARGETS)[0] == pytest.approx(float(each[0]))


def test_mixed_tokens_teach_the_class_token_the_mixture_and_each_patch_its_own_image():
  tokens = jnp.stack([STUDENT, 2 * STUDENT, TEACHER], axis=1)
  out = TokenLogits(STUDENT, tokens, jnp.float32(0.75))
  loss, logits = losses.classification(out, TARGETS, token_weight=0.5)
  mixed = 0.75 * TARGETS + 0.25 * TARGETS[jnp.array([1, 0])]
  patches = np.mean([losses.cross_entropy(tokens[:, i], TARGETS).mean() for i in range(3)])
  expected = losses.cross_entropy(STUDENT, mixed).mean() + 0.5 * patches
  assert loss == pytest.approx(float(expected))
  np.testing.assert_array_equal(logits, STUDENT)
