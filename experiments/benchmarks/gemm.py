"""Times the ceiling of a device: one matrix product, with the sizes of DeiT-S's FFN at batch 8.

No network can be faster than its matrix products, and no ratio to PyTorch larger than theirs. To
show how close a layer comes to this ceiling, an FFN's forward and backward pass is compared with
its forward products repeated three times.
"""
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from experiments.benchmarks import measure
from experiments.benchmarks.measure import Candidate, Setting
from vitcompact.layers import Mlp, dense

SIZES = 8 * 197, 384, 1536


def run(setting: Setting, sizes: tuple[int, int, int] = SIZES) -> Iterator[dict]:
  m, k, n = sizes
  candidates = {}
  for dtype in ("float32", "bfloat16"):
    arrays = measure.normal((m, k), dtype), measure.normal((k, n), dtype)
    candidates[f"XLA {dtype}"] = measure.compiled(jnp.matmul, *arrays)
    name = f"torch {dtype}"
    if setting.torch is None:
      candidates[name] = Candidate(None, {"reason": "no --torch PYTHON was given"})
    else:
      call, reason = setting.torch.build(kind="gemm" + " bf16" * (dtype == "bfloat16"),
                                         product=sizes)
      candidates[name] = Candidate(call, {} if call else {"reason": reason})
  yield from measure.rows({"what": "product", "product": sizes, "flop": 2 * m * k * n}, candidates,
                          setting)
  case = {"what": "FFN forward and backward", "product": sizes}
  yield from measure.rows(case, ffn(sizes), setting)


def ffn(sizes: tuple[int, int, int]) -> dict[str, Candidate]:
  """Returns two candidates: an FFN with its gradients, and its two forward products three times.
  """
  tokens, width, hidden = sizes
  x, cotangent = (measure.normal((tokens, width), "float32", seed=seed) for seed in (0, 1))
  kernels = measure.normal((width, hidden), "float32"), measure.normal((hidden, width), "float32")
  mlp = Mlp(dense(hidden, dtype="float32"), dense(width, dtype="float32"))
  variables = measure.random_variables(mlp, x)

  def gradients(variables, x, cotangent):
    y, back = jax.vjp(lambda variables, x: mlp.apply(variables, x, train=True), variables, x)
    return y, back(cotangent)

  def products(x, up, down):
    def both(x, _):
      return (x @ up) @ down, None
    return jax.lax.scan(both, x, length=3)[0]

  return {"three times the products": measure.compiled(products, x, *kernels),
          "ours": measure.compiled(gradients, variables, x, cotangent)}
