"""Durable jobs: kept in a database until they are done, their pictures in a results store."""
