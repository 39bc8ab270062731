"""Next-ViT fine-tuned at 384 pixels: 30 epochs, constant learning rate, from the model at 224.

Command:  python main.py --config=configs/nextvit_384.py --workdir=runs/nextvit_384 \\
            --config.init_from=runs/nextvit_small/trained.safetensors
          with configs/nextvit_384.py:nextvit_base or :nextvit_large for the others.
Hardware: the authors used 8 GPUs with 128 images each.
Cost:     3.97 EFLOP, forward and backward of 38.4 M images through the dense model.
Result:   not run here. The authors publish 83.6, 84.3 and 84.7 % top-1 for S, B and L.
"""
from configs import base, nextvit

STEPS_PER_EPOCH = 1251            # 1,281,167 images in batches of 1024


def get_config(argument=""):
  options = base.parse(argument, model="nextvit_small")
  config = nextvit.get_config(options.model)
  config.batch_size = 1024
  config.total_steps = 30 * STEPS_PER_EPOCH
  config.checkpoint_every = 5 * STEPS_PER_EPOCH
  config.model.image_size = 384
  config.optim.epoch_steps = STEPS_PER_EPOCH
  config.optim.learning_rate = 1e-5         # B's log shows about 3e-6
  config.optim.final_learning_rate = 1e-5
  config.optim.warmup_steps = 0
  config.optim.weight_decay = 1e-8
  return base.finish(config, options)
