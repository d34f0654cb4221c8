"""`tarflow evaluate fid …`, `tarflow evaluate likelihood …` and `tarflow evaluate captions …`."""

from __future__ import annotations

from tarflow.cli.parsing import dispatch

HELP = """usage: tarflow evaluate COMMAND …

How good a pipeline is.

commands:
  fid          how near drawn pictures are to real ones: FID and its relatives, in the steps ref, gen, calc, or run for all
  likelihood   of held-out pictures: bits per dimension of models of pixels, nats per latent dimension of others
  captions     whether pictures show what their captions say: the share whose own caption comes first among a hundred

examples:
  tarflow evaluate fid ref --data pictures.zip --out stats
  tarflow evaluate likelihood --pipeline runs/NAME/pipeline --data.source folder --data.path pictures.zip

options:
  -h, --help   this help; `tarflow evaluate COMMAND --help` has each command's"""


def main(argv: list[str]) -> None:
    dispatch("tarflow evaluate", ("fid", "likelihood", "captions"), argv, HELP)
