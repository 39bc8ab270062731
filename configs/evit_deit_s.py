"""EViT on DeiT-S, fine-tuned for 30 epochs from a trained dense model, or trained from scratch
(Liang et al., ICLR 2022).

Command:  python main.py --config=configs/evit_deit_s.py --workdir=runs/evit_deit_s \\
            --config.init_from=deit_small.safetensors
          with --config.plan.tokens.keep=0.5 for another keep rate, or from scratch for 300 epochs,
          during which the keep rate falls from 1:
          python main.py --config=configs/evit_deit_s.py:scratch --workdir=runs/evit_deit_s_scratch
Data:     ImageNet-1k, as configs/deit_s.py.
Hardware: the authors used 8 GPUs with 256 images each.
Cost:     1.06 EFLOP, forward and backward of 38.4 M images through the dense model
          (from scratch ten times that).
Result:   not run here. The authors publish, for 300 epochs from scratch with fusion, 79.8, 79.8,
          79.5, 78.9 and 78.5 % top-1 at keep 0.9, 0.8, 0.7, 0.6 and 0.5 (dense: 79.8 %).

The authors change the keep rate at every training step. Here it falls in 7 equal steps, because
each rate is a program to compile.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 625             # 1,281,167 images in batches of 2048


def get_config(argument=""):
  options = base.parse(argument, scratch=False)
  small = {"plan.tokens.blocks": (1, 2)}
  config = deit_s.get_config()
  config.batch_size = 2048
  config.total_steps = 30 * STEPS_PER_EPOCH
  config.checkpoint_every = 10 * STEPS_PER_EPOCH
  config.ema_half_life = 0.924    # of the run: a decay of 0.99996 per step
  config.plan = {"tokens": {"method": "evit", "keep": 0.7, "blocks": (3, 6, 9)}}
  config.model.drop_path_rate = 0.0         # the authors fine-tune in eval mode
  config.data.replicas = 8        # of 256 images
  config.optim.epoch_steps = STEPS_PER_EPOCH
  config.optim.learning_rate = 8e-5         # 2e-5 for each 512 images of a batch
  config.optim.warmup_steps = 0
  config.optim.final_learning_rate = 2e-6
  config.optim.weight_decay = 1e-6
  if options.scratch:
    config.total_steps = 300 * STEPS_PER_EPOCH
    config.ema_half_life = 0.0924   # of the run: a decay of 0.99996 per step
    config.model.drop_path_rate = 0.1
    config.optim.learning_rate = 2e-3       # the peak: 5e-4 for each 512 images of a batch
    config.optim.warmup_steps = 5 * STEPS_PER_EPOCH
    config.optim.final_learning_rate = 1e-5
    config.optim.weight_decay = 0.05
    # The keep rate is 1 for `start` steps, then falls over `steps`.
    config.keep_warmup = {"start": 10 * STEPS_PER_EPOCH, "steps": 100 * STEPS_PER_EPOCH}
    small |= {"keep_warmup.start": 2, "keep_warmup.steps": 1}
  return base.finish(config, options, small)
