"""Images and their classes: where they come from, which are chosen, how a network sees them.

Import from the modules, so that naming a data set does not load torch:

- `class_lists`: label spaces, and the matching of images with them.
- `sources`: `open_dataset` finds images in folders, archives, and the 500 photos of `photos`.
- `subset`: which images of a data set are drawn.
- `preprocessing`: from a decoded image to what a network takes.
- `evaluation_set`: the checked, labelled images that an evaluation runs over.
- `training_images`: all images of a data set decoded into memory.
"""
