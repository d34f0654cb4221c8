"""FID and its relatives: reference statistics, samples, and the numbers between them.

    python evaluate_fid.py ref --data pictures.zip --out stats
    python evaluate_fid.py gen --pipeline runs/NAME/pipeline --num 50000 --out samples
    python evaluate_fid.py calc --ref stats --samples samples
    python evaluate_fid.py run --config configs/fid_example.yaml

The last one does all three. Each gives the same with any number of processes. Inception's weights are downloaded unless
--inception-weights names them; another extractor (--extractor NAME --extractor-weights PATH) gives Fréchet distances
that are never called FID.
"""

from __future__ import annotations

from tarflow.cli.fid import main

if __name__ == "__main__":
    main(prog="evaluate_fid.py", description=__doc__)
