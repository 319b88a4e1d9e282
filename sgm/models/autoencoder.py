"""Public address: first stages."""

from ldm.models.autoencoder_sgm import AutoencoderKL, AutoencoderKLInferenceWrapper, IdentityFirstStage

__all__ = ["AutoencoderKL", "AutoencoderKLInferenceWrapper", "IdentityFirstStage"]
