"""The one colour scale of all pictures: evenly spaced to the eye, dark to light, safe for the colour-blind."""

import numpy as np

# lightness, chroma, hue (degrees) in OKLCh, from "dead" to "hot"; lightness rises all the way, so the
# order survives every kind of colour blindness and a black-and-white printer
_PATH = np.array(
    [
        (0.16, 0.035, 285.0),
        (0.30, 0.140, 295.0),
        (0.45, 0.175, 335.0),
        (0.60, 0.195, 378.0),
        (0.75, 0.160, 418.0),
        (0.88, 0.155, 450.0),
        (0.97, 0.080, 468.0),
    ]
)


def oklab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """OKLab `(..., 3)` to sRGB in 0..1, unclipped. Matrices: Björn Ottosson, "A perceptual color space", 2020."""
    to_cone = np.array(
        [
            [1, 0.3963377774, 0.2158037573],
            [1, -0.1055613458, -0.0638541728],
            [1, -0.0894841775, -1.2914855480],
        ]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = (lab @ to_cone.T) ** 3 @ to_linear.T
    curved = 1.055 * np.maximum(linear, 0.0) ** (1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, curved)


def heat_table(size: int = 256) -> np.ndarray:
    """The colour scale, uint8 `(size, 3)`: equal steps of the value are equal steps to the eye (OKLab)."""
    at = np.linspace(0, len(_PATH) - 1, 4096)
    smooth = np.stack([_smooth(at, column) for column in _PATH.T], axis=1)
    lab = _fit_gamut(smooth)
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(lab, axis=0), axis=1))])
    even = np.linspace(0, along[-1], size)
    table = np.stack([np.interp(even, along, column) for column in lab.T], axis=1)
    return np.clip(oklab_to_rgb(table) * 255, 0, 255).round().astype(np.uint8)


def _smooth(at: np.ndarray, values: np.ndarray) -> np.ndarray:
    # Gaussian smoothing of the straight path takes the corners off without overshooting
    line = np.interp(at, np.arange(len(values)), values)
    offsets = np.arange(-600, 601)
    weights = np.exp(-0.5 * (offsets / 220) ** 2)
    padded = np.concatenate([2 * line[0] - line[600:0:-1], line, 2 * line[-1] - line[-2:-602:-1]])
    return np.convolve(padded, weights / weights.sum(), mode="valid")


def _fit_gamut(lch: np.ndarray) -> np.ndarray:
    lightness, chroma, hue = lch[:, 0], lch[:, 1].copy(), np.deg2rad(lch[:, 2])
    for _ in range(80):
        lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
        rgb = oklab_to_rgb(lab)
        outside = (rgb.min(axis=1) < 0.0) | (rgb.max(axis=1) > 1.0)
        if not outside.any():
            break
        chroma[outside] *= 0.97
    return np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)


HEAT: np.ndarray = heat_table()
