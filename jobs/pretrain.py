"""`simclr-ray pretrain`, for clusters to which jobs are sent by Ray's own command, this folder being the job's.

ray job submit --address http://HOST:8265 --working-dir jobs -- \
    python pretrain.py imagenet_resnet50.yaml --set run.folder=s3://... --set data.train=s3://...
"""

import sys

from simclr_ray.cli import main

sys.exit(main(["pretrain", *sys.argv[1:]]))
