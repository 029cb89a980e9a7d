"""The prior of stage two: diffusion over the latents of stage one, and the pipeline that samples pictures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_prior.pipeline import MNIFPipeline, load_pipeline
    from latent_prior.sampling import sample_latents

__all__ = ["MNIFPipeline", "load_pipeline", "sample_latents"]

_HOMES = {
    "MNIFPipeline": "latent_prior.pipeline",
    "load_pipeline": "latent_prior.pipeline",
    "sample_latents": "latent_prior.sampling",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that ``import latent_prior`` costs no torch import."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'latent_prior' has no attribute '{name}'")
