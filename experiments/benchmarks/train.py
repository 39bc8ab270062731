"""Times a training step of DeiT-S with AdamW: dense, compact, plain Linen + Optax, and PyTorch."""
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax

import vitcompact as vc
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Setting
from experiments.benchmarks.model import MODEL
from experiments.plain_deit import PlainDeiT
from vitcompact.count import macs_of

BARE = vc.CFFN(branches=1, rep="none", avg_skip=False)
PLANS = {
    "dense": vc.Plan(),
    "ffn, one bare branch": vc.Plan(ffn=BARE),
    "heads + ffn": vc.Plan(heads=vc.HMHSA(), ffn=vc.CFFN()),
    "heads + ffn, one bare branch": vc.Plan(heads=vc.HMHSA(), ffn=BARE),
}
HOST_PEERS = ("torch f32, SDPA", "torch bf16")
DEVICE_PEERS = ("torch bf16", "torch.compile bf16")
HOST_BATCH, DEVICE_BATCH = 8, 256


def run(setting: Setting, batch: int | None = None, **sizes) -> Iterator[dict]:
  batch = batch or (HOST_BATCH if setting.on_host else DEVICE_BATCH)
  optimizer, candidates = optax.adamw(1e-3, weight_decay=0.05), {}
  for name, plan in PLANS.items():
    model = vc.create_model(MODEL, plan=plan, dtype=setting.dtype, **sizes)
    candidates[name] = _candidate(model, optimizer, batch, model.image_size,
                                  macs=training_macs(model))
    if name == "dense":
      dense = model
      plain = PlainDeiT(model.width, model.depth, model.heads, patch_size=model.patch_size)
      candidates["plain Linen + Optax"] = _candidate(plain, optimizer, batch, model.image_size)
  names = HOST_PEERS if setting.on_host else DEVICE_PEERS
  candidates |= measure.torch_candidates(setting, names, dense, batch=batch, train=True)
  case = {"model": MODEL, "batch": batch, "dtype": setting.dtype, "optimizer": "AdamW"}
  yield from measure.rows(case, candidates, setting, warmup_calls=1)
  if setting.torch:
    setting.torch.forget()


def training_macs(model) -> int:
  """Returns the MACs of a training forward pass per image: branches that folding sums are computed
  separately in training."""
  def forward(variables, images):
    return model.apply(variables, images, train=True, mutable=["batch_stats"],
                       rngs={"dropout": jax.random.key(0)})[0]

  images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
  return macs_of(forward, jax.eval_shape(model.init, jax.random.key(0), images), images).total


def train_step(model, optimizer):
  """Returns a function (variables, opt_state, images, labels, key) -> (variables, opt_state, loss).
  """
  def step(variables, opt_state, images, labels, key):
    stats = {name: tree for name, tree in variables.items() if name != "params"}

    def mean_loss(params):
      logits, new = model.apply({"params": params, **stats}, images, train=True,
                                rngs={"dropout": key}, mutable=["batch_stats"])
      loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
      return loss.mean(), new

    (loss, new), gradients = jax.value_and_grad(mean_loss, has_aux=True)(variables["params"])
    updates, opt_state = optimizer.update(gradients, opt_state, variables["params"])
    return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state, loss
  return step


def _candidate(model, optimizer, batch: int, size: int, **facts):
  """Returns a candidate whose steps continue from each other, as in a run: the state is donated."""
  images = measure.normal((batch, size, size, 3), getattr(model, "dtype", "float32"))
  labels, key = jnp.arange(batch), jax.random.key(0)
  variables = measure.random_variables(model, images[:1])
  state = [variables, jax.jit(optimizer.init)(variables["params"])]
  start = measure.bench.now()
  step = jax.jit(train_step(model, optimizer), donate_argnums=(0, 1))
  program = step.lower(*state, images, labels, key).compile()
  seconds = measure.bench.now() - start

  def call():
    *state[:], loss = program(*state, images, labels, key)
    return loss, state

  memory = program.memory_analysis()
  return measure.Candidate(call, {
      "compile_seconds": seconds,
      "temporary_bytes": memory and memory.temp_size_in_bytes, **facts})
