"""flux-ray: a serving cluster for the FLUX image models on Ray."""

__version__ = "0.1.0"
