"""vitcompact page: exported models in a browser."""
import click


@click.command()
@click.argument("out")
@click.argument("models", nargs=-1, required=True, metavar="[LABEL=]FILE.onnx...")
@click.option("--runtime", required=True, metavar="DIR",
              help="The dist folder of the npm package onnxruntime-web.")
@click.option("--force", is_flag=True, help="Overwrite a page that exists.")
def page(out, models, runtime, force):
  """Write a single-file page that runs exported models in a browser.

  \b
  vitcompact page compare.html dense=dense.onnx small=small.onnx \\
    --runtime node_modules/onnxruntime-web/dist

  The page works offline: images that are dropped on it stay on the reader's machine. It shows the
  most probable classes, the time of each model compared with the first, and, for files that
  `vitcompact export --tokens` wrote, which patches survive.
  """
  import pathlib

  from vitcompact.export import page as pages

  named = {}
  for text in models:
    label, _, file = text.rpartition("=")
    label = label or pathlib.Path(file).stem
    if label in named:
      raise ValueError(f"two models are called {label!r}; name them as LABEL={file}")
    named[label] = file
  pages.write(out, named, runtime, force=force)
  click.echo(f"wrote {out}: open it in a browser")
