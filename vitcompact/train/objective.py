"""What a step minimises: losses of labels, of a teacher, and of the plan's methods."""
import jax
import jax.numpy as jnp

from vitcompact.features import maps_of
from vitcompact.methods import protocol
from vitcompact.methods.protocol import FirstPhase, Pass
from vitcompact.models.token_logits import TokenLogits
from vitcompact.train import losses

PATCH_ERRORS = {"square": losses.token_square, "divergence": losses.token_divergence}


def variables(params, batch_stats):
  """The variables that `model.apply` takes; without batch norm there are no batch statistics."""
  return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})


def make_objective(model, loss, teacher=None, second=None):
  """A function (params, batch_stats, teacher variables, images, labels, targets, key) -> (loss,
  (batch statistics, {"accuracy", and every term of the loss before its weight})). A model without
  a classifier has no accuracy, and no terms of labels or logits.

  loss: the config's section of weights. A term of weight 0 is not computed, except `labels`.
    labels: cross entropy with the targets. patch_labels: cross entropy of patch logits (LV-ViT)
      with the patches' own targets if `targets` is a pair, else with those of their image.
    hard, soft: DeiT's distillation. If there is a distillation token, its logits learn from the
      teacher and the class token's from the labels only.
    logits: KL(teacher || student) of the predicted classes. patches: error of the surviving
      patches' normalised features or patch logits; `patch_error`: "square" or "divergence".
    attention: error of attention maps (`losses.mean_maps`), the mean over blocks whose maps have as
      many tokens as the teacher's. The maps are materialised, which takes time and memory.
    Other keys are losses of the plan's methods, by name.
  teacher: a model, run in inference mode on the same augmented and mixed images.
  second: the model under another plan, for a second forward pass with the same weights. It learns
    from the labels as well, and losses of methods may compare the two passes.
  """
  method_losses = {name: (method, fn) for method in model.plan.methods()
                   for name, fn in protocol.losses(method).items() if loss[name]}
  sown = {"tokens", *(name for method, _ in method_losses.values()
                      for name in protocol.collections(method)), *(["maps"] * bool(loss.attention))}

  def objective(params, batch_stats, teacher_variables, images, labels, targets, key):
    def forward(model, batch_stats, key):
      return model.apply(variables(params, batch_stats), images, train=True,
                         rngs={"dropout": key}, mutable=["batch_stats", *sorted(sown)])

    out, new = forward(model, batch_stats, key)
    distils = bool(loss.hard or loss.soft)
    terms, logits = label_terms(out, targets, loss, distils) if model.num_classes else ({}, out)
    if teacher is not None:
      terms |= teacher_terms(teacher, teacher_variables, images, out, logits, new, loss)
    first_pass = Pass(new, logits, labels)
    if second is not None:
      other, other_new = forward(second, new.get("batch_stats", {}), jax.random.fold_in(key, 1))
      other_terms, other_logits = (label_terms(other, targets, loss, distils) if model.num_classes
                                   else ({}, other))
      # Its terms have the same weights as those of the first pass.
      terms |= {f"{name}_second": term for name, term in other_terms.items()}
      first_pass = first_pass._replace(second=Pass(other_new, other_logits, labels))
      new = {**new, "batch_stats": other_new.get("batch_stats", {})}
    terms |= {name: jnp.mean(fn(first_pass)) for name, (_, fn) in method_losses.items()}
    total = sum(loss[name.removesuffix("_second")] * term for name, term in terms.items())
    metrics = {f"loss_{name}": term for name, term in terms.items()} if len(terms) > 1 else {}
    if model.num_classes:
      metrics["accuracy"] = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    return total, (new.get("batch_stats", {}), metrics)

  return objective


def by_replica(objective, groups: int):
  """An objective that splits the batch into `groups` equal slices and averages their results.

  It equals `groups` processes that average their gradients: batch statistics, MixToken's box and
  means over surviving patches are those of one slice. (Here running statistics are averaged as
  well, while those processes would keep the statistics of one of them.)
  """
  if groups == 1:
    return objective

  def grouped(params, batch_stats, teacher_variables, images, labels, targets, key):
    slices = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (images, labels, targets))
    out = jax.vmap(objective, in_axes=(None, None, None, 0, 0, 0, 0))(
        params, batch_stats, teacher_variables, *slices, jax.random.split(key, groups))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), out)

  return grouped


def couples_images(model, batch_stats, loss) -> bool:
  """Whether the gradient of an image depends on the other images of its replica."""
  by_method = any(loss[name] for method in model.plan.methods()
                  for name in protocol.losses_across(method))
  return bool(batch_stats or model.mixes_images or loss.patches or by_method)


def make_first_phase(model, phase: FirstPhase, weight: float, images_summed: int):
  """The objective of a method's first phase: `weight` times the phase's loss, and no other term.

  images_summed: the number of images in a replica, over which the loss is summed, as published
    (Sparsifiner).

  The network runs in inference mode, and its batch statistics do not change.
  """
  sown = sorted({name for method in model.plan.methods() if protocol.first_phase(method) is phase
                 for name in protocol.collections(method)})

  def objective(params, batch_stats, teacher_variables, images, labels, targets, key):
    del teacher_variables, targets, key
    logits, new = model.apply(variables(params, batch_stats), images, mutable=sown)
    error = phase.loss(new).mean()
    accuracy = {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels)}
    return (weight * images_summed * error,
            (batch_stats, accuracy if model.num_classes else {}))
  return objective


def label_terms(out, targets, loss, distils: bool):
  """({loss term of the labels: mean}, logits of the predicted classes)."""
  if isinstance(out, TokenLogits):
    targets, patch_targets = targets if isinstance(targets, tuple) else (targets, targets[:, None])
    mixed = out.share * targets + (1 - out.share) * targets[::-1]
    terms = {"labels": losses.cross_entropy(out.logits, mixed).mean()}
    if loss.patch_labels:
      by_patch = losses.cross_entropy(out.token_logits, patch_targets)
      terms["patch_labels"] = losses.over_survivors(by_patch, out.keep_mask).mean()
    return terms, out.logits
  heads = out if isinstance(out, tuple) else (out,)
  labelled = heads[:1] if distils else heads
  labels = sum(losses.cross_entropy(logits, targets).mean() for logits in labelled) / len(labelled)
  return {"labels": labels}, sum(logits.astype(jnp.float32) for logits in heads) / len(heads)


def teacher_terms(teacher, teacher_variables, images, out, student_logits, student_sown, loss):
  """{loss term of the teacher: mean}. out, student_logits, student_sown: the student's output, its
  logits of the predicted classes, and the collections that it sowed."""
  teacher_logits, teacher_sown = jax.lax.stop_gradient(
      teacher.apply(teacher_variables, images,
                    mutable=["tokens", *(["maps"] * bool(loss.attention))]))
  by_token = isinstance(out, TokenLogits)
  if by_token and "logits" in teacher_sown.get("tokens", {}):
    teacher_logits = teacher_sown["tokens"]["logits"][0]   # class token only, as in the student
  last = out[-1] if isinstance(out, tuple) and not by_token else student_logits
  terms = {}
  if loss.hard:
    terms["hard"] = losses.hard_distillation(last, teacher_logits).mean()
  if loss.soft:
    terms["soft"] = losses.soft_distillation(last, teacher_logits, loss.temperature).mean()
  if loss.logits:
    terms["logits"] = losses.divergence(student_logits, teacher_logits).mean()
  if loss.patches:
    student, keep_mask = ((out.token_logits, out.keep_mask) if by_token else
                          (student_sown["tokens"][name][0] for name in ("patches", "keep_mask")))
    target = teacher_sown["tokens"]["token_logits" if by_token else "patches"][0]
    terms["patches"] = PATCH_ERRORS[loss.patch_error](student, target, keep_mask).mean()
  if loss.attention:
    student_maps, teacher_maps = maps_of(student_sown), maps_of(teacher_sown)
    errors = [losses.mean_maps(maps, teacher_maps[name]).mean()
              for name, maps in student_maps.items()
              if name in teacher_maps and maps.shape[2:] == teacher_maps[name].shape[2:]]
    if not errors:
      raise ValueError(f"config.loss.attention={loss.attention}: no block of the student has maps "
                       "over the same tokens as the teacher's; set it to 0")
    terms["attention"] = sum(errors) / len(errors)
  return terms
