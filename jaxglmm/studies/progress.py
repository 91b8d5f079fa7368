"""A progress bar for what takes more than two seconds, with the lanes per second."""

from __future__ import annotations

from typing import Any

__all__ = ["Progress"]

_DELAY = 2.0  # seconds before a bar appears


class Progress:
    """A tqdm bar over lanes; silent where there is no terminal, or when switched off.

    It says how many lanes a second are done and what share of them has not converged.
    """

    def __init__(self, total: int, label: str, show: bool = True):
        self._bar: Any = None
        self._lanes = self._failed = 0
        if show:
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=total, desc=label, unit="lane", delay=_DELAY, disable=None,
                smoothing=0.1,
            )  # fmt: skip

    def update(self, n: int, failed: int, earlier: bool = False) -> None:
        """Count n lanes more, of which some failed; ``earlier`` ones took no time."""
        self._lanes += n
        self._failed += failed
        if self._bar is None:
            return
        share = self._failed / self._lanes
        self._bar.set_postfix_str(f"{share:.1%} not converged", refresh=False)
        if earlier and not self._bar.disable:
            self._bar.initial += n
        self._bar.update(n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self.close()
