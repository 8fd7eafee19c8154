"""BFL's routes: a job for each request, and what is told of it until it is ready."""
