"""`simclr-ray embed`, for clusters to which jobs are sent by Ray's own command, this folder being the job's.

ray job submit --address http://HOST:8265 --working-dir jobs -- \
    python embed.py s3://...RUN s3://...DATA_SET s3://...VECTORS --actors 1:32
"""

import sys

from simclr_ray.cli import main

sys.exit(main(["embed", *sys.argv[1:]]))
