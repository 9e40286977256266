# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-subspec authors
"""When is it better not to draft? Rests where plain rounds are faster, and trials between them.

Plain rounds are faster in large batches, whose passes compute longer than they stream; and while
passes over long prompts compute all the time, drafts keep others waiting for their first tokens.
"""

from dataclasses import dataclass

from vllm_subspec.core.cost import RoundCosts

_TRIAL = 4  # rounds with drafts, after a rest: do they pay now?
_REST = 4.0  # a rest is so many times as long as a trial; doubled as long as trials fail
_LONGEST_REST = 64.0
_SETTLED = 24  # rounds with drafts, before which none is judged: the first are too deep
_LOOK = 16  # rounds with drafts between two looks at one without
_WORTH_RESTING = 1.03  # plain rounds must be so much faster
_WORTH_WAITING = 2.0  # times the going rate must drafts yield that others' first tokens wait for
_WORTH_TRYING = 0.7  # where they are expected to be at least so fast, one is tried


@dataclass(frozen=True)
class Reading:
    """A pass that read parts of prompts, and did not come to the end of all of them."""

    seconds: float
    waited: float  # of them, for streamed weights
    tokens: int  # that it computed


class Resting:
    """Decides, round by round, whether to draft at all.

    Args:
        costs: of the rounds so far; whoever owns them observes the rounds with drafts.
        explored: rounds with drafts before the first decision.
    """

    def __init__(self, costs: RoundCosts, explored: int) -> None:
        self._costs = costs
        self._explored = explored
        self._rest = _REST
        self._rest_left = 0.0  # seconds
        self._trial_left = 0  # rounds
        self._since_look = _LOOK  # rounds with drafts since the last look at one without

    def pays(self, rows: int, reading: Reading | None) -> bool:
        """Whether the next round, of ``rows`` rows, is to draft. Asked once for a round.

        Args:
            reading: the last pass, if it read a part of a prompt and the next one will read on.
        """
        if reading is not None:
            return self._pays_beside(rows, reading)
        costs = self._costs
        if costs.rounds < self._explored:
            return True
        drafting, plain = costs.rate(rows), costs.plain_rate(rows)
        # A rate of 0: the fitted costs say that drafting takes no time.
        if drafting == 0 or plain <= _WORTH_RESTING * drafting or costs.rounds < _SETTLED:
            self._rest, self._rest_left, self._trial_left = _REST, 0.0, 0
            close = plain > _WORTH_TRYING * drafting or not costs.plain.observed
            return not (close and self._looks())
        if self._trial_left == 0 and self._rest_left == 0:
            self._begin_rest(rows)
        if self._rest_left > 0:
            return False
        if self._trial_left == _TRIAL:
            costs.doubt()  # what is known of drafting is from before the rest
        self._trial_left -= 1
        if self._trial_left == 0:
            self._rest = min(2 * self._rest, _LONGEST_REST)
        return True

    def _pays_beside(self, rows: int, reading: Reading) -> bool:
        """Whether drafts pay that lengthen a pass over parts of prompts, whose requests wait for
        their first tokens; those that draft have plain tokens from it in any case."""
        costs = self._costs
        emitted, _, verified, _ = costs.means
        # While a pass waits for its weights, drafting and verifying cost nothing.
        token = (reading.seconds - reading.waited) / reading.tokens
        longer = costs.drafting(rows) + rows * (verified - 1) * token - reading.waited
        price = _WORTH_WAITING * costs.best_rate(rows)
        return rows * (emitted - 1) > price * max(0.0, longer)

    def _looks(self) -> bool:
        """Whether it is time for a look at a round without drafts."""
        self._since_look += 1
        if self._since_look <= _LOOK:
            return False
        self._since_look = 0
        return True

    def _begin_rest(self, rows: int) -> None:
        """The next trial will take as long as rounds like the recent ones do."""
        costs = self._costs
        self._trial_left = _TRIAL
        self._rest_left = self._rest * _TRIAL * rows * costs.means.emitted / costs.rate(rows)

    def observe_plain(self, rows: int, seconds: float, pure: bool) -> None:
        """A round without drafts took ``seconds``.

        Args:
            pure: it computed one token of each row; else also parts of prompts, and says nothing
                about such rounds.
        """
        if pure:
            self._costs.plain.observe(rows, seconds)
            if self._rest_left == 0:  # among rounds with drafts: it verified the roots alone
                self._costs.verify.observe(rows, seconds)
        self._rest_left = max(0.0, self._rest_left - seconds)
