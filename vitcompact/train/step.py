"""One training step and one evaluation step, as functions of arrays, jitted over a mesh.

All randomness in a step comes from one key and the step number, and TrainState holds every
accumulated statistic: the state and the position in the data determine the rest of the run.
"""
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vitcompact import attention
from vitcompact.data import batch as device_batch
from vitcompact.train import losses, sharding
from vitcompact.train.objective import variables


@flax.struct.dataclass
class TrainState:
  """Everything that a step reads and writes. The averages are {} in a run without EMA.

  teacher: the teacher's variables, {} without one. No step changes them, but a resumed run needs
    the same ones.
  """
  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema_params: Any
  ema_batch_stats: Any
  key: jax.Array
  teacher: Any


def eval_variables(state: TrainState, eval_params: str):
  """The variables to evaluate: the trained ones for "raw", their averages for "ema"."""
  if eval_params == "ema":
    return variables(state.ema_params, state.ema_batch_stats)
  return variables(state.params, state.batch_stats)


def make_init(model, optimizer, image_shape, *, ema: bool, teacher=None):
  """A function key -> TrainState, in which the teacher's variables are 0. image_shape: (H, W, 3).
  """
  def init(key):
    init_key, step_key = jax.random.split(key)
    new = model.init(init_key, jnp.zeros((1, *image_shape)))
    params, stats = new["params"], new.get("batch_stats", {})
    # Copies, because the step donates its state and no buffer may be donated twice.
    averages = jax.tree.map(jnp.copy, (params, stats)) if ema else ({}, {})
    teacher_variables = {}
    if teacher is not None:
      shapes = jax.eval_shape(teacher.init, key, jnp.zeros((1, *image_shape)))
      teacher_variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), *averages,
                      step_key, teacher_variables)
  return init


def state_shardings(shapes: TrainState, rules, optimizer, mesh, teacher_rules=()) -> TrainState:
  """The sharding of every leaf of a state, from its shapes (`jax.eval_shape` of an init)."""
  params = sharding.parameters(shapes.params, rules, mesh)
  everywhere = sharding.replicated(mesh)

  def replicated(tree):
    return jax.tree.map(lambda _: everywhere, tree)

  teacher = replicated(shapes.teacher)
  if teacher:
    teacher["params"] = sharding.parameters(shapes.teacher["params"], teacher_rules, mesh)
  return TrainState(
      step=everywhere, params=params, batch_stats=replicated(shapes.batch_stats),
      opt_state=sharding.moments(optimizer, shapes.opt_state, params, mesh),
      ema_params=params if shapes.ema_params else {},
      ema_batch_stats=replicated(shapes.ema_batch_stats), key=everywhere, teacher=teacher)


def make_augment(data, mean, std, num_classes: int, accumulate: int, grid=None):
  """A function (key, batch) -> (float images, targets) of one microbatch.

  data: the config's section. As published, random erasing comes before mixing. With token labels,
  the targets are a pair: those of the images and those of the patches of `grid`.
  """
  def augment(key, batch):
    erase_key, mix_key = jax.random.split(key)
    images = device_batch.normalise(batch["image"], mean, std)
    if data.erase:
      images = device_batch.erase(erase_key, images, data.erase)
    if "label_map" in batch:
      return images, device_batch.label_targets(batch["label_map"], batch["label_box"],
                                                num_classes, data.smoothing, grid)
    targets = device_batch.one_hot_smooth(batch["label"], num_classes, data.smoothing)
    return device_batch.mix(mix_key, images, targets, mixup_alpha=data.mixup,
                            cutmix_alpha=data.cutmix, groups=max(1, data.replicas // accumulate))
  return augment


def make_gradients(objective, augment, accumulate: int, groups: int = 1):
  """A function (state, batch, key) -> (gradients, batch statistics, metrics with the loss).

  Gradients and metrics are means over `accumulate` microbatches; batch statistics are updated by
  one microbatch after another. The batch has `groups` groups, and no microbatch splits one.
  """
  def loss_with_aux(params, state, batch_stats, batch, key):
    augment_key, dropout_key = jax.random.split(key)
    images, targets = augment(augment_key, batch)
    loss, (batch_stats, metrics) = objective(params, batch_stats, state.teacher, images,
                                             batch["label"], targets, dropout_key)
    return loss, (batch_stats, {"loss": loss, **metrics})

  def microbatch_gradients(state, batch_stats, batch, key):
    (_, (batch_stats, metrics)), grads = jax.value_and_grad(loss_with_aux, has_aux=True)(
        state.params, state, batch_stats, batch, key)
    return batch_stats, (grads, metrics)

  def gradients(state, batch, key):
    microbatches = device_batch.microbatches(batch, accumulate, groups)
    if accumulate == 1:
      batch_stats, (grads, metrics) = microbatch_gradients(
          state, state.batch_stats, jax.tree.map(lambda x: x[0], microbatches),
          jax.random.fold_in(key, 0))
      return grads, batch_stats, metrics
    first = jax.tree.map(lambda x: x[0], microbatches)
    shapes = jax.eval_shape(microbatch_gradients, state, state.batch_stats, first, key)

    def add(carry, indexed):
      batch_stats, total = carry
      index, microbatch = indexed
      batch_stats, new = microbatch_gradients(state, batch_stats, microbatch,
                                              jax.random.fold_in(key, index))
      return (batch_stats, jax.tree.map(jnp.add, total, new)), None

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1])
    (batch_stats, total), _ = jax.lax.scan(add, (state.batch_stats, zero),
                                           (jnp.arange(accumulate), microbatches))
    grads, metrics = jax.tree.map(lambda x: x / accumulate, total)
    return grads, batch_stats, metrics

  return gradients


def make_train_step(objective, optimizer, rate, augment, *, accumulate: int, ema_decay: float,
                    groups: int = 1):
  """A function (state, batch) -> (state, metrics). With ema_decay=0 no averages are kept."""
  gradients = make_gradients(objective, augment, accumulate, groups)

  def average(old, new):
    return jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, old, new)

  def train_step(state: TrainState, batch):
    key = jax.random.fold_in(state.key, state.step)
    grads, batch_stats, metrics = gradients(state, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats,
                        opt_state=opt_state)
    if ema_decay:
      new = new.replace(ema_params=average(state.ema_params, params),
                        ema_batch_stats=average(state.ema_batch_stats, batch_stats))
    metrics |= {"grad_norm": optax.tree.norm(grads),
                "lr": jnp.asarray(rate(state.step), jnp.float32)}
    return new, metrics

  return train_step


def make_eval_step(model, mean, std):
  """A function (variables, batch) -> {metric: sum over the images whose `mask` is 1}."""
  def eval_step(model_variables, batch):
    logits = model.apply(model_variables, device_batch.normalise(batch["image"], mean, std))
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    correct = jnp.argmax(logits, axis=-1) == batch["label"]
    return {"loss": jnp.sum(losses.cross_entropy(logits, targets) * batch["mask"]),
            "accuracy": jnp.sum(correct * batch["mask"]), "count": jnp.sum(batch["mask"])}
  return eval_step


def jit_init(init, shardings):
  """Jits `init` so that every leaf is created sharded: no device ever holds the whole state.

  It runs once, so it is compiled with few optimisations: they would take longer than they save.
  """
  return jax.jit(init, out_shardings=shardings,
                 compiler_options={"xla_backend_optimization_level": 0})


def split_over(mesh, step):
  """The step, traced with its images split over the devices of a mesh."""
  def traced(*arguments):
    with attention.split_over(mesh.size):
      return step(*arguments)
  return traced


def jit_train_step(train_step, shardings, mesh):
  """The jitted step. It donates its state: use only the one that it returns."""
  return jax.jit(split_over(mesh, train_step), in_shardings=(shardings, sharding.batches(mesh)),
                 out_shardings=(shardings, sharding.replicated(mesh)), donate_argnums=0)


def jit_eval_step(eval_step, mesh):
  """The jitted evaluation step. Variables keep the sharding that they come with."""
  return jax.jit(split_over(mesh, eval_step), in_shardings=(None, sharding.batches(mesh)),
                 out_shardings=sharding.replicated(mesh))


@jax.jit
def all_finite(tree) -> jax.Array:
  """Whether all floats of a tree are finite."""
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
