"""The one exception type of the library's own."""


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""
