"""What a step minimises: labels, a teacher, and what the methods of a plan ask for besides."""
import jax
import jax.numpy as jnp

from vitcompact.models.lvvit import TokenLogits
from vitcompact.train import losses

PATCH_ERRORS = {"square": losses.token_square, "divergence": losses.token_divergence}


def variables(params, batch_stats):
  """What `model.apply` takes; models without batch norm have no such collection."""
  return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})


def make_objective(model, loss, teacher=None, companion=None):
  """A function (params, batch_stats, teacher variables, images, labels, targets, key) -> (loss,
  (batch statistics, {"accuracy", and every part of the loss before its weight})).

  loss: the config's section, of weights. Of parts of weight 0 only `labels` is computed.
    labels: cross entropy with the targets. patch_labels: of LV-ViT's patches, with targets of their
      own where `targets` is a pair, else with those of their image.
    hard, soft: DeiT's distillation, of the distillation token's logits where there is one; the
      class token's then learn from the labels alone.
    logits: KL(teacher || student), of the class guess. patches: error of surviving patches,
      normalised features or LV-ViT's logits, by `patch_error`: "square" or "divergence".
    kept_ratio: DynamicViT's. consistency: MCTF's, with a second pass of the `companion`, the same
      weights under another plan, which learns from the labels as well.
  teacher: a model; in inference, on the same augmented and mixed images.
  """
  def objective(params, batch_stats, teacher_variables, images, labels, targets, key):
    def passed(model, batch_stats, key):
      return model.apply(variables(params, batch_stats), images, train=True,
                         rngs={"dropout": key}, mutable=["batch_stats", "tokens"])

    out, new = passed(model, batch_stats, key)
    distils = bool(loss.hard or loss.soft)
    parts, logits = of_labels(out, targets, loss, distils)
    if teacher is not None:
      parts |= of_teacher(teacher, teacher_variables, images, out, logits, new, loss)
    if loss.kept_ratio:
      parts["kept_ratio"] = losses.kept_ratio(stage_masks(new["tokens"]),
                                              model.plan.tokens.shares()).mean()
    if loss.consistency:
      other, other_new = passed(companion, new.get("batch_stats", {}),
                                jax.random.fold_in(key, 1))
      other_parts, _ = of_labels(other, targets, loss, distils)
      # The second pass weighs like the first one.
      parts |= {f"{name}_companion": part for name, part in other_parts.items()}
      parts["consistency"] = losses.consistency(_class_token(new), _class_token(other_new), logits,
                                                labels).mean()
      new = {**new, "batch_stats": other_new.get("batch_stats", {})}
    total = sum(loss[name.removesuffix("_companion")] * part for name, part in parts.items())
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    shown = {f"loss_{name}": part for name, part in parts.items()} if len(parts) > 1 else {}
    return total, (new.get("batch_stats", {}), {"accuracy": accuracy, **shown})

  return objective


def by_replica(objective, groups: int):
  """The objective of each of `groups` equal runs of a batch, and the means of what comes of them.

  As on so many processes that average their gradients: batch statistics, MixToken's box and means
  over surviving patches are of a run alone. (There, one process's running statistics are kept.)
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
  return bool(batch_stats or getattr(model, "mix_token", False) or loss.patches or loss.consistency)


def make_reconstruction(model, weight: float, images_summed: int):
  """The same kind of function for predictors of links: `weight` times the squared error of their
  scores against the dense attention of the same weights.

  images_summed: the published loss is the sum over the images of a replica.

  Nothing else has a gradient: the network runs as in inference, and its statistics stay.
  """
  def objective(params, batch_stats, teacher_variables, images, labels, targets, key):
    del teacher_variables, targets, key
    logits, new = model.apply(variables(params, batch_stats), images, mutable=["attention"])
    error = losses.attention_reconstruction(new.get("attention", {})).mean()
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    return weight * images_summed * error, (batch_stats, {"accuracy": accuracy})
  return objective


def stage_masks(tokens) -> list[jax.Array]:
  """Of the collection "tokens": (B, P) for each stage of DynamicViT, which patches it kept."""
  found = {int(name.removeprefix("blocks_")): block["predict_tokens"]["keep_mask"][0]
           for name, block in tokens.items() if name.startswith("blocks_")
           and "predict_tokens" in block}
  return [found[block] for block in sorted(found)]


def _class_token(new):
  return new["tokens"]["prefix"][0][:, 0]


def of_labels(out, targets, loss, distils: bool):
  """({part: mean}, logits of the class guess)."""
  if isinstance(out, TokenLogits):
    targets, patch_targets = targets if isinstance(targets, tuple) else (targets, targets[:, None])
    mixed = out.share * targets + (1 - out.share) * targets[::-1]
    parts = {"labels": losses.cross_entropy(out.logits, mixed).mean()}
    if loss.patch_labels:
      by_patch = losses.cross_entropy(out.token_logits, patch_targets)
      parts["patch_labels"] = losses.over_survivors(by_patch, out.keep_mask).mean()
    return parts, out.logits
  heads = out if isinstance(out, tuple) else (out,)
  taught = heads[:1] if distils else heads
  labels = sum(losses.cross_entropy(logits, targets).mean() for logits in taught) / len(taught)
  return {"labels": labels}, sum(logits.astype(jnp.float32) for logits in heads) / len(heads)


def of_teacher(teacher, teacher_variables, images, out, guess, new, loss):
  """{part: mean} of what is learnt from the teacher. out, guess, new: of the student."""
  taught, seen = jax.lax.stop_gradient(
      teacher.apply(teacher_variables, images, mutable=["tokens"]))
  by_token = isinstance(out, TokenLogits)
  if by_token and "logits" in seen.get("tokens", {}):
    taught = seen["tokens"]["logits"][0]   # of the class token alone, as the student's
  last = out[-1] if isinstance(out, tuple) and not by_token else guess
  parts = {}
  if loss.hard:
    parts["hard"] = losses.hard_distillation(last, taught).mean()
  if loss.soft:
    parts["soft"] = losses.soft_distillation(last, taught, loss.temperature).mean()
  if loss.logits:
    parts["logits"] = losses.divergence(guess, taught).mean()
  if loss.patches:
    mine, keep_mask = ((out.token_logits, out.keep_mask) if by_token else
                   (new["tokens"][name][0] for name in ("patches", "keep_mask")))
    theirs = seen["tokens"]["token_logits" if by_token else "patches"][0]
    parts["patches"] = PATCH_ERRORS[loss.patch_error](mine, theirs, keep_mask).mean()
  return parts
