"""`mbm-kernels caption demo`: every model of this package trained, scored, timed, and reported."""
