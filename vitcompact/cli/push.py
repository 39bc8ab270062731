"""vitcompact push: writes a folder with a model and its card, and uploads it to the hub."""
import click


@click.command()
@click.argument("file")
@click.option("--out", required=True, metavar="FOLDER", help="The folder to write.")
@click.option("--repo", metavar="ORG/NAME",
              help="Upload the folder to this repository on the Hugging Face hub.")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--receipt", metavar="PATH", help="receipt.json of the run that made the model, or "
              "its folder; the card takes the accuracy from it.")
@click.option("--force", is_flag=True, help="Overwrite.")
def push(file, out, repo, private, receipt, force):
  """Write a folder that others can load: weights, plan, classes and a card.

  \b
  vitcompact push small/deploy.safetensors --out release --receipt small
  vitcompact push small/deploy.safetensors --out release --repo org/name

  To load it: vc.pretrained("hf-hub:org/name") or vc.pretrained("release"); every subcommand that
  takes a file also takes these names. Uploading needs huggingface_hub and `hf auth login`.
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
