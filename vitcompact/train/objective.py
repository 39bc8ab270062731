"""What a step minimises: labels, a teacher, and what the methods of a plan ask for besides."""
import jax
import jax.numpy as jnp

from vitcompact.features import maps_of
from vitcompact.methods import protocol
from vitcompact.methods.protocol import FirstPhase, Pass
from vitcompact.models.lvvit import TokenLogits
from vitcompact.train import losses

PATCH_ERRORS = {"square": losses.token_square, "divergence": losses.token_divergence}


def variables(params, batch_stats):
  """What `model.apply` takes; models without batch norm have no such collection."""
  return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})


def make_objective(model, loss, teacher=None, second=None):
  """A function (params, batch_stats, teacher variables, images, labels, targets, key) -> (loss,
  (batch statistics, {"accuracy", and every term of the loss before its weight})). A model without
  a classifier has no accuracy, and no terms of labels or logits.

  loss: the config's section, of weights. Of terms of weight 0 only `labels` is computed.
    labels: cross entropy with the targets. patch_labels: of patch logits (LV-ViT), with targets of
      their own where `targets` is a pair, else with those of their image.
    hard, soft: DeiT's distillation, of the distillation token's logits where there is one; the
      class token's then learn from the labels only.
    logits: KL(teacher || student), of the class guess. patches: error of surviving patches,
      normalised features or patch logits, by `patch_error`: "square" or "divergence".
    attention: error of attention maps (`losses.mean_maps`), the mean over blocks whose maps have as
      many tokens as the teacher's; these are formed, which takes time and memory.
    Others are losses of the plan's methods, under their names.
  teacher: a model; in inference, on the same augmented and mixed images.
  second: the model under another plan. A second pass of it, with the same weights, learns from the
    labels as well, and losses of methods may compare the two.
  """
  asked = {name: (method, fn) for method in model.plan.methods()
           for name, fn in protocol.losses(method).items() if loss[name]}
  sown = {"tokens", *(name for method, _ in asked.values()
                      for name in protocol.collections(method)), *(["maps"] * bool(loss.attention))}

  def objective(params, batch_stats, teacher_variables, images, labels, targets, key):
    def passed(model, batch_stats, key):
      return model.apply(variables(params, batch_stats), images, train=True,
                         rngs={"dropout": key}, mutable=["batch_stats", *sorted(sown)])

    out, new = passed(model, batch_stats, key)
    distils = bool(loss.hard or loss.soft)
    terms, logits = of_labels(out, targets, loss, distils) if model.num_classes else ({}, out)
    if teacher is not None:
      terms |= of_teacher(teacher, teacher_variables, images, out, logits, new, loss)
    seen = Pass(new, logits, labels)
    if second is not None:
      other, other_new = passed(second, new.get("batch_stats", {}), jax.random.fold_in(key, 1))
      other_terms, other_logits = (of_labels(other, targets, loss, distils) if model.num_classes
                                   else ({}, other))
      # The second pass weighs like the first one.
      terms |= {f"{name}_second": term for name, term in other_terms.items()}
      seen = seen._replace(second=Pass(other_new, other_logits, labels))
      new = {**new, "batch_stats": other_new.get("batch_stats", {})}
    terms |= {name: jnp.mean(fn(seen)) for name, (_, fn) in asked.items()}
    total = sum(loss[name.removesuffix("_second")] * term for name, term in terms.items())
    shown = {f"loss_{name}": term for name, term in terms.items()} if len(terms) > 1 else {}
    if model.num_classes:
      shown["accuracy"] = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    return total, (new.get("batch_stats", {}), shown)

  return objective


def by_replica(objective, groups: int):
  """The objective of each of `groups` equal runs of a batch, and the means of what comes of them.

  As on `groups` processes that average their gradients: batch statistics, MixToken's box and means
  over surviving patches are of one run. (There, one process's running statistics are kept.)
  """
  if groups == 1:
    return objective

  def grouped(params, batch_stats, teacher_variables, images, labels, targets, key):
    runs = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (images, labels, targets))
    out = jax.vmap(objective, in_axes=(None, None, None, 0, 0, 0, 0))(
        params, batch_stats, teacher_variables, *runs, jax.random.split(key, groups))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), out)

  return grouped


def looks_across(model, batch_stats, loss) -> bool:
  """Whether what an image teaches depends on the others of its replica."""
  by_method = any(loss[name] for method in model.plan.methods()
                  for name in protocol.losses_across(method))
  return bool(batch_stats or model.mixes_images or loss.patches or by_method)


def make_first_phase(model, phase: FirstPhase, weight: float, images_summed: int):
  """The same kind of function for a method's first phase: `weight` times its loss.

  images_summed: the loss is summed over the images of a replica, as published (Sparsifiner).

  Nothing else has a gradient: the network runs as in inference, and its statistics stay.
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


def of_labels(out, targets, loss, distils: bool):
  """({term: mean}, logits of the class guess)."""
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


def of_teacher(teacher, teacher_variables, images, out, guess, new, loss):
  """{term: mean} of what is learnt from the teacher. out, guess, new: of the student."""
  teacher_logits, seen = jax.lax.stop_gradient(
      teacher.apply(teacher_variables, images,
                    mutable=["tokens", *(["maps"] * bool(loss.attention))]))
  by_token = isinstance(out, TokenLogits)
  if by_token and "logits" in seen.get("tokens", {}):
    teacher_logits = seen["tokens"]["logits"][0]   # of the class token only, as the student's
  last = out[-1] if isinstance(out, tuple) and not by_token else guess
  terms = {}
  if loss.hard:
    terms["hard"] = losses.hard_distillation(last, teacher_logits).mean()
  if loss.soft:
    terms["soft"] = losses.soft_distillation(last, teacher_logits, loss.temperature).mean()
  if loss.logits:
    terms["logits"] = losses.divergence(guess, teacher_logits).mean()
  if loss.patches:
    mine, keep_mask = ((out.token_logits, out.keep_mask) if by_token else
                   (new["tokens"][name][0] for name in ("patches", "keep_mask")))
    theirs = seen["tokens"]["token_logits" if by_token else "patches"][0]
    terms["patches"] = PATCH_ERRORS[loss.patch_error](mine, theirs, keep_mask).mean()
  if loss.attention:
    mine, theirs = maps_of(new), maps_of(seen)
    errors = [losses.mean_maps(maps, theirs[name]).mean() for name, maps in mine.items()
              if name in theirs and maps.shape[2:] == theirs[name].shape[2:]]
    if not errors:
      raise ValueError(f"config.loss.attention={loss.attention}: no block of the student has maps "
                       "of the same tokens as the teacher's; set it to 0")
    terms["attention"] = sum(errors) / len(errors)
  return terms
