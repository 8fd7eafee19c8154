"""The pages that this gateway serves to browsers: the playground at `/`, and `/docs`."""
