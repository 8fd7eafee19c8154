"""A replica that is nothing but that. It imports nothing: it is there as soon as Ray has it."""


class Unranked:
    """No ranks and no model."""

    async def __call__(self) -> None:
        """Serve asks for one."""
