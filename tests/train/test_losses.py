"""The losses have the values of examples worked by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact.methods.tokens.mctf import consistency
from vitcompact.methods.tokens.predictor import kept_ratio
from vitcompact.train import losses

STUDENT = jnp.array([[1.0, 0, -1], [0.5, 2, 0]])
TEACHER = jnp.array([[2.0, 0, 0], [0, 1, 1]])
TARGETS = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])


def test_cross_entropy_accepts_soft_targets():
  assert losses.cross_entropy(STUDENT, TARGETS).mean() == pytest.approx(1.43198085, rel=1e-6)


def test_hard_distillation_takes_the_first_of_tied_classes():
  assert losses.hard_distillation(STUDENT, TEACHER).mean() == pytest.approx(0.35698086, rel=1e-6)


@pytest.mark.parametrize("temperature, expected", [(1.0, 0.07137231), (3.0, 0.07871204)])
def test_soft_distillation_is_divided_by_images_and_classes(temperature, expected):
  loss = losses.soft_distillation(STUDENT, TEACHER, temperature).mean()
  assert loss == pytest.approx(expected, rel=2e-6)


def test_losses_of_bfloat16_logits_are_computed_in_float32():
  logits = jnp.array([[10.0, 10.0625, 3]], jnp.bfloat16)
  loss = losses.cross_entropy(logits, jnp.array([[1.0, 0, 0]]))
  assert loss.dtype == jnp.float32
  z = np.array(logits, np.float64)[0]
  assert loss[0] == pytest.approx(np.log(np.exp(z - z[0]).sum()), rel=1e-6)


def test_divergence_is_kl_from_the_teacher():
  p, q = (np.exp(np.array(z)) / np.exp(np.array(z)).sum(1, keepdims=True) for z in
          (TEACHER, STUDENT))
  np.testing.assert_allclose(losses.divergence(STUDENT, TEACHER), (p * np.log(p / q)).sum(1),
                             rtol=1e-5)


def test_kept_ratio_is_the_squared_error_of_each_stage_and_image():
  keep_mask = [jnp.array([[1.0, 1, 1, 0], [1, 0, 0, 0]]), jnp.array([[1.0, 1, 0, 0], [0, 0, 0, 0]])]
  expected = [(0.05 ** 2 + 0.01 ** 2) / 2, (0.45 ** 2 + 0.49 ** 2) / 2]
  np.testing.assert_allclose(kept_ratio(keep_mask, (0.7, 0.49)), expected, rtol=1e-5)
  with pytest.raises(ValueError):
    kept_ratio(keep_mask, (0.7,))


def test_token_losses_are_means_over_surviving_tokens_of_the_batch():
  student, teacher = np.random.default_rng(0).normal(size=(2, 2, 4, 3)).astype(np.float32)
  keep_mask = np.array([[1.0, 1, 1, 0], [0, 0, 1, 0]])
  kept = keep_mask > 0
  square = losses.token_square(jnp.array(student), jnp.array(teacher), jnp.array(keep_mask))
  assert square.mean() == pytest.approx(((student - teacher)[kept] ** 2).mean(), rel=1e-5)
  kl = losses.token_divergence(jnp.array(student), jnp.array(teacher), jnp.array(keep_mask))
  expected = losses.divergence(jnp.array(student[kept]), jnp.array(teacher[kept])).mean()
  assert kl.mean() == pytest.approx(float(expected), rel=1e-5)
  assert not losses.token_square(jnp.array(student), jnp.array(teacher), jnp.zeros((2, 4))).any()


def test_token_losses_give_no_gradient_to_the_keep_mask():
  keep_mask = jnp.array([[1.0, 0, 1]])
  values = jnp.array([[1.0, jnp.inf, 3]])
  assert losses.over_survivors(values, keep_mask) == 2
  assert not jax.grad(lambda a: losses.over_survivors(values, a).sum())(keep_mask).any()


def test_consistency_covers_only_images_the_student_gets_right():
  logits = jnp.log(jnp.array([[0.5, 0.5], [0.3, 0.7], [0.39, 0.61]]))
  student, teacher = jnp.array([[1.0, 2], [3, 4], [5, 6]]), jnp.array([[0.0, 0], [1, 1], [2, 2]])
  labels = jnp.array([0, 1, 0])      # the third has probability 0.39, below 0.4

  def loss(student, teacher, labels):
    return consistency(student, teacher, logits, labels).mean()

  assert loss(student, teacher, labels) == pytest.approx((2.5 + 6.5) / 2)
  assert loss(student, teacher, jnp.array([1, 1, 1])) == pytest.approx((2.5 + 6.5 + 12.5) / 3)
  assert consistency(student[1:2], teacher[1:2], logits[1:2], jnp.array([0])) == 0
  grads = jax.grad(loss, argnums=(0, 1))(student, teacher, labels)
  assert grads[0][:2].any() and not grads[0][2].any() and not grads[1].any()
