"""Root-mean-square normalisation."""

from pallas_kernels.rms_norm.api import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_forward

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_backward", "rms_norm_forward"]
