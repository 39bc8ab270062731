"""vitcompact push: a folder with a model, its card and how to load it, here or on the hub."""
import click


@click.command()
@click.argument("file")
@click.option("--out", required=True, metavar="FOLDER", help="Where it is written.")
@click.option("--repo", metavar="ORG/NAME", help="Upload it there, on the Hugging Face hub.")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--receipt", metavar="PATH", help="receipt.json of the run that made it, or its "
              "folder: the card takes the accuracy from it.")
@click.option("--force", is_flag=True, help="Overwrite.")
def push(file, out, repo, private, receipt, force):
  """Write a folder that others load: weights, plan, classes and a card.

  \b
  vitcompact push small/deploy.safetensors --out release --receipt small
  vitcompact push small/deploy.safetensors --out release --repo org/name

  Read back by vc.pretrained("hf-hub:org/name") and vc.pretrained("release"), and by every verb in
  the place of a file. Uploading wants huggingface_hub and `hf auth login`.
  """
  import vitcompact as vc
  from vitcompact import convert
  from vitcompact.cli import weights

  file = weights.file_of(file)
  model, variables = vc.load(file)
  path = vc.push(out, model, variables, classes=convert.classes_of(file),
                 preprocess=vc.preprocess(file), receipt=receipt, repo=repo, private=private,
                 force=force, source=convert.read_metadata(file).get("source", ""))
  click.echo(f"{path}: {model.variant}" + (f", uploaded to hf-hub:{repo}" if repo else ""))
