"""A replica without ranks and model, in a module without imports, so that it starts at once."""


class Unranked:
    """A replica that does nothing and is ready at once."""

    async def __call__(self) -> None:
        """Do nothing; Serve requires a callable."""
