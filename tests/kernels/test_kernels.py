"""Which kernel runs on which device, and the reason given when none does."""
import re

import jax
import jax.numpy as jnp
import pytest

from vitcompact import kernels
from vitcompact.attention import Device
from vitcompact.kernels import block_sparse_gpu, block_sparse_tpu

HOPPER, BLACKWELL = Device("gpu", capability="9.0"), Device("gpu", capability="10.0")
TPU, CPU = Device("tpu"), Device("cpu")


def arrays(dtype=jnp.bfloat16, area=64, d=64, e=64, blocks=16, count=4):
  shape = (2, 6, blocks, area)
  blocks = [jax.ShapeDtypeStruct((*shape, width), dtype) for width in (d, d, e)]
  return *blocks, jax.ShapeDtypeStruct((*shape[:3], count), jnp.int32)


@pytest.mark.parametrize("device,attend", [(HOPPER, block_sparse_gpu.attend),
                                           (TPU, block_sparse_tpu.attend)])
def test_each_device_gets_its_kernel(device, attend):
  assert kernels.refusal(device, *arrays(e=128)) == ""
  assert kernels.block_attention(device.platform) is attend


@pytest.mark.parametrize("device,changes,reason", [
    (CPU, {}, "for TPUs and for GPUs"),
    (BLACKWELL, {}, "compute capability 9.0"),
    (HOPPER, {"dtype": jnp.float32}, "not for .'float32'"),
    (HOPPER, {"area": 49}, r"not for \(49, 49\)"),
    (HOPPER, {"d": 32}, "not for 32 and 64"),
    (HOPPER, {"e": 192}, "not for 64 and 192"),
    (TPU, {"dtype": jnp.float16}, "not for .'float16'"),
    (TPU, {"blocks": 193}, "12352 tokens of it need"),
    (TPU, {"blocks": 128, "count": 171}, "these have 525312")])
def test_unsupported_calls_are_rejected_with_the_reason(device, changes, reason):
  assert re.search(reason, kernels.refusal(device, *arrays(**changes)))


def test_gpu_kernel_is_split_over_devices_and_tpu_kernel_is_not():
  assert "over 4 devices" in kernels.refusal(TPU._replace(count=4), *arrays())
  assert kernels.refusal(HOPPER._replace(count=4), *arrays()) == ""
