"""A constraint on ids that often leaves one way to go on, for engines that know no text."""

import numpy as np

from phi3_mlx.engine.processors import Constraint


class Rails:
    """After the last of a block of `block` ids any block may begin, and else only the next id of the block follows.

    `stop`: an id that may come where a block may begin. `width` ids are known.
    """

    def __init__(self, block=4, width=90, stop=None):
        self.block, self.width, self.stop = block, width, stop

    def allowed(self, answer):
        mask = np.zeros(self.width, dtype=np.uint8)
        if answer and answer[-1] % self.block != self.block - 1:
            mask[answer[-1] + 1] = 1
        else:
            mask[: self.width - self.block + 1 : self.block] = 1
            if self.stop is not None:
                mask[self.stop] = 1
        return mask

    def forced(self, answer, most):
        ids, last = [], answer[-1] if answer else self.block - 1
        while len(ids) < most and last % self.block != self.block - 1:
            last += 1
            ids.append(last)
        return ids


class MaskAlone:
    """A constraint of which the engine does not know that it forces anything."""

    reads_answer = True

    def __init__(self, matcher):
        self._constraint = Constraint(matcher)

    def __call__(self, answer, logits):
        return self._constraint(answer, logits)
