"""What goes wrong with other people's files; one type, so that callers can catch it."""


class WeightsError(ValueError):
    """A weights folder that cannot be read as it stands; the message says why."""


def listed(names: list[str], limit: int = 8) -> str:
    """`names` for a message: the first `limit`, then how many more."""
    text = ", ".join(names[:limit])
    rest = len(names) - limit
    return f"{text} and {rest} more" if rest > 0 else text
