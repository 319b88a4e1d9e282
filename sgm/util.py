"""Public address: helpers."""

from ldm.models.diffusion.sampling_util import append_dims
from ldm.util import count_params, default, exists, get_obj_from_str, instantiate_from_config, isimage, ismap, log_txt_as_img, mean_flat

__all__ = [
    "append_dims",
    "count_params",
    "default",
    "exists",
    "get_obj_from_str",
    "instantiate_from_config",
    "isimage",
    "ismap",
    "log_txt_as_img",
    "mean_flat",
]
