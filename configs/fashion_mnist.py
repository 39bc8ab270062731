"""A dense DeiT with six heads and six blocks on the 60,000 images of Fashion-MNIST.

Command:  python main.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
Data:     Debian's package (apt install dataset-fashion-mnist), or its four files in a folder that
          FASHION_MNIST_DIR names. val is every tenth training image, and was used to choose the
          recipe.
Hardware: one CPU core.
Cost:     68.9 TFLOP, 46 to 52 minutes on a loaded machine, almost none of it for loading data.
Result:   test accuracy 91.71 % [91.15, 92.23], val 92.45 % (results/fashion_mnist_dense.json, its
          receipt.json). AdamW with b1 = 0.9 instead of Muon gave 89.95 % and 90.72 %. The weights
          are results/fashion_mnist_dense.safetensors, in float16:
          vitcompact convert runs/fashion_mnist/trained.safetensors --dtype float16 \\
            --out results/fashion_mnist_dense.safetensors
"""
from configs import base


def get_config(argument=""):
  options = base.parse(argument)
  config = base.get_config()
  config.total_steps = 24_000     # 14.2 epochs
  total = config.get_ref("total_steps")
  config.batch_size = 32          # many small steps: 64 images per step learned half as fast
  config.eval_batch_size = 504    # divisible by 8 devices
  config.checkpoint_every = total // 5
  config.log_every = 200          # steps
  config.ema_half_life = 0.0462
  config.eval_params = "ema"
  config.model.image_size = 28
  config.model.patch_size = 4     # pixels: 49 tokens and the class token
  config.model.width = 60
  config.model.depth = 6
  config.model.heads = 6
  config.data.name = "fashion_mnist"
  config.data.augment = "flip"
  config.data.smoothing = 0.1
  config.optim.name = "muon"
  config.optim.learning_rate = 3e-3         # the peak
  config.optim.b1, config.optim.b2 = 0.95, 0.99
  config.optim.warmup_steps = total // 20
  config.optim.clip_norm = 1.0
  return base.finish(config, options)
