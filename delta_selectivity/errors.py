"""The one exception that means "the request is wrong": ``main`` prints its line and exits with 2."""


class RequestError(ValueError):
    """The request is wrong: main prints the line and exits with 2.

    The message is a single line that shows the offending value and says what to do about it.
    """
