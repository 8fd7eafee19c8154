"""Durable jobs: kept in a database until they are done, their images in a results store."""
