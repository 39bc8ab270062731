"""Times what a user waits for before the first result: imports, compilation, the compilation cache.
"""
import json
import tempfile
import time
from collections.abc import Iterator

import jax
import optax

import vitcompact as vc
from experiments.benchmarks import measure, train
from experiments.benchmarks.measure import Candidate, Setting
from experiments.benchmarks.model import MODEL
from experiments.plain_deit import PlainDeiT
from vitcompact import bench

BATCH = 8


def run(setting: Setting, **sizes) -> Iterator[dict]:
  yield from _imports(setting)
  yield from _compilations(setting, **sizes)
  yield from _starts(setting, **sizes)


def _imports(setting: Setting) -> Iterator[dict]:
  clock = "process_time" if setting.on_host else "perf_counter"
  stop = f"import time; print(time.{clock}() - start)"
  start = f"import time; start = time.{clock}() * {int(not setting.on_host)}\n"
  jax_flax = "import jax, jax.numpy, flax.linen\n"
  ours = "import vitcompact as vc\n[getattr(vc, name) for name in vc.__all__]\n"
  children = {"jax and flax": jax_flax, "and vitcompact": jax_flax + "import vitcompact\n",
              "and every name of it": jax_flax + ours}
  candidates = {name: Candidate(measure.Child(start + code + stop), {})
                for name, code in children.items()}
  yield from measure.rows({"what": "import"}, candidates, setting, min_seconds=0)


def _compilations(setting: Setting, **sizes) -> Iterator[dict]:
  """Times tracing and compiling, with all of JAX's caches cleared."""
  dense = vc.create_model(MODEL, dtype=setting.dtype, **sizes)
  plain = PlainDeiT(dense.width, dense.depth, dense.heads, patch_size=dense.patch_size)
  images = measure.normal((BATCH, dense.image_size, dense.image_size, 3), setting.dtype)
  for what in ("forward", "training step"):
    candidates = {}
    for name, model in (("plain Linen", plain), ("ours", dense)):
      variables = measure.random_variables(model, images[:1])
      candidates[name] = Candidate(_Compilation(*_program(model, variables, images, what)), {})
    yield from measure.rows({"what": f"compile a {what}", "batch": BATCH}, candidates, setting,
                        min_seconds=0)


def _program(model, variables, images, what: str):
  """Returns (function, arguments) of a forward pass or a training step."""
  if what == "forward":
    return model.apply, (variables, images)
  optimizer = optax.adamw(1e-3, weight_decay=0.05)
  step = train.train_step(model, optimizer)
  opt_state = jax.jit(optimizer.init)(variables["params"])
  return step, (variables, opt_state, images, jax.numpy.arange(len(images)), jax.random.key(0))


class _Compilation:

  def __init__(self, function, arguments):
    self.function, self.arguments = function, arguments

  def seconds(self, calls: int) -> float:
    total = 0.0
    for _ in range(calls):
      jax.clear_caches()
      total += bench.compiled(self.function, *self.arguments).seconds
    return total / calls


def _starts(setting: Setting, **sizes) -> Iterator[dict]:
  """Times a start after the imports, with an empty and with a filled persistent cache: one forward
  pass is run and a training step is compiled. The step is not run, because its time does not depend
  on the cache."""
  code = ("import sys; from experiments.benchmarks import startup; "
          "startup.first_results(*sys.argv[1:])")
  with tempfile.TemporaryDirectory() as full:
    arguments = code, setting.dtype, json.dumps(sizes)
    candidates = {"cold": Candidate(measure.Child(*arguments, clear_cache=True), {}),
                  "warm": Candidate(measure.Child(*arguments, full), {})}
    case = {"what": "a first forward, and a training step compiled", "batch": BATCH}
    yield from measure.rows(case, candidates, setting, min_seconds=0)


def first_results(dtype: str, sizes: str, cache: str):
  """Prints the seconds after the imports that a forward pass and compiling a training step take,
  with the compilation cache in the directory `cache`."""
  clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
  start = clock()
  for option, value in (("jax_compilation_cache_dir", cache),
                        ("jax_persistent_cache_min_compile_time_secs", 0),
                        ("jax_persistent_cache_min_entry_size_bytes", -1)):
    jax.config.update(option, value)
  model = vc.create_model(MODEL, dtype=dtype, **json.loads(sizes))
  images = jax.numpy.zeros((BATCH, model.image_size, model.image_size, 3), dtype)
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  function, arguments = _program(model, variables, images, "forward")
  jax.block_until_ready(jax.jit(function)(*arguments))
  function, arguments = _program(model, variables, images, "training step")
  jax.jit(function).lower(*arguments).compile()
  print(clock() - start)
