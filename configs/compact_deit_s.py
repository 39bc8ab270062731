"""The whole path from a dense DeiT-S to a smaller one: measure, compact, distil for 30 epochs.

Command:  python main.py --config=configs/compact_deit_s.py --workdir=runs/compact_deit_s \\
            --config.init_from=deit_small.safetensors
          with configs/compact_deit_s.py:deit_tiny_patch16_224 for T, or
          configs/compact_deit_s.py:deit_base_patch16_224 for B. --config.compact.macs=0.7 is the
          target share of the dense model's MACs. To train a fixed plan of compact heads and FFNs
          from scratch with the recipe of configs/deit_s.py: configs/compact_deit_s.py:scratch
Stages:   see vitcompact/run/path.py. The dense model is measured on 512 training images, a plan is
          chosen, and the model is compacted and distilled from the dense one at a twentieth of its
          learning rate.
Hardware: as configs/deit_s.py.
Cost:     1.06 EFLOP of distilling, forward and backward of 38.4 M images through the dense model
          (T: 0.289, B: 4.05; from scratch ten times these), plus the teacher's forward pass.
Result:   not run.
"""
from configs import base, deit_s


def get_config(argument=""):
  options = base.parse(argument, model="deit_small_patch16_224", scratch=False)
  config = deit_s.get_config(options.model)
  if options.scratch:
    config.plan = {"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}
    return base.finish(config, options)
  config.total_steps //= 10
  config.compact.update(macs=0.7, images=512)
  config.checkpoint_every = 5 * deit_s.STEPS_PER_EPOCH
  config.optim.learning_rate /= 20
  config.optim.final_learning_rate = 1e-6
  config.optim.warmup_steps = deit_s.STEPS_PER_EPOCH
  config.loss.update(labels=0.0, logits=1.0, patches=1.0)
  return base.finish(config, options)
