"""Tolerances, with their reasons. Errors of hidden states and logits are in standard deviations of the reference."""

from typing import NamedTuple


class Limits(NamedTuple):
    """worst, rms: of hidden states and logits, in standard deviations; kl: mean nats per position."""

    worst: float
    rms: float
    kl: float


# float32: products are summed in another order than the reference's. Over the families and full-width layers measured
# (docs/verification.md) the worst error is 2e-5. Known faults of implementations move logits by 1e-2 or more. The limit
# lies in between, nearer to the noise. It holds on every device because float32 products keep full precision
# (Precision.HIGHEST); a device that rounds them to bfloat16 or TF32 would have an error of 1e-3 and fail.
# A shift of d standard deviations in logits of standard deviation s costs about (d s)^2 / 2 nats: 5e-7 with s up to 10.
EXACT = Limits(worst=1e-4, rms=2e-5, kl=1e-6)

# bfloat16 and float16 round at every step, in another order than the reference does. The limit is the reference's own
# error in that type (against its own float32) times this factor. Over few positions the ratio of two such errors, each
# a sum of independent roundings, stays below 2; a wrong cast (a norm in bfloat16) at least doubles it.
OWN_ERROR = 2.0

# jaxlm against itself: RMS of logits, in standard deviations. float32 as above. In bfloat16 and float16, decoding and
# the full forward pass sum in different orders and round by 2**-8 and 2**-11; over tens of layers that is some steps.
ITSELF = {"float32": EXACT.rms, "bfloat16": 8 * 2**-8, "float16": 8 * 2**-11}

# A quantized model is not its float model: its error is reported. The limit is for faults, such as scales of other
# channels or inputs in another order, which cost several nats.
QUANTIZED_KL = 0.5
# A product that rounds its input to 8 bits turns a difference in the last place into a step of 1 / 254 of the largest
# input. Over tens of layers that is as much as bfloat16 rounds.
ROUNDED = 8 * 2**-8

# Units in the last place of a rotary frequency: numpy, XLA and torch differ by one in a quarter of them.
ULPS = 2
# Meta's code has only cos and sin: computing the angle from them costs as much again.
ULPS_READ_BACK = 4
