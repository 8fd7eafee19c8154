"""The routes of BFL's API: each request becomes a job, which its client polls until it is ready."""
