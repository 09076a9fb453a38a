"""Memory of the temporaries that make crops: resizing, colour, blur and perturbations."""

from __future__ import annotations

from streamtrain.config.tree import Config

# The peak of ``data.views.recolor_views`` beside its result, per value of the crops: fp32 planes, padded planes, and
# the factors and results of the matmuls that blur them. RGB planes are fp32 for the colours too.
RECOLOR_BYTES, BLUR_BYTES = 17, 13
# The peak of ``data.perturb.perturb``, per value of the crops that it changes at a time: fp32 results, integers of the
# noise, and a copy of uint8 crops.
PERTURBED_CROPS, PERTURB_BYTES, NOISE_BYTES = 4, 9, 29


def appearance_bytes(config: Config, samples: int) -> int:
    """Return the peak bytes of the temporaries of the crops of ``samples`` images; local crops follow global ones."""
    crops, pixels, peaks = config.crops, config.data.pixels, [0]
    changed = RECOLOR_BYTES if pixels.is_rgb else BLUR_BYTES
    perturbed = (NOISE_BYTES if crops.noise else PERTURB_BYTES) if crops.is_perturbed else 0
    for count, size in ((crops.global_count, crops.global_size), (crops.local_count, crops.local_size)):
        number, values = samples * count, pixels.channels * size.pixels
        peaks.append(max(number * changed, min(number, PERTURBED_CROPS) * perturbed) * values)
    return max(peaks)


def sample_bytes(config: Config, stored_pixels: int) -> int:
    """Return the peak bytes of a CPU thread that makes the crops of an image: its crops, plus the temporaries.

    Values other than uint8 become fp32 before they are resized; a crop has at most the pixels of the whole image.
    """
    crops, pixels = config.crops, config.data.pixels
    sizes = ((crops.global_count, crops.global_size), (crops.local_count, crops.local_size))
    made = 4 * pixels.channels * max(count * size.pixels for count, size in sizes)
    resized = 0 if pixels.dtype == "uint8" else 4 * pixels.channels * stored_pixels
    return made + max(resized, appearance_bytes(config, 1))
