"""Finding images by text and by image: training, evaluation, an index over a folder."""
