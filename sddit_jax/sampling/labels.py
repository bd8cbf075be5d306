"""The class labels of images to sample. The label of image i depends on i, and if random on the seed."""

import numpy as np

from sddit_jax.errors import UserError


def labels_of(spec: str, indices: range, num_classes: int, seed: int) -> np.ndarray:
    """The labels of the images with the given indices: int32 [len(indices)]; all 0 if there are no classes.

    spec: "balanced", i modulo the number of classes; "random", uniform, from the i-th block of a Philox generator; or
    labels such as "3,1,4", repeated. Raises UserError for any other spec, and for a label that the model does not have.
    """
    index_N = np.arange(indices.start, indices.stop)
    if spec == "balanced":
        return (index_N % max(num_classes, 1)).astype(np.int32)
    if spec == "random":
        # A block of the generator has four words of 64 bits.
        words = np.random.Philox(key=seed).advance(indices.start).random_raw(4 * len(indices))[::4]
        return (words % np.uint64(max(num_classes, 1))).astype(np.int32)
    try:
        labels = [int(label) for label in spec.split(",")]
    except ValueError as error:
        raise UserError(f"--labels={spec} is not balanced, random or numbers such as 3,1,4") from error
    if not num_classes:
        raise UserError(f"--labels={spec}, but the model was trained without labels")
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"--labels has {label}, but the model's labels are 0 to {num_classes - 1}")
    return np.array(labels, np.int32)[index_N % len(labels)]


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """The balanced labels of images 0 to count - 1: int32 [count]."""
    return labels_of("balanced", range(count), num_classes, seed=0)
