"""LV-ViT-S fine-tuned at 384 pixels: 30 epochs, constant learning rate, from the model at 224.

Command:  vitcompact convert runs/lvvit_s/trained.safetensors \\
            --image-size 384 --out lvvit_s_384.safetensors
          python main.py --config=configs/lvvit_s_384.py --workdir=runs/lvvit_s_384 \\
            --config.init_from=lvvit_s_384.safetensors
          with configs/lvvit_s_384.py:lvvit_m for M.
Data:     as configs/lvvit_s.py.
Hardware: the authors used 8 GPUs with 64 images each.
Cost:     5.05 EFLOP, forward and backward of 38.4 M images through the dense model.
Result:   not run here. The authors publish 84.4 and 85.4 % top-1 for S and M.

The authors' command does not give the number of epochs; we use DeiT's 30. It keeps no averages.
"""
from configs import base, lvvit_s

STEPS_PER_EPOCH = 2502            # 1,281,167 images in batches of 512


def get_config(argument=""):
  options = base.parse(argument, model="lvvit_s")
  config = lvvit_s.get_config(options.model)
  config.batch_size = 512
  config.total_steps = 30 * STEPS_PER_EPOCH
  config.checkpoint_every = 5 * STEPS_PER_EPOCH
  config.ema_half_life = 0.0
  config.eval_params = "raw"
  config.model.image_size = 384   # labels of 24 x 24 patches
  config.optim.epoch_steps = STEPS_PER_EPOCH
  config.optim.learning_rate = 5e-6
  config.optim.final_learning_rate = 5e-6
  config.optim.warmup_steps = 5 * STEPS_PER_EPOCH
  config.optim.cooldown_steps = 0
  config.optim.weight_decay = 1e-8
  return base.finish(config, options)
