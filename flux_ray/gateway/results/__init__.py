"""Finished images by signed URL: how it is made, what answers it, and its use as a reference."""
