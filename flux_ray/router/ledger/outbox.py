"""What a gateway is told, kept until it says that it has heard it."""

from typing import Generic, NamedTuple, TypeVar

Message = TypeVar("Message")


class Receipt(NamedTuple):
    """Up to which message of which outbox everything was heard."""

    outbox: str = ""
    number: int = 0


class Outbox(Generic[Message]):
    """Messages in order, each told at least once.

    A receipt for another outbox, of a ledger before this one or of the same gateway before it fell
    silent, says nothing of what is in here.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._messages: list[tuple[int, Message]] = []
        self._last = 0

    def put(self, messages: list[Message]) -> None:
        """Add them at the end."""
        for message in messages:
            self._last += 1
            self._messages.append((self._last, message))

    def after(self, receipt: Receipt) -> tuple[Receipt, list[Message]]:
        """What is left after a receipt; and the receipt for that."""
        if receipt.outbox == self._name:
            self._messages = [each for each in self._messages if each[0] > receipt.number]
        return Receipt(self._name, self._last), [message for _, message in self._messages]
