"""One step of training and one of evaluation, as functions of arrays; jitted over a mesh.

All randomness of a step is folded from one key and the step's number, and every accumulated
statistic is part of TrainState: the state, and the position in the data, are the whole run.
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

  teacher: variables of the model that is learnt from, {} without one; no step changes them, but a
    run that goes on needs the same ones.
  """
  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema_params: Any
  ema_batch_stats: Any
  key: jax.Array
  teacher: Any


def selected(state: TrainState, eval_params: str):
  """The variables that `eval_params` ("raw" or "ema") names."""
  if eval_params == "ema":
    return variables(state.ema_params, state.ema_batch_stats)
  return variables(state.params, state.batch_stats)


def make_init(model, optimizer, image_shape, *, ema: bool, teacher=None):
  """A function key -> TrainState; image_shape: (H, W, 3). A teacher's variables are all 0."""
  def init(key):
    init_key, step_key = jax.random.split(key)
    new = model.init(init_key, jnp.zeros((1, *image_shape)))
    params, stats = new["params"], new.get("batch_stats", {})
    # Copies, because the step donates its state and no buffer may be given away twice.
    averages = jax.tree.map(jnp.copy, (params, stats)) if ema else ({}, {})
    teacher_variables = {}
    if teacher is not None:
      shapes = jax.eval_shape(teacher.init, key, jnp.zeros((1, *image_shape)))
      teacher_variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), *averages,
                      step_key, teacher_variables)
  return init


def state_shardings(shapes: TrainState, rules, optimizer, mesh, teacher_rules=()) -> TrainState:
  """Where every leaf of a state lies, from its shapes (`jax.eval_shape` of an init)."""
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

  data: the config's section. The order is the published one: each of two mixed images was erased
  before they were mixed. With labels of places, targets are a pair, of images and of the patches of
  `grid`.
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
  """A function (state, batch, key) -> (gradients, batch statistics, metrics), the loss among these.

  Means over `accumulate` microbatches, which batch statistics see one after another. Each
  is made of whole groups, of which the batch has `groups`.
  """
  def loss_with_aux(params, state, batch_stats, batch, key):
    augment_key, dropout_key = jax.random.split(key)
    images, targets = augment(augment_key, batch)
    loss, (batch_stats, metrics) = objective(params, batch_stats, state.teacher, images,
                                             batch["label"], targets, dropout_key)
    return loss, (batch_stats, {"loss": loss, **metrics})

  def one(state, batch_stats, batch, key):
    (_, (batch_stats, metrics)), grads = jax.value_and_grad(loss_with_aux, has_aux=True)(
        state.params, state, batch_stats, batch, key)
    return batch_stats, (grads, metrics)

  def gradients(state, batch, key):
    microbatches = device_batch.microbatches(batch, accumulate, groups)
    if accumulate == 1:
      batch_stats, (grads, metrics) = one(state, state.batch_stats,
                                          jax.tree.map(lambda x: x[0], microbatches),
                                          jax.random.fold_in(key, 0))
      return grads, batch_stats, metrics
    first = jax.tree.map(lambda x: x[0], microbatches)
    shapes = jax.eval_shape(one, state, state.batch_stats, first, key)

    def add(carry, part):
      batch_stats, total = carry
      index, part_batch = part
      batch_stats, new = one(state, batch_stats, part_batch, jax.random.fold_in(key, index))
      return (batch_stats, jax.tree.map(jnp.add, total, new)), None

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1])
    (batch_stats, total), _ = jax.lax.scan(add, (state.batch_stats, zero),
                                           (jnp.arange(accumulate), microbatches))
    grads, metrics = jax.tree.map(lambda x: x / accumulate, total)
    return grads, batch_stats, metrics

  return gradients


def make_train_step(objective, optimizer, rate, augment, *, accumulate: int, ema_decay: float,
                    groups: int = 1):
  """A function (state, batch) -> (state, metrics). ema_decay 0: no averages are kept."""
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
  """A function (variables, batch) -> sums over the images that `mask` counts."""
  def eval_step(model_variables, batch):
    logits = model.apply(model_variables, device_batch.normalise(batch["image"], mean, std))
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    correct = jnp.argmax(logits, axis=-1) == batch["label"]
    return {"loss": jnp.sum(losses.cross_entropy(logits, targets) * batch["mask"]),
            "accuracy": jnp.sum(correct * batch["mask"]), "count": jnp.sum(batch["mask"])}
  return eval_step


def jit_init(init, shardings):
  """Parameters are born where they will live: no device ever holds the whole state.

  It runs once, so the compiler need not try hard: that takes longer than it saves.
  """
  return jax.jit(init, out_shardings=shardings,
                 compiler_options={"xla_backend_optimization_level": 0})


def split_over(mesh, step):
  """The step, traced as one whose images lie on the devices of a mesh."""
  def traced(*arguments):
    with attention.split_over(mesh.size):
      return step(*arguments)
  return traced


def jit_train_step(train_step, shardings, mesh):
  """The state is donated: use only the one that comes back."""
  return jax.jit(split_over(mesh, train_step), in_shardings=(shardings, sharding.batches(mesh)),
                 out_shardings=(shardings, sharding.replicated(mesh)), donate_argnums=0)


def jit_eval_step(eval_step, mesh):
  """Variables lie as they come, as parameters and averages do in training."""
  return jax.jit(split_over(mesh, eval_step), in_shardings=(None, sharding.batches(mesh)),
                 out_shardings=sharding.replicated(mesh))


@jax.jit
def all_finite(tree) -> jax.Array:
  """Whether no leaf holds a NaN or an infinity."""
  floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
