"""The losses have the values of hand-made examples."""
import jax.numpy as jnp
import numpy as np
import pytest

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
