from .helpers import trained_run as trained_run
