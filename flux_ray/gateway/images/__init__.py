"""Read a client's images, from bytes or a URL, into checked, upright RGB pixels and masks."""
