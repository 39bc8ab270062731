"""The TPU kernel matches the reference, and lowers without a TPU."""
import jax.numpy as jnp
import pytest

from tests.kernels.cases import assert_equals_the_reference, case, export
from vitcompact.kernels import block_sparse_tpu


def interpreted(*args):
  return block_sparse_tpu.attend(*args, True)


@pytest.mark.parametrize("dtype,tolerance,arguments", [
    (jnp.float32, 1e-6, {"batch": 2, "heads": 1}),
    (jnp.bfloat16, 0.01, {"batch": 1, "heads": 2, "biased": False})])
def test_interpreted_kernel_and_its_gradients_match_the_reference(dtype, tolerance, arguments):
  assert_equals_the_reference(interpreted, *case(dtype, 16, 24, d=16, **arguments),
                           tolerance=tolerance)


@pytest.mark.parametrize("dtype,area,e", [(jnp.bfloat16, 64, 128), (jnp.float32, 49, 64)])
def test_forward_and_both_gradients_lower_for_tpu(dtype, area, e):
  module = export(block_sparse_tpu.attend, "tpu", *case(dtype, area, e))
  assert module.count("custom_call @tpu_custom_call") == 3
