"""The `flux-ray` command."""
