"""Driving: cloning a lane-keeping controller into the four-stream model, and driving with it."""
