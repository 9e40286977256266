# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""How likely is a draft token accepted? Learnt from what the target did with earlier ones."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Acceptance by the draft's top-1 probability at draft temperature 0.2, read from published SubSpec
# traces (Qwen and Llama 7B to 8B, chains, 4-bit substitutes). Above 0.9 a finer grid, since a deep
# chain lives on the difference between 0.99 and 0.999; 0 is extrapolated.
_PRIOR_PROBABILITY = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0])
_PRIOR_ACCEPTANCE = np.array(
    [0.10, 0.21, 0.49, 0.62, 0.71, 0.789, 0.906, 0.958, 0.981, 0.996, 0.999, 0.9995]
)
_PRIOR_NEXT = 0.9  # acceptance of a token about which nothing is known yet
_PRIOR_COUNT = 20.0  # observations that the prior is worth
_WINDOW = 512.0  # observations, of one bucket, that an estimate remembers


class AcceptanceModel:
    """Online probability that a draft token is accepted, by the draft's confidence in it.

    The confidence of a node's best child is its sharpened probability; that of each further child
    is its share of the probability that the children before it leave over. So defined it is the
    chance of a token *given that the better ones are refused*, and one table serves every rank:
    on a language model with 4-, 3- and 2-bit drafts, second to fourth children of one confidence
    were accepted as often as first ones, within what their counts can tell apart.

    Each bucket is a pair of counts, begun with pseudo-counts of the published table and slowly
    forgotten, so that the estimate follows the texts being written.

    Args:
        share: of the published acceptance that is expected at first.
        count: observations that this expectation is worth.
    """

    def __init__(self, share: float = 1.0, count: float = _PRIOR_COUNT) -> None:
        self._trials = np.full(_PRIOR_PROBABILITY.size + 1, count)
        prior = share * np.append(_PRIOR_ACCEPTANCE, _PRIOR_NEXT)  # last: any token
        self._accepted = self._trials * prior
        self._edges = (_PRIOR_PROBABILITY[1:] + _PRIOR_PROBABILITY[:-1]) / 2

    def estimate(self, top1: npt.ArrayLike) -> Floats:
        """Acceptance of tokens with top-1 probabilities ``top1``, interpolated; the same shape."""
        rates = (self._accepted / self._trials)[:-1]
        return np.interp(np.asarray(top1, np.float64), _PRIOR_PROBABILITY, rates)

    def children(self, confidence: npt.ArrayLike) -> Floats:
        """[m, b] probability that the token after each of m nodes is its r-th best child.

        The children exclude each other, so a row's sum is at most 1. A child never counts more
        than a better sibling: what is kept of a node's children is then always the best of them.

        Args:
            confidence: [m, b] confidences of the children, best child first.
        """
        given = self.estimate(confidence)
        refused = np.cumprod(1 - given, axis=1)
        given[:, 1:] *= refused[:, :-1]
        return np.minimum.accumulate(given, axis=1)

    @property
    def next_token(self) -> float:
        """Probability that a node's drafted children will hold the token after it."""
        return float(self._accepted[-1] / self._trials[-1])

    def observe(
        self, top1: npt.ArrayLike, accepted: npt.ArrayLike, first: npt.ArrayLike = True
    ) -> None:
        """Tokens that were put to the test: below the root and every accepted token, its children
        in order up to the one accepted. Of a chain: all accepted ones and the first refused.

        Args:
            top1: [m] their confidences; of a chain, top-1 probabilities.
            accepted: [m] whether each was accepted.
            first: [m] whether each is the best of its siblings; a chain has no others.
        """
        bucket = np.searchsorted(self._edges, np.asarray(top1, np.float64))
        size = _PRIOR_PROBABILITY.size
        trials = np.bincount(bucket, minlength=size).astype(np.float64)
        wins = np.bincount(bucket, np.asarray(accepted, np.float64), minlength=size)
        parents = np.broadcast_to(np.asarray(first, np.float64), bucket.shape).sum()
        trials, wins = np.append(trials, parents), np.append(wins, wins.sum())
        keep = (1 - 1 / _WINDOW) ** trials
        self._trials = self._trials * keep + trials
        self._accepted = self._accepted * keep + wins
