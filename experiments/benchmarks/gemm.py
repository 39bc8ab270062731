"""The ceiling of a device: one matrix product, of the sizes of a DeiT-S's FFN at batch 8.

No network can be faster than its products are here, and no ratio to PyTorch larger than theirs.
"""
from collections.abc import Iterator

import jax.numpy as jnp

from experiments.benchmarks import measure
from experiments.benchmarks.measure import Candidate, Setting

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
