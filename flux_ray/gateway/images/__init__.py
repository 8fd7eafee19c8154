"""Images in: from a client's bytes or URL to checked, upright RGB pixels and masks."""
