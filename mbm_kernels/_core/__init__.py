"""Plumbing without any operation's maths."""
