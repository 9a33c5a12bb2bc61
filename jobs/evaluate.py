"""`simclr-ray evaluate`, for clusters to which jobs are sent by Ray's own command, this folder being the job's.

ray job submit --address http://HOST:8265 --working-dir jobs -- \
    python evaluate.py s3://...
"""

import sys

from simclr_ray.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
