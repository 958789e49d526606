"""The one error that is the user's to mend."""


class OpenSoraError(ValueError):
    """A mistake in the input: one line saying what came, what was expected and what to do.

    The command line prints the message and exits with code 2; library callers catch a `ValueError`.
    """
