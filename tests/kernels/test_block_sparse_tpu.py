"""The TPU kernel equals the gather, and lowers where there is no TPU."""
import jax.numpy as jnp
import pytest

from tests.kernels.cases import assert_equals_the_gather, case, export
from vitcompact.kernels import block_sparse_tpu


def interpreted(*args):
  return block_sparse_tpu.attend(*args, True)


@pytest.mark.parametrize("dtype,e,biased,tolerance", [
    (jnp.float32, 24, True, 1e-6), (jnp.bfloat16, 16, False, 0.01)])
def test_the_interpreted_kernel_and_its_gradients_equal_the_gather(dtype, e, biased, tolerance):
  assert_equals_the_gather(interpreted, *case(dtype, 16, e, d=16, biased=biased),
                           tolerance=tolerance)


@pytest.mark.parametrize("dtype,area,e", [(jnp.bfloat16, 64, 128), (jnp.float32, 49, 64)])
def test_forward_and_both_gradients_lower_for_tpu(dtype, area, e):
  module = export(block_sparse_tpu.attend, "tpu", *case(dtype, area, e))
  assert module.count("custom_call @tpu_custom_call") == 3
