"""The Hopper kernel equals the reference, and lowers where there is no GPU."""
import jax.numpy as jnp
import pytest

# Exported as plgpu.InterpretGPUParams from jax 0.11 on; this name is there in 0.10 and 0.11.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from tests.kernels.cases import assert_equals_the_reference, case, export
from vitcompact.kernels import block_sparse_gpu


def interpreted(*args):
  return block_sparse_gpu.attend(*args, InterpretGPUParams())


@pytest.mark.parametrize("e,arguments", [(128, {"batch": 2, "heads": 1}),
                                         (64, {"batch": 1, "heads": 2, "biased": False})])
def test_the_interpreted_kernel_and_its_gradients_equal_the_reference(e, arguments):
  # bfloat16 has 8 bits: one rounding is 0.4% of an entry.
  assert_equals_the_reference(interpreted, *case(jnp.bfloat16, 64, e, **arguments), tolerance=0.01)


@pytest.mark.parametrize("e", [64, 128])
def test_forward_and_both_gradients_lower_for_cuda(e):
  module = export(block_sparse_gpu.attend, "cuda", *case(jnp.bfloat16, 64, e))
  assert module.count("custom_call @mosaic_gpu") == 3


def test_tiles_that_overrun_shared_memory_do_not_lower(monkeypatch):
  monkeypatch.setattr(block_sparse_gpu, "SLOTS", 16)
  with pytest.raises(ValueError, match="exceeds available shared memory"):
    export(block_sparse_gpu.attend, "cuda", *case(jnp.bfloat16, 64, 64))
