"""DeiT-B fine-tuned at 384 pixels for 30 epochs, from the model trained at 224.

Command:  vitcompact convert runs/deit_b/trained.safetensors \\
            --image-size 384 --out deit_b_384.safetensors
          python main.py --config=configs/deit_b_384.py --workdir=runs/deit_b_384 \\
            --config.init_from=deit_b_384.safetensors
Hardware: the authors used 16 GPUs with 32 images each.
Cost:     12.8 EFLOP, forward and backward of 38.4 M images through the dense model.
Result:   not run here. The recipe's authors publish 82.9 % top-1.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 2502            # 1,281,024 images in batches of 512


def get_config(argument=""):
  config = deit_s.get_config("deit_base_patch16_224")
  config.batch_size = 512
  config.total_steps = 30 * STEPS_PER_EPOCH
  config.checkpoint_every = 5 * STEPS_PER_EPOCH
  config.ema_half_life = 0.2309   # of the run: a decay of 0.99996 per step
  config.model.name = "deit_base_patch16_384"
  config.model.image_size = 384
  config.model.drop_path_rate = 0.0         # published models were fine-tuned in eval mode
  config.optim.epoch_steps = STEPS_PER_EPOCH
  config.optim.learning_rate = 5e-6         # constant after the warm-up
  config.optim.final_learning_rate = 5e-6
  config.optim.warmup_steps = 5 * STEPS_PER_EPOCH
  config.optim.weight_decay = 1e-8
  return base.finish(config, base.parse(argument))
