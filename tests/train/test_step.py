"""One step: accumulation, averages, randomness, and what is counted."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests.tiny_run import weights
from vitcompact.train import losses, optim
from vitcompact.train import step as steps
from vitcompact.train.objective import make_objective
from vitcompact.train.sharding import make_mesh, put_batch

SGD = optim.optax.sgd(0.1)
LABELS = weights(labels=1.0)


class Toy(nn.Module):
  """A linear classifier, with batch norm or stochastic units on request."""
  plan: vc.Plan = vc.Plan()
  norm: bool = False
  dropout: float = 0.0
  heads: int = 1
  num_classes: int = 3

  @nn.compact
  def __call__(self, images, train=False):
    x = images.reshape(images.shape[0], -1)
    if self.norm:
      x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    logits = tuple(nn.Dense(3, name=f"head{i}")(x) for i in range(self.heads))
    return logits if self.heads > 1 and train else sum(logits) / self.heads


def plain(key, batch):
  del key
  return batch["image"].astype(jnp.float32) / 255, jax.nn.one_hot(batch["label"], 3)


def batch_of(count, seed=0):
  rng = np.random.default_rng(seed)
  return {"image": jnp.asarray(rng.integers(0, 256, (count, 2, 2, 3), np.uint8)),
          "label": jnp.asarray(rng.integers(0, 3, count, np.int32))}


def state_of(model, ema=False):
  return steps.make_init(model, SGD, (2, 2, 3), ema=ema)(jax.random.key(0))


def step_of(model, accumulate=1, ema_decay=0.0, augment=plain):
  objective = make_objective(model, LABELS)
  return jax.jit(steps.make_train_step(objective, SGD, lambda step: 0.1, augment,
                                       accumulate=accumulate, ema_decay=ema_decay))


def close(a, b, rtol=1e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def test_accumulation_equals_one_large_batch():
  state, batch = state_of(Toy()), batch_of(24)
  (single, one), (split, four) = (step_of(Toy(), n)(state, batch) for n in (1, 4))
  close(single.params, split.params)
  close(one, four)


def test_update_is_the_gradient_of_the_mean_loss():
  state, batch = state_of(Toy()), batch_of(6)

  def loss(params):
    logits = batch["image"].reshape(6, -1) / 255.0 @ params["head0"]["kernel"]
    log_p = jax.nn.log_softmax(logits + params["head0"]["bias"][None])
    return -log_p[jnp.arange(6), batch["label"]].mean()

  value, grads = jax.value_and_grad(loss)(state.params)
  new, metrics = step_of(Toy())(state, batch)
  close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads))
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
  assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_step_increments_its_counter_and_logs_the_rate_it_used():
  step = steps.make_train_step(make_objective(Toy(), LABELS), SGD, lambda step: 10.0 + step, plain,
                               accumulate=1, ema_decay=0.0)
  new, metrics = jax.jit(step)(state_of(Toy()).replace(step=jnp.array(3)), batch_of(6))
  assert (int(new.step), float(metrics["lr"])) == (4, 13.0)


def test_both_heads_of_a_distilled_model_learn_from_the_labels():
  model, batch = Toy(heads=2), batch_of(6)
  state = state_of(model)
  new, metrics = step_of(model)(state, batch)
  logits, _ = model.apply({"params": state.params}, plain(None, batch)[0], train=True,
                          mutable=["batch_stats"])
  head_losses = [losses.cross_entropy(z, jax.nn.one_hot(batch["label"], 3)).mean() for z in logits]
  assert metrics["loss"] == pytest.approx(np.mean(head_losses), rel=1e-5)
  for head in ("head0", "head1"):
    assert np.any(new.params[head]["kernel"] != state.params[head]["kernel"])


def test_batch_statistics_are_updated_by_one_microbatch_after_another():
  """Microbatch i of 2 has the images i, i + 2, i + 4, ... of the batch."""
  state, batch = state_of(Toy(norm=True)), batch_of(12)
  new, _ = step_of(Toy(norm=True), accumulate=2)(state, batch)
  mean = np.zeros(12)
  for part in range(2):
    rows = np.asarray(batch["image"], np.float32).reshape(12, -1)[part::2] / 255
    mean = 0.9 * mean + 0.1 * rows.mean(axis=0)
  np.testing.assert_allclose(new.batch_stats["norm"]["mean"], mean, rtol=1e-5)


def test_average_moves_towards_the_new_parameters_and_statistics():
  model, batch = Toy(norm=True), batch_of(12)
  state = state_of(model, ema=True)
  close(state.ema_params, state.params, rtol=0)
  new, _ = step_of(model, ema_decay=0.75)(state, batch)
  for old, fresh, average in ((state.params, new.params, new.ema_params),
                              (state.batch_stats, new.batch_stats, new.ema_batch_stats)):
    close(average, jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, old, fresh))
    assert any(np.any(a != b) for a, b in zip(
        jax.tree.leaves(average), jax.tree.leaves(fresh), strict=True))


def test_randomness_depends_only_on_the_key_and_the_step():
  model, batch = Toy(dropout=0.5), batch_of(12)
  state, step = state_of(model), step_of(model)
  loss = lambda state: float(step(state, batch)[1]["loss"])  # noqa: E731
  assert loss(state) == loss(state)
  assert loss(state) != loss(state.replace(step=state.step + 1))
  assert loss(state) != loss(state.replace(key=jax.random.key(9)))


def test_each_microbatch_has_its_own_random_numbers():
  def objective(params, batch_stats, teacher, images, labels, targets, key):
    drawn = jax.random.uniform(key)
    return 0 * sum(map(jnp.sum, jax.tree.leaves(params))), (
        batch_stats, {"mean": drawn, "square": drawn ** 2})

  gradients = steps.make_gradients(objective, plain, accumulate=4)
  _, _, metrics = gradients(state_of(Toy()), batch_of(8), jax.random.key(0))
  assert metrics["square"] - metrics["mean"] ** 2 > 1e-3


def test_accuracy_uses_the_label_even_with_mixed_targets():
  def swapped(key, batch):
    images, _ = plain(key, batch)
    return images, jax.nn.one_hot((batch["label"] + 1) % 3, 3)

  state, batch = state_of(Toy()), batch_of(12)
  _, metrics = step_of(Toy(), augment=swapped)(state, batch)
  guess = np.argmax(Toy().apply({"params": state.params}, batch["image"] / 255.0), axis=-1)
  assert metrics["accuracy"] == pytest.approx(np.mean(guess == batch["label"]))


def test_evaluation_counts_exactly_the_images_in_the_mask():
  model, batch = Toy(), batch_of(8)
  state, mesh = state_of(model), make_mesh({"data": -1})
  evaluate = steps.jit_eval_step(steps.make_eval_step(model, (0.0,) * 3, (1.0,) * 3), mesh)
  mask = np.array([1, 1, 1, 0, 1, 0, 1, 0], np.float32)
  logits = model.apply({"params": state.params}, batch["image"] / 255.0)
  # Padding with labels that would count as correct.
  batch["label"] = jnp.where(mask > 0, batch["label"], jnp.argmax(logits, axis=-1))
  sums = evaluate(steps.variables(state.params, {}), put_batch(batch | {"mask": mask}, mesh))
  hits = np.argmax(logits, -1) == np.asarray(batch["label"])
  nll = -np.asarray(jax.nn.log_softmax(logits))[np.arange(8), batch["label"]]
  assert (sums["count"], sums["accuracy"]) == (5, (hits * mask).sum())
  assert sums["loss"] == pytest.approx((nll * mask).sum(), rel=1e-5)


def test_is_finite_checks_every_leaf():
  assert steps.all_finite({"a": jnp.ones(3), "b": jnp.zeros((), jnp.int32)})
  assert not steps.all_finite({"a": jnp.ones(3), "b": jnp.array([0, np.inf])})
