"""Pictures of what a method does to an image. Needs matplotlib."""


def pyplot():
  """matplotlib's pyplot, set up to draw into files."""
  try:
    import matplotlib
  except ImportError:
    raise ValueError("drawing needs matplotlib: pip install matplotlib") from None
  matplotlib.use("Agg")
  from matplotlib import pyplot
  return pyplot
