"""A smaller DeiT-S from a dense one, the whole path: measured, compacted, distilled for 30 epochs.

Command:  python main.py --config=configs/compact_deit_s.py --workdir=runs/compact_deit_s \\
            --config.init_from=deit_small.safetensors
          with configs/compact_deit_s.py:deit_tiny_patch16_224 for T, or
          configs/compact_deit_s.py:deit_base_patch16_224 for B. --config.compact.macs=0.7 is the
          share of the dense model's MACs to come to. Heads and FFNs compact by plan from scratch,
          configs/deit_s.py in all but the plan: configs/compact_deit_s.py:scratch
Stages:   vitcompact/run/path.py. The dense model is measured on 512 training images, a plan chosen,
          the model compacted, and distilled from the dense one at a twentieth of its rate.
Hardware: as configs/deit_s.py.
Cost:     1.06 EFLOP of distilling, forward and backward of 38.4 M images through the dense model
          (T: 0.289, B: 4.05; from scratch ten times these); its forward pass as a teacher on top.
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
