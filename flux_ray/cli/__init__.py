"""The commands of `flux-ray`, one module for each that is more than a few lines."""
