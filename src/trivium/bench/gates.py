"""Nothing is timed before it was found right."""


class WrongResult(RuntimeError):  # noqa: N818 (what is wrong is a result, not how it was asked for)
    """A result differs from the one that it is compared to. The message says which and by how much."""
