"""DeiT-S transferred from ImageNet to CIFAR-10: 1000 epochs of SGD, as by the authors.

Command:  vitcompact convert deit_small.safetensors --num-classes 10 --reset-head \\
            --out deit_small_10.safetensors
          python main.py --config=configs/cifar10.py --workdir=runs/cifar10 \\
            --config.init_from=deit_small_10.safetensors
          with configs/cifar10.py:cifar100 for CIFAR-100 (and --num-classes 100),
          configs/cifar10.py:cifar10@all to train on all images, as the authors do, or
          configs/cifar10.py:adamw for AdamW with ImageNet's weight decay, drop path and random
          erasing, the transfer recipe that the authors published for related models.
Data:     tfds:cifar10, read without TensorFlow; val is a tenth of the train images, or with @all
          the test images.
Hardware: not stated; 3 GPUs with 256 images each would give the authors' batch.
Cost:     1.23 EFLOP, forward and backward of 44.5 M images through the dense model.
Result:   not run here. The authors report 99.1 % (CIFAR-10) and 90.8 % (CIFAR-100) for DeiT-B,
          by SGD.

The authors do not state whether their learning rate of 0.01 is before or after scaling with the
batch size; here it is used without scaling. With AdamW they left the final rate at 1e-5, above the
peak, so their cosine rises from 7.5e-6; here the rate is constant after the warm-up.
"""
from configs import base, deit_s

STEPS_PER_EPOCH = 58              # 45,000 images, truncated to 44,800, in batches of 768
STEPS_OF_ALL = 65                 # 50,000 images, truncated to 49,920


def get_config(argument=""):
  options = base.parse(argument, data="cifar10", adamw=False)
  config = deit_s.get_config()
  steps = STEPS_OF_ALL if options.data.endswith("@all") else STEPS_PER_EPOCH
  config.batch_size = 768
  config.total_steps = 1000 * steps
  config.checkpoint_every = 50 * steps
  config.ema_half_life = 0.0
  config.model.drop_path_rate = 0.1 if options.adamw else 0.0
  config.data.name = f"tfds:{options.data}"
  config.data.erase = 0.25 if options.adamw else 0.0
  config.data.replicas = 3        # of 256 images
  config.optim.epoch_steps = steps
  config.optim.warmup_steps = 5 * steps
  if options.adamw:
    config.optim.learning_rate = 7.5e-6     # 5e-6 for each 512 images of a batch
    config.optim.final_learning_rate = 7.5e-6
  else:
    config.optim.name = "sgd"
    config.optim.learning_rate = 0.01
    config.optim.weight_decay = 1e-4
    config.optim.b1 = 0.9         # Nesterov momentum
  return base.finish(config, options)
