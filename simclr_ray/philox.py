from simclr_ray.views.philox import *  # noqa  temporary
