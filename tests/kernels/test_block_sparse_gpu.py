"""The Hopper kernel matches the reference, and lowers without a GPU."""
import jax.numpy as jnp
import pytest

# From jax 0.11 also exported as plgpu.InterpretGPUParams; this name exists in 0.10 and 0.11.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from tests.kernels.cases import assert_equals_the_reference, case, export
from vitcompact.kernels import block_sparse_gpu


def interpreted(*args):
  return block_sparse_gpu.attend(*args, InterpretGPUParams())


@pytest.mark.parametrize("e,arguments", [(128, {"batch": 2, "heads": 1}),
                                         (64, {"batch": 1, "heads": 2, "biased": False})])
def test_interpreted_kernel_and_its_gradients_match_the_reference(e, arguments):
  # bfloat16 has 8 significant bits: one rounding is 0.4% of an entry.
  assert_equals_the_reference(interpreted, *case(jnp.bfloat16, 64, e, **arguments), tolerance=0.01)


@pytest.mark.parametrize("e", [64, 128])
def test_forward_and_both_gradients_lower_for_cuda(e):
  module = export(block_sparse_gpu.attend, "cuda", *case(jnp.bfloat16, 64, e))
  assert module.count("custom_call @mosaic_gpu") == 3


def test_tiles_larger_than_shared_memory_do_not_lower(monkeypatch):
  monkeypatch.setattr(block_sparse_gpu, "SLOTS", 16)
  with pytest.raises(ValueError, match="exceeds available shared memory"):
    export(block_sparse_gpu.attend, "cuda", *case(jnp.bfloat16, 64, 64))
