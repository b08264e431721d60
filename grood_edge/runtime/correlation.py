"""How far apart frames of a video are nearly independent: the correlation time of log e over ID episodes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["NEARLY_NONE", "PERIODS", "Correlation", "autocorrelation", "correlation_lag"]

NEARLY_NONE = 0.05  # an autocorrelation below it counts as none
PERIODS = 30  # an episode must last so many correlation times, or it does not show one


@dataclass(frozen=True)
class Correlation:
    """lag: frames after which the autocorrelation stays below 0.05, None where that was not found; reason: why (not).

    longest: the longest lag that the shortest episode can show.
    """

    lag: int | None
    longest: int
    reason: str


def autocorrelation(episodes: Sequence[np.ndarray], lags: int) -> np.ndarray:
    """Return the autocorrelation at lag 0 to `lags`, float64 `[lags + 1]`; NaN where no two frames are so far apart.

    episodes: float64 `[n]` each, NaN where a frame was not scored. The mean and the variance are those of all episodes
    together. An episode's own mean would hide what the frames of a scene have in common, and pull even white noise
    below zero. NaN everywhere if all values are equal.
    """
    values = np.concatenate(episodes)
    mean, variance = np.nanmean(values), np.nanvar(values)
    products, pairs = np.zeros(lags + 1), np.zeros(lags + 1)
    for episode in episodes:
        there = np.isfinite(episode)
        products += _lagged(np.where(there, episode - mean, 0.0), lags)
        pairs += np.rint(_lagged(there.astype(np.float64), lags))
    with np.errstate(invalid="ignore", divide="ignore"):
        result: np.ndarray = products / pairs / (variance if variance > 1e-12 else np.nan)
    return result


def correlation_lag(episodes: Sequence[np.ndarray]) -> Correlation:
    """Find the first lag after which the autocorrelation stays below 0.05.

    At most a thirtieth of the shortest episode is accepted, and it must stay below up to twice that. With one
    episode alone nothing is found: its own mean is then the mean of all.
    """
    shortest = min(len(episode) for episode in episodes)
    longest = shortest // PERIODS
    if len(episodes) < 2:
        return Correlation(None, longest, "one episode cannot show what differs between episodes; give several")
    if longest < 1:
        return Correlation(None, longest, f"the shortest episode has {shortest} frames; at least {PERIODS} are needed")
    found = autocorrelation(episodes, 2 * longest)
    if not np.isfinite(found).all():
        return Correlation(None, longest, "no autocorrelation is defined: all p_values are equal, or too few are left")
    lag = 1 + int(np.flatnonzero(found >= NEARLY_NONE)[-1])  # lag 0 is 1, so there is one
    if lag <= longest:
        return Correlation(lag, longest, f"the autocorrelation stays below {NEARLY_NONE:g} from {lag} frames on")
    if found[longest] >= NEARLY_NONE:
        how = f"is still {found[longest]:.2f} between frames {longest} apart, and the shortest episode ({shortest} "
        how += (
            f"frames) shows no more: it must last {PERIODS} correlation times. What scenes have in common never decays"
        )
    else:
        noise = 1 / np.sqrt(sum(len(episode) for episode in episodes))
        how = (
            f"rises above {NEARLY_NONE:g} again, between frames {lag - 1} apart; noise alone makes {noise:.2f} or more "
        )
        how += "of it here, and less with more frames"
    return Correlation(None, longest, f"the autocorrelation {how}")


def _lagged(values: np.ndarray, lags: int) -> np.ndarray:
    """Return sum_t v_t v_(t + lag) for lag 0 to `lags`."""
    size = 1 << (len(values) + lags).bit_length()
    spectrum = np.fft.rfft(values, size)
    sums: np.ndarray = np.fft.irfft(spectrum * spectrum.conj(), size)[: lags + 1]
    return sums
