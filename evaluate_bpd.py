"""Likelihood of held-out pictures under a saved pipeline.

    python evaluate_bpd.py --pipeline runs/NAME/pipeline --data.source folder --data.path pictures.zip

A model of pixels gives bits per dimension of the 8-bit pictures; one of latents gives nats per latent dimension, which
say nothing about pixels and can be compared only between models of the same latents and noise.
"""

from __future__ import annotations

from tarflow.cli.likelihood import main

if __name__ == "__main__":
    main(prog="evaluate_bpd.py", description=__doc__)
