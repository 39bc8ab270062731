"""Empty batches, and images whose size the model does not accept."""
import jax
import jax.numpy as jnp
import pytest

import vitcompact as vc


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "lvvit_t", "nextvit_small",
                                  "pvt_tiny", "pvt_v2_b0", "davit_tiny", "shvit_s1",
                                  "transnext_micro"])
def test_empty_batch_gives_empty_logits_and_channels_are_checked(name):
  model = vc.create_model(name, num_classes=7)

  def logits(*shape):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(
        (1, *shape[1:3], 3), jnp.float32))
    return jax.eval_shape(model.apply, variables, images)

  assert logits(0, 224, 224, 3).shape == (0, 7)
  with pytest.raises(ValueError, match=r"images of shape \(2, 224, 224, 4\): this model takes"):
    logits(2, 224, 224, 4)


def test_empty_batch_works_with_padded_windows():
  model = vc.create_model("davit_tiny", image_size=40, num_classes=7)
  shapes = [jax.ShapeDtypeStruct((batch, 40, 40, 3), jnp.float32) for batch in (1, 0)]
  variables = jax.eval_shape(model.init, jax.random.key(0), shapes[0])
  assert jax.eval_shape(model.apply, variables, shapes[1]).shape == (0, 7)
