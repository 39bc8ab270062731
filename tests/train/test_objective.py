"""A step minimises the objectives of the papers, and changes nothing else."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vitcompact as vc
from tests import tiny
from tests.tiny_run import weights
from vitcompact import trees
from vitcompact.methods.attention.sparsifiner import attention_reconstruction
from vitcompact.models.token_logits import TokenLogits
from vitcompact.train import losses
from vitcompact.train.objective import (
  by_replica,
  couples_images,
  label_terms,
  make_first_phase,
  make_objective,
  variables,
)

STUDENT = jnp.array([[1.0, 0, -1], [0.5, 2, 0]])
TEACHER = jnp.array([[2.0, 0, 0], [0, 1, 1]])
TARGETS = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
LABELS = jnp.array([0, 3, 1])


def deit(plan=None, **fields):
  return tiny.deit(plan, depth=1, drop_path_rate=0.0, **fields)


def run(model, loss, teacher=None, second=None, student=None, labels=LABELS):
  """Returns (loss and metrics, gradients, student's variables, teacher's), for three images."""
  student = student or tiny.init(model)
  teacher_variables = {} if teacher is None else tiny.init(teacher, seed=2)
  targets = jax.nn.one_hot(labels, 5)

  def total(params):
    return make_objective(model, loss, teacher, second)(
        params, student.get("batch_stats", {}), teacher_variables, tiny.images(model), labels,
        targets, jax.random.key(3))

  (value, (_, metrics)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(student["params"])
  return (value, metrics), grads, student, teacher_variables


def test_without_a_teacher_the_label_loss_averages_both_heads():
  metrics, logits = label_terms((STUDENT, TEACHER), TARGETS, weights(labels=1.0), distils=False)
  per_head = [losses.cross_entropy(head, TARGETS).mean() for head in (STUDENT, TEACHER)]
  assert metrics["labels"] == pytest.approx(float(sum(per_head)) / 2)
  np.testing.assert_allclose(logits, (STUDENT + TEACHER) / 2)
  distilled, _ = label_terms((STUDENT, TEACHER), TARGETS, weights(labels=1.0), distils=True)
  assert distilled["labels"] == pytest.approx(float(per_head[0]))


def test_mixtoken_targets_mix_for_the_class_token_and_follow_images_for_patches():
  tokens = jnp.stack([STUDENT, 2 * STUDENT, TEACHER], axis=1)
  keep_mask = jnp.array([[1.0, 1, 0], [1, 1, 1]])
  out = TokenLogits(STUDENT, tokens, jnp.float32(0.75), keep_mask)
  metrics, logits = label_terms(out, TARGETS, weights(patch_labels=0.5), distils=False)
  mixed = 0.75 * TARGETS + 0.25 * TARGETS[jnp.array([1, 0])]
  per_token = np.stack([losses.cross_entropy(tokens[:, i], TARGETS) for i in range(3)], axis=1)
  assert metrics["labels"] == pytest.approx(float(losses.cross_entropy(STUDENT, mixed).mean()))
  assert metrics["patch_labels"] == pytest.approx(per_token[np.asarray(keep_mask) > 0].mean())
  np.testing.assert_array_equal(logits, STUDENT)


def test_label_maps_give_each_patch_its_own_target():
  tokens = jnp.stack([STUDENT, TEACHER], axis=1)
  patch_targets = jnp.stack([TARGETS, TARGETS[::-1]], axis=1)
  out = TokenLogits(STUDENT, tokens, jnp.float32(1), jnp.ones((2, 2)))
  metrics, _ = label_terms(out, (TARGETS, patch_targets), weights(patch_labels=1.0), distils=False)
  expected = [losses.cross_entropy(tokens[:, i], patch_targets[:, i]).mean() for i in (0, 1)]
  assert metrics["labels"] == pytest.approx(float(losses.cross_entropy(STUDENT, TARGETS).mean()))
  assert metrics["patch_labels"] == pytest.approx(float(np.mean(expected)))


def test_distillation_trains_only_the_second_head():
  model = deit(name="deit_tiny_distilled_patch16_224")
  teacher = deit()
  (value, metrics), grads, student, teacher_variables = run(
      model, weights(labels=0.5, hard=0.5), teacher)
  images = tiny.images(model)
  heads = tiny.apply(model, student, images, train=True, rngs={"dropout": jax.random.key(3)})
  target = tiny.apply(teacher, teacher_variables, images)
  labels = losses.cross_entropy(heads[0], jax.nn.one_hot(LABELS, 5)).mean()
  hard = losses.hard_distillation(heads[1], target).mean()
  assert value == pytest.approx(float(0.5 * labels + 0.5 * hard), rel=1e-5)
  assert set(metrics) == {"accuracy", "loss_labels", "loss_hard"}
  assert np.any(grads["head_dist"]["kernel"])


def test_attention_maps_are_compared_as_head_means_in_blocks_with_equal_tokens():
  """In the second of two blocks the student has fewer tokens, so its maps are not compared."""
  model = tiny.deit(vc.Plan(heads=vc.HMHSA(), tokens=vc.ToMe(r=4)), drop_path_rate=0.0)
  teacher = model.clone(plan=vc.Plan())
  (value, metrics), grads, student, teacher_variables = run(
      model, weights(labels=1.0, attention=0.5), teacher)
  mine, theirs = (tiny.features(*pair, tiny.images(model), True).maps["blocks_0"].mean(axis=1)
                  for pair in ((model, student), (teacher, teacher_variables)))
  error = np.sum((mine - theirs) ** 2, axis=(1, 2)) / np.sum(theirs ** 2, axis=(1, 2))
  expected = float(np.mean(error))
  assert expected > 0.01
  assert metrics["loss_attention"] == pytest.approx(expected, rel=1e-4)
  assert value == pytest.approx(float(metrics["loss_labels"]) + 0.5 * expected, rel=1e-5)
  assert np.abs(grads["blocks_0"]["attn"]["query"]["kernel"]).max() > 0


def test_attention_loss_without_any_block_of_equal_tokens_is_rejected():
  model = deit()
  with pytest.raises(ValueError, match=r"config.loss.attention=1.0: no block of the student has"):
    run(model, weights(attention=1.0), deit(patch_size=16))


@pytest.mark.parametrize("name, patch_error", [
    ("deit_tiny_patch16_224", "square"), ("lvvit_t", "square"), ("lvvit_t", "divergence")])
def test_sparse_fine_tuning_uses_labels_logits_and_patches_not_predictors(name, patch_error):
  plan = vc.Plan(attention=vc.Sparsifiner(keep=0.3, rank=4))
  fields = {"mix_token": False} if name == "lvvit_t" else {}
  model = deit(plan, name=name, **fields)
  teacher = model.clone(plan=vc.Plan())
  (value, metrics), grads, student, teacher_variables = run(
      model, weights(labels=1.0, logits=0.5, patches=0.25, patch_error=patch_error), teacher)
  assert value == pytest.approx(float(metrics["loss_labels"] + 0.5 * metrics["loss_logits"] +
                                      0.25 * metrics["loss_patches"]), rel=1e-5)
  # From the definitions: patch by patch, each against the teacher's at the same position.
  out, mine = tiny.apply(model, student, tiny.images(model), train=True,
                         rngs={"dropout": jax.random.key(3)}, mutable=["tokens", "batch_stats"])
  said, theirs = tiny.apply(teacher, teacher_variables, tiny.images(model), mutable=["tokens"])
  if name == "lvvit_t":
    guess, patches, theirs = out.logits, out.token_logits, theirs["tokens"]
    said, expected = theirs["logits"][0], theirs["token_logits"][0]
  else:
    guess, patches, expected = out, *(new["tokens"]["patches"][0] for new in (mine, theirs))
  assert metrics["loss_logits"] == pytest.approx(float(losses.divergence(guess, said).mean()),
                                                 rel=1e-4)
  error = ((patches - expected) ** 2 if patch_error == "square" else
           losses.divergence(patches, expected))
  assert metrics["loss_patches"] == pytest.approx(float(error.mean()), rel=1e-4)
  assert np.abs(patches - patches[:, ::-1]).max() > 0.01   # otherwise the order would not show
  for leaf, grad in trees.named_leaves(grads).items():
    assert np.any(grad) != ("/links/" in leaf), leaf


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "lvvit_t"])
@pytest.mark.parametrize("tokens", [None, vc.EViT(keep=0.5, blocks=(0,))])
def test_student_equal_to_its_teacher_has_no_distillation_loss(name, tokens):
  """Nor if patches are dropped after the last attention, since the others equal the teacher's."""
  fields = {"mix_token": False} if name == "lvvit_t" else {}
  model = deit(vc.Plan(tokens=tokens), name=name, **fields)
  student = tiny.init(model)
  objective = make_objective(model, weights(labels=1.0, logits=1.0, patches=1.0),
                             model.clone(plan=vc.Plan()))
  stats = student.get("batch_stats", {})
  teacher_variables = variables(student["params"], stats)
  _, (_, metrics) = jax.jit(objective)(
      student["params"], stats, teacher_variables, tiny.images(model), LABELS,
      jax.nn.one_hot(LABELS, 5), jax.random.key(0))
  if name == "lvvit_t":   # in training, its batch norms use batch statistics
    assert np.isfinite(metrics["loss_patches"])
  else:
    assert abs(metrics["loss_logits"]) < 1e-6
    assert metrics["loss_patches"] < 1e-6


def test_dynamicvit_learns_how_many_patches_to_keep():
  model = deit(vc.Plan(tokens=vc.DynamicViT(keep=0.5, blocks=(0,))))
  (value, metrics), grads, student, _ = run(model, weights(kept_ratio=2.0))
  _, new = tiny.apply(model, student, tiny.images(model), train=True,
                      rngs={"dropout": jax.random.key(3)},
                       mutable=["tokens"])
  kept = new["tokens"]["blocks_0"]["predict_tokens"]["keep_mask"][0].mean(axis=1)
  expected = float(np.mean((kept - 0.5) ** 2))
  assert metrics["loss_kept_ratio"] == pytest.approx(expected, rel=1e-5)
  assert value == pytest.approx(2 * expected, rel=1e-5)
  assert np.any(grads["blocks_0"]["predict_tokens"]["out3"]["kernel"])


@pytest.mark.parametrize("r", [3, 0])
def test_mctf_is_consistent_with_itself_but_not_with_a_pass_that_merges_less(r):
  model = deit(vc.Plan(tokens=vc.MCTF(r=3, blocks=(0,))))
  second = model.clone(plan=vc.Plan(tokens=vc.MCTF(r=r, blocks=(0,))))
  student = tiny.init(model, 7)
  student["params"]["head"] = jax.tree.map(lambda leaf: 4 * leaf, student["params"]["head"])
  passes = [tiny.apply(net, student, tiny.images(net), train=True,
                       rngs={"dropout": jax.random.key(3)},
                      mutable=["tokens"]) for net in (model, second)]
  labels = jnp.argmax(passes[0][0], axis=-1).at[0].set(jnp.argmin(passes[0][0][0]))
  (value, metrics), *_ = run(model, weights(labels=2.0, consistency=3.0), second=second,
                                    student=student, labels=labels)
  assert value == pytest.approx(float(
      2 * metrics["loss_labels"] + 2 * metrics["loss_labels_second"] +
      3 * metrics["loss_consistency"]), rel=1e-5)
  for name, (logits, _) in zip(("loss_labels", "loss_labels_second"), passes, strict=True):
    expected = losses.cross_entropy(logits, jax.nn.one_hot(labels, 5)).mean()
    assert metrics[name] == pytest.approx(float(expected), rel=1e-4)
  # The first image is misclassified and excluded; the others count the class tokens' distance.
  sure = jax.nn.softmax(passes[0][0])[jnp.arange(3), labels] > 0.4
  assert not sure[0] and sure.any()
  mine, other = (new["tokens"]["prefix"][0][:, 0] for _, new in passes)
  expected = float(((mine - other) ** 2).mean(axis=-1)[sure].mean())
  assert metrics["loss_consistency"] == pytest.approx(expected, rel=1e-4)
  assert (expected > 1e-6) == (r != 3)


def test_second_pass_follows_the_first_with_its_own_random_numbers():
  """It starts from the first pass's batch statistics, and its own are kept."""
  plan = vc.Plan(tokens=vc.MCTF(r=3, blocks=(0,)), ffn=vc.CFFN())
  model = tiny.deit(plan, drop_path_rate=0.5)
  second = model.clone(plan=vc.Plan(tokens=vc.MCTF(r=1, blocks=(0,)), ffn=vc.CFFN()))
  student, key, targets = tiny.init(model), jax.random.key(3), jax.nn.one_hot(LABELS, 5)

  def run_pass(model, stats, key):
    logits, new = tiny.apply(model, variables(student["params"], stats), tiny.images(model),
                             train=True,
                              rngs={"dropout": key}, mutable=["batch_stats"])
    return losses.cross_entropy(logits, targets).mean(), new["batch_stats"]

  first, stats = jax.jit(run_pass, static_argnums=0)(model, student["batch_stats"], key)
  other, stats = jax.jit(run_pass, static_argnums=0)(second, stats, jax.random.fold_in(key, 1))
  objective = make_objective(model, weights(labels=1.0), second=second)
  _, (got, metrics) = jax.jit(objective)(student["params"], student["batch_stats"], {},
                                         tiny.images(model), LABELS, targets, key)
  assert metrics["loss_labels"] == pytest.approx(float(first), rel=1e-4)
  assert metrics["loss_labels_second"] == pytest.approx(float(other), rel=1e-4)
  for mine, expected in zip(*map(jax.tree.leaves, (got, stats)), strict=True):
    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


def test_soft_distillation_uses_the_temperature_of_the_config():
  model, teacher = deit(name="deit_tiny_distilled_patch16_224"), deit()
  (value, metrics), _, student, teacher_variables = run(
      model, weights(soft=0.5, temperature=3.0), teacher)
  heads = tiny.apply(model, student, tiny.images(model), train=True,
                     rngs={"dropout": jax.random.key(3)})
  target = tiny.apply(teacher, teacher_variables, tiny.images(model))
  expected = float(losses.soft_distillation(heads[1], target, 3.0).mean())
  assert metrics["loss_soft"] == pytest.approx(expected, rel=1e-4)
  assert value == pytest.approx(0.5 * expected, rel=1e-4)


def test_couples_images_is_true_if_images_of_a_batch_interact():
  mctf = deit(vc.Plan(tokens=vc.MCTF(r=3, blocks=(0,))))
  for model, stats, loss, expected in [
      (deit(), {}, weights(labels=1.0, logits=1.0), False), (deit(), {"a": 1}, weights(), True),
      (deit(), {}, weights(patches=1.0), True), (mctf, {}, weights(labels=1.0), False),
      (mctf, {}, weights(consistency=1.0), True),
      (deit(name="lvvit_t"), {}, weights(labels=1.0), True)]:
    assert couples_images(model, stats, loss) == expected


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_reconstruction_trains_only_the_predictors(granularity):
  method = vc.Sparsifiner(granularity=granularity, min_tokens=0, rank=4, window=2, masked=False)
  model = deit(vc.Plan(attention=method, ffn=vc.CFFN()))
  student = tiny.init(model)

  def total(params):
    return make_first_phase(model, vc.Sparsifiner.first_phase, 0.01, 3)(
        params, student["batch_stats"], {}, tiny.images(model), LABELS, None, None)

  (value, (stats, metrics)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(
      student["params"])
  assert value > 0 and set(metrics) == {"accuracy"}
  _, sown = tiny.apply(model, student, tiny.images(model), mutable=["attention"])
  error = attention_reconstruction(sown["attention"]).mean()
  np.testing.assert_allclose(value, 0.01 * 3 * error, rtol=1e-5)   # summed over three images
  for old, new in zip(*map(jax.tree.leaves, (student["batch_stats"], stats)), strict=True):
    np.testing.assert_array_equal(old, new)
  for leaf, grad in trees.named_leaves(grads).items():
    assert np.any(grad) == ("/links/" in leaf), leaf


def test_replicas_have_separate_statistics_and_losses():
  model = deit(vc.Plan(ffn=vc.CFFN()))
  student, objective = tiny.init(model), make_objective(model, weights(labels=1.0))
  images = tiny.images(model, batch=4)
  labels = jnp.array([0, 3, 1, 2])

  def evaluate(objective, part):
    return objective(student["params"], student["batch_stats"], {}, images[part], labels[part],
                     jax.nn.one_hot(labels[part], 5), jax.random.key(0))

  split, (stats, metrics) = evaluate(by_replica(objective, 2), slice(0, 4))
  halves = [evaluate(objective, part) for part in (slice(0, 2), slice(2, 4))]
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
  for got, expected in zip(*map(jax.tree.leaves, ((split, (stats, metrics)), mean)), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  joint, _ = evaluate(objective, slice(0, 4))
  assert abs(joint - split) > 1e-4


def test_replicas_have_separate_random_numbers():
  def random_objective(params, batch_stats, teacher, images, labels, targets, key):
    return jax.random.uniform(key), ({}, {})

  key, rows = jax.random.key(3), jnp.zeros((4, 1))
  loss, _ = by_replica(random_objective, 2)({}, {}, {}, rows, rows, rows, key)
  expected = np.mean([jax.random.uniform(one) for one in jax.random.split(key, 2)])
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert loss != jax.random.uniform(jax.random.split(key, 2)[0])
