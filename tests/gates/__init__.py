"""The proofs behind make sanitize, make gate and make mutants.

record.py writes down the native calls that operations make; replay.py makes them again in a
process without torch, on buffers between guard pages, under a sanitizer or under valgrind.
"""
